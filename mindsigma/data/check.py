"""Decoding every image of a data set: which cannot be, and which have another size than the index says."""

from concurrent.futures import ThreadPoolExecutor

from mindsigma.data.record import RATIO, UNREADABLE, BadRow
from mindsigma.data.records import MAX_RATIO, Records, fault_of, read_image
from mindsigma.errors import MindSigmaError

CHUNK = 16  # images decoded by one task of a thread


def check_images(records, threads=8, max_ratio=MAX_RATIO, progress=None):
    """Decode all images of Records.

    Args:
        records: Records.
        threads: images decoded at once.
        max_ratio: of the sides; applied again where a size was wrong.
        progress: called with the number of images done since the last call.

    Returns:
        (Records of those that decode, with their true sizes and the others in `bad`; number of sizes corrected).

    Raises:
        MindSigmaError: none is left.
    """

    def decode(chunk):
        return [_decoded_size(record) for record in chunk]

    everything = list(records)
    chunks = [everything[i : i + CHUNK] for i in range(0, len(everything), CHUNK)]
    kept, bad, corrected = [], list(records.bad), 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for chunk, sizes in zip(chunks, pool.map(decode, chunks)):
            for record, (size, fault) in zip(chunk, sizes):
                if fault:
                    bad.append(BadRow(record.where, UNREADABLE, fault))
                    continue
                if size != (record.height, record.width):
                    corrected += 1
                    record = record._replace(height=size[0], width=size[1])
                if max_ratio and not 1 / max_ratio <= size[0] / size[1] <= max_ratio:
                    bad.append(BadRow(record.where, RATIO, f"{size[0]} x {size[1]} (height x width)"))
                else:
                    kept.append(record)
            if progress:
                progress(len(chunk))
    if not kept:
        raise MindSigmaError(f"{records.path}: no image can be decoded, e.g. {bad[-1].where}: {bad[-1].detail}")
    return Records(kept, bad, records.layout, records.path), corrected


def _decoded_size(record):
    try:
        width, height = read_image(record).size
        return (height, width), ""
    except MindSigmaError as error:
        return (0, 0), fault_of(record, error)

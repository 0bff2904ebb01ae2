"""A data set as a list of usable records, whatever its layout, and the list of rows that are not."""

import hashlib
import io
import itertools
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from mindsigma.data import images
from mindsigma.data.layouts import find_layout
from mindsigma.data.record import ABSENT, BAD_SIZE, DUPLICATE, RATIO, UNREADABLE, BadRow, Record
from mindsigma.data.shards import Section
from mindsigma.errors import MindSigmaError, one_line, printable
from mindsigma.foreign import open_regular
from mindsigma.progress import DELAY_SECONDS, bar

MAX_RATIO = 4.5  # of the sides, as the official Sigma loaders keep
CHUNK = 64  # headers read by one task of a thread
LARGEST_IMAGE = 1 << 28  # bytes of an image's file, which is read whole
MOST_BAD = 1_000_000  # rows; a table of more is no table of images


def open_records(path, max_ratio=MAX_RATIO, strict=False, image_root=None, threads=8, progress=True):
    """Read the index of a data set.

    Args:
        path: folder of the official layout, folder of images with .txt captions, CSV, TSV, JSON or JSON lines table,
            WebDataset shard or folder of shards; recognised by what it holds.
        max_ratio: keep images with 1 / max_ratio <= height / width <= max_ratio; None keeps all.
        strict: raise for the first bad row. Images out of range are left out, not bad.
        image_root: folder that a table's image paths are relative to, if not its own.
        threads: image headers read at once, where the index does not tell sizes.
        progress: show a progress bar while headers are read.

    Returns:
        Records. Its order is the index's, or that of the sorted names: the same on every rank.

    Raises:
        MindSigmaError: no data set there, no usable row in it, or, if `strict`, a bad row.
    """
    require_ratio(max_ratio)
    layout = find_layout(path, image_root)
    good, bad = [], []
    for row in unique(_existing(layout.rows(), layout.name)):
        (good if isinstance(row, Record) else bad).append(row)
        if len(bad) > MOST_BAD:
            raise MindSigmaError(f"{path}: more than {MOST_BAD} bad rows{_listed(bad)}; mend it first")
    kept, more = judged(good, max_ratio, threads, progress)
    bad += more
    records = Records(kept, bad, layout.name, str(path))
    if strict:
        records.require_no_bad()
    if not kept:
        notes = [_listed(records.bad) or "; it holds none", *(f"; {note}" for note in layout.passed_over[:3])]
        raise MindSigmaError(f"{path}: no usable image with a caption ({layout.name} layout{''.join(notes)})")
    return records


def require_ratio(max_ratio):
    """Raise MindSigmaError for a largest ratio of the sides that leaves nothing."""
    if max_ratio is not None and not max_ratio >= 1:
        raise MindSigmaError(f"max_ratio must be at least 1, not {max_ratio}")


def judged(records, max_ratio, threads, progress):
    """(those of a list of Record that can be used, with their sizes; list of BadRow of the others)."""
    records = list(records)
    unsized = [i for i, record in enumerate(records) if not record.height]
    faults, kept, bad = {}, [], []
    for i, (size, fault) in zip(unsized, _read_sizes([records[i] for i in unsized], threads, progress)):
        records[i] = records[i]._replace(height=size[0], width=size[1])
        if fault:
            faults[i] = BadRow(records[i].where, UNREADABLE, fault)
    for i, record in enumerate(records):
        if i in faults:
            bad.append(faults[i])
        elif not record.height or not record.width:
            bad.append(BadRow(record.where, BAD_SIZE, f"{record.height} x {record.width}"))
        elif max_ratio and not 1 / max_ratio <= record.height / record.width <= max_ratio:
            bad.append(BadRow(record.where, RATIO, f"{record.height} x {record.width} (height x width)"))
        else:
            kept.append(record)
    return kept, bad


class Records:
    """Usable records of a data set; indexed and iterated as a list of Record.

    Attributes:
        bad: list of BadRow.
        layout: name of the layout it was read from.
        path: where it was read from.
        sizes: int64 (n, 2), height and width of each image in pixels.
    """

    def __init__(self, records, bad=(), layout="records", path=""):
        self._records = list(records)
        self.bad = [row.shown() for row in bad]
        self.layout = layout
        self.path = path
        self.sizes = np.array([(r.height, r.width) for r in self._records], np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        return self._records[index]

    def __iter__(self):
        return iter(self._records)

    def caption(self, index, real):
        """Caption of a record, as Record.caption."""
        return self._records[index].caption(real)

    def image(self, index):
        """Decoded PIL image, RGB. Raises MindSigmaError that names the file."""
        return read_image(self._records[index])

    def bad_by_reason(self):
        """Counter from reason to number of bad rows."""
        return Counter(row.reason for row in self.bad)

    def count_captions(self):
        """(records with a short caption, with a long one, with both)."""
        short = sum(bool(record.prompt) for record in self)
        long = sum(bool(record.long_prompt) for record in self)
        return short, long, short + long - len(self)

    def require_no_bad(self):
        """Raise MindSigmaError for the first bad row that is not merely out of range."""
        wrong = [row for row in self.bad if row.reason != RATIO]
        if wrong:
            more = f" (and {len(wrong) - 1} more bad rows)" if len(wrong) > 1 else ""
            detail = f": {wrong[0].detail}" if wrong[0].detail else ""
            raise MindSigmaError(f"{wrong[0].where}: {wrong[0].reason}{detail}{more}; mend it, or run without strict")

    def fingerprint(self):
        """Text that differs where keys, captions, sizes or their order differ: what a resumed run must find again."""
        return fingerprint((r.key, r.prompt, r.long_prompt, r.height, r.width) for r in self._records)


def fingerprint(rows):
    """Hexadecimal digest of tuples of texts and numbers."""
    digest, rows = hashlib.blake2b(digest_size=16), iter(rows)
    while some := "".join(map(repr, itertools.islice(rows, 1024))):
        digest.update(some.encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def row_digest(value):
    """A whole number below 2**64 of a text or a tuple of texts and numbers, by which rows are found again."""
    data = repr(value).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@contextmanager
def open_image(record):
    """The bytes of a record's image as a seekable binary file, of at most LARGEST_IMAGE bytes.

    Raises MindSigmaError, which names the record, for what is no regular file, larger, or cannot be read.
    """
    try:
        with open_regular(record.file) as file:
            size = record.length or os.fstat(file.fileno()).st_size
            if size > LARGEST_IMAGE:
                raise MindSigmaError(f"{record.where}: {size} bytes, more than the {LARGEST_IMAGE} that are read")
            yield io.BufferedReader(Section(file, record.offset, record.length)) if record.length else file
    except OSError as error:
        raise MindSigmaError(f"{record.where}: cannot be read ({error.strerror or error})") from None


def fault_of(record, error):
    """The message of a MindSigmaError that names a record, without the name."""
    return str(error).removeprefix(f"{printable(record.where)}: ").removeprefix(f"{printable(record.file)}: ")


def read_image(record):
    """Decoded PIL image, RGB, of a record. Raises MindSigmaError that names the file."""
    with open_image(record) as file:
        try:
            return images.decode(file)
        except MindSigmaError as error:
            raise MindSigmaError(f"{record.where}: {error}") from None


def _existing(rows, layout):
    """The rows, those without an image file made bad. Folders are listed once: cheaper than asking for every file."""
    folders = {}
    for row in rows:
        if isinstance(row, Record) and layout not in ("folder", "webdataset"):
            parent, name = os.path.split(row.file)
            if parent not in folders:
                folders[parent] = _files_of(parent)
            if name not in folders[parent]:
                row = BadRow(row.file, ABSENT)
        yield row


def _files_of(folder):
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def unique(rows):
    """The rows, those whose key came before made bad."""
    seen = set()
    for row in rows:
        if isinstance(row, Record):
            if row.key in seen:
                row = BadRow(row.where, DUPLICATE, f"{row.key} comes twice")
            else:
                seen.add(row.key)
        yield row


def _read_sizes(records, threads, progress):
    """((height, width), fault or "") of each record, from the images' headers."""
    if not records:
        return

    def read(chunk):
        return [_size(record) for record in chunk]

    chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        bar(len(records), "image headers", "image", delay=DELAY_SECONDS, disable=not progress) as done,
    ):
        for sizes in pool.map(read, chunks):
            done.update(len(sizes))
            yield from sizes


def _size(record):
    try:
        with open_image(record) as file:
            return images.read_size(file), ""
    except MindSigmaError as error:
        return (0, 0), fault_of(record, error)


def _listed(bad):
    if not bad:
        return ""
    counts = Counter(row.reason for row in bad).most_common()
    first = next(row for row in bad if row.reason == counts[0][0])
    text = "; ".join(f"{count} x {reason}" for reason, count in counts)
    detail = f": {one_line(first.detail, 300)}" if first.detail else ""
    return f"; bad rows: {text}, e.g. {one_line(first.where, 300)}{detail}"

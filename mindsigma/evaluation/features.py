"""Features of folders of images: decoded ahead, in batches of one size, in bounded memory, by several processes."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindsigma.data import is_index, open_data
from mindsigma.data.images import SUFFIXES, decode
from mindsigma.data.record import Record
from mindsigma.data.records import read_image as read_record
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.fid import RunningStatistics
from mindsigma.evaluation.inception import FEATURES, features, load_inception
from mindsigma.evaluation.inception_inputs import prepared
from mindsigma.foreign import open_regular

AHEAD = 3  # batches that are decoded before they are needed


class InceptionFeatures:
    """Inception's features of PIL images.

    Args:
        weights: path of the file.
        resize: "pytorch-fid", "clean" or "textatlas", which takes torchvision's network.
        batch: images at once; smaller batches are filled up, so that one graph serves all.

    Attributes:
        size: numbers of a vector.
        about: what they are, for a result.
    """

    size = FEATURES

    def __init__(self, weights, resize="pytorch-fid", batch=32):
        variant = "torchvision" if resize == "textatlas" else "fid"
        self.network, self.resize, self.batch = load_inception(weights, variant), resize, batch
        self.about = f"Inception v3 ({variant}), resize {resize}"

    def prepare(self, image):
        """What `__call__` takes of an image; called in threads."""
        return prepared(image, self.resize)

    def __call__(self, inputs):
        """float32 (n, 2048) of at most `batch` results of `prepare`."""
        count = len(inputs)
        filled = np.stack([*inputs, *[inputs[-1]] * (self.batch - count)])
        return features(self.network, filled)[:count]


class ClipFeatures:
    """CLIP's image features of PIL images, not normalised; see InceptionFeatures.

    Args:
        clip: Clip.
    """

    def __init__(self, clip, batch=32):
        self.clip, self.batch = clip, batch
        self.size = clip.network.projection_dim
        self.about = f"CLIP {clip.name}"

    def prepare(self, image):
        """What `__call__` takes of an image."""
        return self.clip.pixels([image])[0]

    def __call__(self, inputs):
        """float32 (n, d) of at most `batch` results of `prepare`."""
        count = len(inputs)
        return self.clip.features_of_pixels(np.stack([*inputs, *[inputs[-1]] * (self.batch - count)]))[:count]


def image_files(folder):
    """Sorted list of the image files of a folder and of its folders; of an index or of shards list of Record.

    Raises MindSigmaError where there is none.
    """
    folder = Path(folder).expanduser()
    if is_index(folder):
        return list(open_data(folder))
    if not folder.is_dir():
        raise MindSigmaError(f"{folder}: no such folder")
    files = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    files = sorted(files)
    if not files and next(folder.rglob("*.tar"), None):
        return list(open_data(folder, max_ratio=None))
    if not files:
        raise MindSigmaError(f"{folder}: holds no images")
    return files


def read_image(path):
    """The image of a file or of a Record, PIL, RGB. Raises MindSigmaError that names the file."""
    if isinstance(path, Record):
        return read_record(path)
    try:
        with open_regular(path) as file:
            return decode(file)
    except MindSigmaError as error:
        raise MindSigmaError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def batched(extract, sources, read=read_image, threads=4, done=lambda count: None):
    """Yield (indices, features) of `sources` in order, a batch at a time; what cannot be read is left out.

    Args:
        extract: InceptionFeatures or ClipFeatures.
        sources: list of whatever `read` takes.
        read: gives a PIL image, or raises MindSigmaError.
        threads: images decoded at once.
        done: called with the number of sources after each batch.
    """

    def prepare(source):
        try:
            return extract.prepare(read(source))
        except MindSigmaError:
            return None

    with ThreadPoolExecutor(threads) as pool:
        waiting, starts = deque(), iter(range(0, len(sources), extract.batch))
        for start in starts:
            part = sources[start : start + extract.batch]
            waiting.append((start, [pool.submit(prepare, source) for source in part]))
            if len(waiting) > AHEAD:
                yield from _extracted(extract, *waiting.popleft(), done)
        while waiting:
            yield from _extracted(extract, *waiting.popleft(), done)


def _extracted(extract, start, futures, done):
    inputs = [future.result() for future in futures]
    there = [i for i, value in enumerate(inputs) if value is not None]
    if there:
        yield [start + i for i in there], extract([inputs[i] for i in there])
    done(len(inputs))


def statistics_of(extract, sources, collectives, read=read_image, done=lambda count: None):
    """RunningStatistics of the features of all `sources`, and how many could not be read; shared by the processes."""
    ranks, running = collectives.ranks, RunningStatistics()
    mine = sources[ranks.rank :: ranks.count]
    for _, values in batched(extract, mine, read, done=done):
        running.add(values)
    return shared_statistics(running, extract.size, collectives), len(sources) - _total(running.count, collectives)


def features_of(extract, sources, collectives, read=read_image, done=lambda count: None):
    """Features (n, d), float32, of all `sources` that can be read, in no order that counts; shared by the processes."""
    ranks = collectives.ranks
    parts = [values for _, values in batched(extract, sources[ranks.rank :: ranks.count], read, done=done)]
    mine = np.concatenate(parts) if parts else np.zeros((0, extract.size), np.float32)
    if collectives.alone:
        return mine
    counts = _counts(len(mine), collectives)
    padded = np.zeros((max(counts), extract.size), np.float32)
    padded[: len(mine)] = mine
    gathered = collectives.gather(Tensor(padded)).asnumpy()
    return np.concatenate([rows[:count] for rows, count in zip(gathered, counts)])


def shared_statistics(running, size, collectives):
    """RunningStatistics of all processes together, the same on each."""
    if collectives.alone:
        return running
    mean = running.mean if running.count else np.zeros(size)
    scatter = running.scatter if running.count else np.zeros((size, size))
    together = RunningStatistics()
    for count, values in zip(_counts(running.count, collectives), _gather64(np.vstack([mean, scatter]), collectives)):
        together.merge(count, values[0], values[1:])
    return together


def _gather64(array, collectives):
    """float64 arrays of all processes; sent as three float32 each, since MindSpore's CPU backend sends no float64."""
    parts, rest = [], array
    for _ in range(3):
        parts.append(rest.astype(np.float32))
        rest = rest - parts[-1]
    return collectives.gather(Tensor(np.stack(parts))).asnumpy().astype(np.float64).sum(1)


def _counts(count, collectives):
    """List of a whole number of each process."""
    ranks = collectives.ranks
    return [int(n) for n in collectives.total([count if rank == ranks.rank else 0 for rank in range(ranks.count)])]


def _total(count, collectives):
    return sum(_counts(count, collectives))

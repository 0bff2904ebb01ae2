"""WebDataset shards: tar files whose members key.jpg, key.txt, key.json are one sample, read in place by offset."""

import io
import os

from mindsigma.data.images import SUFFIXES
from mindsigma.data.record import (
    BROKEN,
    CAPTION_SUFFIXES,
    DUPLICATE,
    LARGEST_TEXT,
    NOT_READ,
    SIDE_CAR,
    UNREADABLE,
    BadRow,
    Record,
    RowError,
    captions_of,
    first_caption,
    side_car_values,
    size_of,
)
from mindsigma.data.tar_index import is_compressed, members
from mindsigma.data.unread import remedy_for, remedy_for_compressed
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import open_regular, understanding

TEXTS = (*CAPTION_SUFFIXES, SIDE_CAR)


def rows(paths, folder=None):
    """Record and BadRow of all samples of the shards `paths`, in the order of each shard.

    Nothing is unpacked and no member's name is used as a path, so hostile names do no harm. What stands before the
    place where a shard is damaged is kept. Keys begin with the shard's path below `folder`, else with its name.
    """
    for path in paths:
        try:
            yield from _shard_rows(path, os.path.relpath(path, folder) if folder else path.name)
        except MindSigmaError as error:
            yield BadRow(str(path), BROKEN, str(error).removeprefix(f"{path}: "))


def _shard_rows(path, name):
    with understanding(path), open_regular(path) as file:
        if is_compressed(file.read(16)):
            yield BadRow(str(path), NOT_READ, remedy_for_compressed(path))
            return
        samples, fault = _samples(file)
        for key, sample in samples.items():
            try:
                yield from _sample_rows(file, path, name, key, sample)
            except RowError as error:
                yield BadRow(f"{path}: {key}", *error.args)
        if fault:
            yield BadRow(str(path), BROKEN, fault)


class _Sample:
    """Members of one sample: lists of (name, (offset, length)) of images, texts and others."""

    def __init__(self):
        self.images, self.texts, self.others = [], [], []


def _samples(file):
    """(dict from key to _Sample, what is wrong with the shard or "").

    WebDataset ends a key at the first dot of a member's name. Where a text and an image are called alike up to their
    last dot, they are a sample of their own, as files with dots in their names are.
    """
    found, fault = [], ""
    try:
        for path, *place in members(file):
            folder, _, name = path.rpartition("/")
            if not name.startswith("."):
                stem, suffix = os.path.splitext(name)
                found.append((f"{folder}/" if folder else "", stem, suffix.lower(), tuple(place)))
    except MindSigmaError as error:
        fault = f"damaged or no tar file: {error}; copy or download it again"
    own = {(folder, stem) for folder, stem, suffix, _ in found if suffix in TEXTS}
    own &= {(folder, stem) for folder, stem, suffix, _ in found if suffix not in TEXTS}
    samples = {}
    for folder, stem, suffix, place in found:
        key = stem if (folder, stem) in own else stem.partition(".")[0]
        sample = samples.setdefault(folder + key, _Sample())
        kind = sample.images if suffix in SUFFIXES else sample.texts if suffix in TEXTS else sample.others
        kind.append((f"{stem[len(key) :]}{suffix}", place))
    return samples, fault


def _sample_rows(file, path, name, key, sample):
    where = f"{path}: {key}"
    sample.images.sort(key=lambda image: image[0].count("."))  # key.jpg before key.mask.png; else in their order
    if not sample.images:
        for suffix, _ in sample.others:
            remedy = remedy_for(f"x{suffix}")
            if remedy or sample.texts:
                yield BadRow(f"{where}{suffix}", NOT_READ, remedy or f"'{suffix}' is no suffix of an image")
        return  # a text alone is no sample: shards also carry notes
    (suffix, (offset, length)), *more = sample.images
    for other, _ in more:
        yield BadRow(f"{where}{other}", DUPLICATE, "a second image of the same sample")
    values = _values(file, sample.texts)
    if not length:
        raise RowError(UNREADABLE, "empty")
    yield Record(f"{name}/{key}{suffix}", *captions_of(values), *size_of(values), str(path), offset, length)


def _values(file, texts):
    """What the texts of a sample tell, as a dict: the side-car's, and a caption where it tells none."""

    def read(place):
        offset, length = place
        if length > LARGEST_TEXT:
            raise MindSigmaError(f"{length} bytes of text, more than {LARGEST_TEXT}")
        file.seek(offset)
        return file.read(length)

    places = {os.path.splitext(f"x{name}")[1]: place for name, place in sorted(texts, reverse=True)}
    try:
        values = side_car_values(read(places[SIDE_CAR])) if SIDE_CAR in places else {}
        caption = first_caption(places, read)
    except MindSigmaError as error:
        raise RowError(BROKEN, str(error)) from None
    if caption:
        values.setdefault("prompt", caption)
    return values


class Section(io.RawIOBase):
    """A part of an open file as a binary file of its own, read only.

    Args:
        file: the whole, a binary file; it is not closed.
        offset, length: bytes.
    """

    def __init__(self, file, offset, length):
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self):
        return self._position

    def readinto(self, buffer):
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:count])
        self._position += count
        return count

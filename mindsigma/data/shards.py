"""WebDataset shards: tar files whose members key.jpg, key.txt, key.json are one sample, read in place by offset."""

import io
import json
import os
import tarfile

from mindsigma.data.images import SUFFIXES
from mindsigma.data.record import (
    BROKEN,
    DUPLICATE,
    UNREADABLE,
    BadRow,
    Record,
    RowError,
    captions_of,
    size_of,
    text_of,
)
from mindsigma.errors import MindSigmaError

LARGEST_TEXT = 2**20  # bytes of a .txt or .json member


def rows(paths):
    """Record and BadRow of all samples of the shards `paths`, in the order of each shard.

    Nothing is unpacked and no member's name is used as a path, so hostile names do no harm. What stands before the
    place where a shard is damaged is kept.
    """
    for path in paths:
        yield from _shard_rows(path)


def _shard_rows(path):
    samples, fault = _index(path)
    with open(path, "rb") as file:
        for key, members in samples.items():
            where = f"{path}: {key}"
            images = [(suffix, place) for suffix, place in members if suffix in SUFFIXES]
            if not images:
                continue  # a text without an image is no sample: shards also carry notes
            try:
                values = _values(file, dict(members))
                suffix, (offset, length) = images[0]
                if not length:
                    raise RowError(UNREADABLE, "empty")
                yield Record(
                    f"{path.name}/{key}{suffix}", *captions_of(values), *size_of(values), str(path), offset, length
                )
                for suffix, _ in images[1:]:
                    yield BadRow(f"{where}{suffix}", DUPLICATE, "a second image of the same sample")
            except RowError as error:
                yield BadRow(where, *error.args)
    if fault:
        yield BadRow(str(path), BROKEN, fault)


def _index(path):
    """(dict from key to list of (suffix, (offset, length)), what is wrong with the shard or "")."""
    samples, fault = {}, ""
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            while True:
                member = tar.next()
                if member is None:
                    break
                tar.members = []  # else tarfile keeps every header
                if not member.isreg() or member.issparse():
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"member {member.name!r} is cut off")
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if stem:  # else a hidden file
                    key = f"{folder}/{stem}" if folder else stem
                    place = member.offset_data, member.size
                    samples.setdefault(key, []).append((f"{dot}{suffix}".lower(), place))
    except OSError as error:
        raise MindSigmaError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        fault = f"damaged or no tar file: {error}"
        if not samples:
            raise MindSigmaError(f"{path}: {fault}; copy or download it again") from None
    return samples, fault


def _values(file, members):
    """What the text members of a sample tell, as a dict."""
    values = {}
    if ".json" in members:
        try:
            values = json.loads(_text(file, members[".json"]))
        except (ValueError, RecursionError) as error:
            raise RowError(BROKEN, f".json: {error}") from None
        if not isinstance(values, dict):
            raise RowError(BROKEN, ".json: not an object")
    if ".txt" in members:
        values.setdefault("prompt", _text(file, members[".txt"]))
    return values


def _text(file, place):
    offset, length = place
    if length > LARGEST_TEXT:
        raise RowError(BROKEN, f"{length} bytes of text, more than {LARGEST_TEXT}")
    file.seek(offset)
    try:
        return text_of(file.read(length), "member")
    except MindSigmaError as error:
        raise RowError(BROKEN, str(error)) from None


class Section(io.RawIOBase):
    """A part of a file as a binary file of its own, read only.

    Args:
        path: the whole file.
        offset, length: bytes.
    """

    def __init__(self, path, offset, length):
        self._file = open(path, "rb")
        self._offset, self._length, self._position = offset, length, 0

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

    def close(self):
        self._file.close()
        super().close()

"""The records that a run began with, kept in its folder: it goes on with its batches where some were removed since."""

import zlib
from pathlib import Path

import numpy as np

from mindsigma.data import FeatureSet
from mindsigma.data.orders import LARGEST_SHUFFLED
from mindsigma.data.records import fingerprint, row_digest
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec, checksum

COLUMNS = ("keys", "contents", "sizes")  # arrays of one row a record
CHANGED = "{} has another caption or size than when the run began: put the old one back, or remove it"


def open_list(source, file, resumed=False, accept_new=False):
    """The RecordList of a source; its VersionList if it is a mixture, or has versions and very many records."""
    by_version = hasattr(source, "sets") or len(source) > LARGEST_SHUFFLED and hasattr(source, "fingerprints")
    kind = VersionList if by_version else RecordList
    return kind(source, file, resumed, accept_new)


class Followed:
    """What RecordList and VersionList share; arguments and attributes as those of RecordList."""

    places, gone, new, difference, _kept = None, 0, 0, "", None

    def __init__(self, source, file, resumed=False, accept_new=False):
        self.source, self._file, self._accept_new = source, Path(file), accept_new
        self.sizes, self.fingerprint = source.sizes, source.fingerprint()
        if resumed and self._file.exists():
            self._follow()

    @property
    def follows(self):
        """Whether the source is that of the list, but for records that are gone or, where that is accepted, new."""
        return self._kept is not None and not self.difference

    def _follow(self):
        """Compare the source with what the run began with: sets `_kept` and what else is not as it was."""
        raise NotImplementedError


class RecordList(Followed):
    """A data set in the order that a run draws from.

    Args:
        source: Records or FeatureSet, as they are now.
        file: Path of the list in the folder of the run.
        resumed: whether the run has begun before. Then the order is the list's, and records may be gone.
        accept_new: whether records may be new. If some are, the order is the source's.

    Attributes:
        source: as given.
        sizes: int64 (n, 2), height and width of each record of the run.
        places: int64 (n,), index in the source of each, -1 where it is gone.
        fingerprint: of the data that the run began with, if `source` is that, of `source` if not.
        gone: number of records that were removed since.
        difference: why `source` is not what the run began with, or "".
        new: number of records that were added, where that is accepted.
    """

    def __init__(self, source, file, resumed=False, accept_new=False):
        self.places = np.arange(len(source))
        super().__init__(source, file, resumed, accept_new)

    def write(self):
        """Keep the list, unless it is the one of this run already."""
        if self._kept == self.fingerprint:
            return
        arrays = dict(zip(COLUMNS, (*_digests(self.source), np.asarray(self.source.sizes, np.int64))))
        metadata = {"fingerprint": self.fingerprint, "kind": _kind(self.source)}
        metadata["checksum"] = _checksum(arrays, metadata)
        specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
        write_safetensors(self._file, specs, arrays.__getitem__, metadata)

    def _follow(self):
        """Take the order of the list, if the source holds nothing that is not on it."""
        try:
            keys, contents, sizes, metadata = _read(self._file)
        except MindSigmaError as error:
            self.difference = str(error)
            return
        self._kept = metadata["fingerprint"]
        if self._kept == self.fingerprint:
            return
        if metadata["kind"] != _kind(self.source):
            self.difference = "images in the place of features, or features made otherwise"
            return
        keys_now, contents_now = _digests(self.source)
        order = np.argsort(keys_now)
        found = order[np.searchsorted(keys_now, keys, sorter=order).clip(max=len(order) - 1)]
        present = keys_now[found] == keys
        changed = present & ((contents_now[found] != contents) | (self.sizes[found] != sizes).any(1))
        new = np.setdiff1d(np.arange(len(order)), found[present])
        gone = int(len(keys) - present.sum())
        if changed.any():
            self.difference = CHANGED.format(self._name(found[changed][0]))
        elif len(new) and not self._accept_new:
            name = self._name(new[0])
            self.difference = f"{len(new)} records are new, e.g. {name}: remove them, or give --accept-new-data"
        elif len(new):
            self.new, self.gone = len(new), gone
        elif 2 * gone > len(keys):
            self.difference = f"{gone} of {len(keys)} records are gone"
        else:
            self.sizes, self.places = sizes, np.where(present, found, -1)
            self.fingerprint, self.gone = self._kept, gone

    def _name(self, index):
        """Key of a record, for messages."""
        return one_line(next(row[0] for i, row in enumerate(self.source) if i == index))


class VersionList(Followed):
    """An index in the order that a run draws from; stands for a RecordList. Its rows never change, so none is kept.

    Args and attributes as those of RecordList; no record is ever gone.
    """

    def __init__(self, source, file, resumed=False, accept_new=False):
        self.by_ratio, self.sets = (getattr(source, name, None) for name in ("by_ratio", "sets"))
        super().__init__(source, file, resumed, accept_new)

    def write(self):
        """See RecordList."""
        if self._kept != self.fingerprint:
            arrays = {"rows": np.array([len(self.source)], np.int64)}
            specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
            metadata = {"fingerprint": self.fingerprint, "kind": _kind(self.source)}
            write_safetensors(self._file, specs, arrays.__getitem__, metadata)

    def _follow(self):
        """Find the version that the run began with among those before the source."""
        try:
            tensors, metadata = read_safetensors(self._file)
            rows = tensors.get("keys", tensors.get("rows"))
            then = len(rows) if "keys" in tensors else int(rows[0])
            self._kept = metadata["fingerprint"]
        except (MindSigmaError, IndexError, KeyError, TypeError) as error:
            self.difference = one_line(error)
            return
        if self._kept == self.fingerprint:
            return
        if self._kept not in self.source.fingerprints:
            self.difference = "the index is no later version of the one that the run began with"
        elif not self._accept_new:
            new = len(self.source) - then
            self.difference = f"{new} records are new: give the earlier version-NNNN.json, or --accept-new-data"
        else:
            self.new = len(self.source) - then


def _digests(source):
    """Two uint64 (n,): of each record's key, and of all that a run depends on besides its size."""
    if hasattr(source, "digests"):
        return np.ascontiguousarray(np.asarray(source.digests).T)
    result = np.empty((2, len(source)), np.uint64)
    for i, row in enumerate(source):
        # Of features the numbers of tokens, too; of a Record not where its bytes stand.
        content = row[1:3] + (tuple(row[4]) if isinstance(source, FeatureSet) else ())
        result[:, i] = row_digest(row[0]), row_digest(content)
    return result


def _kind(source):
    """What the records are, besides what stands in each: text that differs between images and kinds of features."""
    return fingerprint([sorted(source.config.items())]) if isinstance(source, FeatureSet) else "images"


def _checksum(arrays, metadata):
    text = f"{metadata['fingerprint']} {metadata['kind']}".encode("utf-8", "backslashreplace")
    return f"{zlib.crc32(text):08x} " + " ".join(f"{checksum(arrays[name]):08x}" for name in COLUMNS)


def _read(file):
    """(keys, contents, sizes, metadata) of a list. Raises MindSigmaError for one that is damaged."""
    tensors, metadata = read_safetensors(file)
    damaged = MindSigmaError(f"{file}: the list of the run's records is damaged")
    if set(tensors) != set(COLUMNS) or not {"fingerprint", "kind", "checksum"} <= set(metadata):
        raise damaged
    arrays = {name: np.array(tensors[name]) for name in COLUMNS}
    keys, contents, sizes = arrays.values()
    if keys.dtype != np.uint64 or contents.dtype != np.uint64 or sizes.dtype != np.int64 or keys.ndim != 1:
        raise damaged
    if contents.shape != keys.shape or sizes.shape != (*keys.shape, 2) or not len(keys) or (sizes < 1).any():
        raise damaged
    if metadata["checksum"] != _checksum(arrays, metadata):
        raise damaged
    return keys, contents, sizes, metadata

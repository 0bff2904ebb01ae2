"""Tables of any number of rows as memory-mapped columns: numbers, and texts as bytes and where they end.

A part of a table is a safetensors file. A column of numbers is a tensor of a row each; a column of texts is a tensor of
all bytes and one of ends, `NAME` and `NAME.ends`. A table is one part or several, one after the other. Opening reads
the headers alone; a row is read from the file when it is asked for.
"""

import os
from typing import NamedTuple, Tuple

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import open_regular, understanding
from mindsigma.weights.formats.atomic import naming, replacing
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.formats.safetensors_writer import check_safetensors, write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec, pieces, write_pieces

ENDS = ".ends"
AT_ONCE = 1 << 16  # rows read together where all are wanted
REMEDY = "make it again"


class Kind(NamedTuple):
    """A column: its name, dtype and shape of a row; texts have the dtype None."""

    name: str
    dtype: object = None
    shape: Tuple[int, ...] = ()


def encoded(text):
    """The bytes of a text; names of files may hold halves of characters."""
    return text.encode("utf-8", "surrogatepass")


def text_arrays(name, texts):
    """dict of the two tensors of a column of texts."""
    data = [encoded(text) for text in texts]
    return {
        name: np.frombuffer(b"".join(data), np.uint8),
        name + ENDS: np.cumsum([len(part) for part in data], dtype=np.int64),
    }


def arrays_of(kinds, rows):
    """dict of the tensors of a part: one column for each Kind of the tuples `rows`."""
    arrays = {}
    for kind, values in zip(kinds, zip(*rows) if rows else [()] * len(kinds)):
        if kind.dtype is None:
            arrays.update(text_arrays(kind.name, values))
        else:
            arrays[kind.name] = np.array(values, kind.dtype).reshape(len(values), *kind.shape)
    return arrays


def write_part(path, arrays, metadata):
    """Write a part, whole or not at all; its folder is made if it is absent."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    write_safetensors(path, specs, arrays.__getitem__, metadata)


class Part:
    """A file of columns.

    Args:
        path: the file.
        tables: lists of Kind that it must hold; the columns of a list have equally many rows.

    Attributes:
        rows: number of rows of the first table; counts: of each.
        arrays: dict of all tensors, mapped. metadata: dict of texts.

    Raises:
        MindSigmaError: damaged, or without one of the columns.
    """

    def __init__(self, path, *tables):
        self.path = path
        self.arrays, self.metadata = read_safetensors(path)
        self._file = open_regular(path)
        addresses = {name: array.__array_interface__["data"][0] for name, array in self.arrays.items() if array.size}
        first = os.fstat(self._file.fileno()).st_size - sum(array.nbytes for array in self.arrays.values())
        self._offsets = {name: first + address - min(addresses.values()) for name, address in addresses.items()}
        self.counts = tuple(self._count(kinds) for kinds in tables)
        self.rows = self.counts[0]

    def _count(self, kinds):
        counts = {}
        for kind in kinds:
            if kind.dtype is None:
                self._require(kind.name, np.uint8, (0,))
                counts[kind.name] = len(self._require(kind.name + ENDS, np.int64, (0,)))
            else:
                counts[kind.name] = len(self._require(kind.name, kind.dtype, (0, *kind.shape)))
        if len(set(counts.values())) != 1:
            raise self.damaged(f"its columns have different numbers of rows: {counts}")
        return next(iter(counts.values()))

    def damaged(self, fault):
        """MindSigmaError of this file."""
        return MindSigmaError(f"{self.path}: damaged: {fault}; {REMEDY}")

    def numbers(self, name):
        """A column of numbers, (n, ...), mapped."""
        return self.arrays[name]

    def read(self, name, start, stop):
        """The rows of a tensor from start to stop, read from the file.

        Pages of a map that were looked at would count as this process's memory: of rows here and there soon all.
        """
        array, count = self.arrays[name], stop - start
        if count <= 0:
            return array[:0]
        length = array.strides[0]
        with understanding(self.path, REMEDY):
            data = os.pread(self._file.fileno(), count * length, self._offsets[name] + start * length)
        if not 0 <= start <= stop <= len(array) or len(data) != count * length:
            raise self.damaged(f"it has no rows {start} to {stop} of {name}")
        return np.frombuffer(data, array.dtype).reshape(count, *array.shape[1:])

    def texts(self, name, start, stop):
        """list of the texts of the rows from start to stop."""
        if start >= stop:
            return []
        bounds = self.read(name + ENDS, max(start - 1, 0), stop).tolist()
        bounds = bounds if start else [0, *bounds]
        if bounds[0] < 0 or bounds[-1] > len(self.arrays[name]) or any(a > b for a, b in zip(bounds, bounds[1:])):
            raise self.damaged(f"texts of the rows {start} to {stop} lie outside of it")
        block, first = self.read(name, bounds[0], bounds[-1]).tobytes(), bounds[0]
        with understanding(self.path, REMEDY):
            return [block[a - first : b - first].decode("utf-8", "surrogatepass") for a, b in zip(bounds, bounds[1:])]

    def lengths(self, name, start, stop):
        """int64: bytes of the texts of the rows from start to stop."""
        stop = min(stop, len(self.arrays[name + ENDS]))
        ends = self.read(name + ENDS, max(start - 1, 0), stop)
        return np.diff(ends) if start else np.diff(ends, prepend=0)

    def all_texts(self, name):
        """Iterate over the texts of all rows."""
        for start in range(0, len(self.arrays[name + ENDS]), AT_ONCE):
            yield from self.texts(name, start, min(start + AT_ONCE, len(self.arrays[name + ENDS])))

    def _require(self, name, dtype, shape):
        array = self.arrays.get(name)
        if array is None or array.dtype != dtype or array.ndim != len(shape) or array.shape[1:] != tuple(shape[1:]):
            raise self.damaged(f"it has no column {name}")
        return array


class Column:
    """Arrays one after the other as one, indexed along the first axis; nothing is copied that is not asked for."""

    def __init__(self, arrays):
        self.arrays = [array for array in arrays if len(array)] or list(arrays[:1])
        self._bounds = np.cumsum([0, *map(len, self.arrays)])
        self.shape, self.dtype = (int(self._bounds[-1]), *self.arrays[0].shape[1:]), self.arrays[0].dtype

    def __len__(self):
        return self.shape[0]

    def __array__(self, dtype=None):
        return np.concatenate(self.arrays).astype(dtype or self.dtype, copy=False)

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self[np.arange(start, stop, step)]
            parts = [a[max(start - b, 0) : max(stop - b, 0)] for a, b in zip(self.arrays, self._bounds)]
            parts = [part for part in parts if len(part)] or [self.arrays[0][:0]]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        if np.ndim(index) == 0:
            part, row = self.place(int(index))
            return self.arrays[part][row]
        index = np.asarray(index)
        index = np.where(index < 0, index + len(self), index)
        result = np.empty((len(index), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._bounds, index, "right") - 1
        for number in np.unique(part):
            here = part == number
            result[here] = self.arrays[number][index[here] - self._bounds[number]]
        return result

    def place(self, index):
        """(number of the array, row within it) of a row. Raises IndexError."""
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self._bounds, index, "right")) - 1
        return part, index - int(self._bounds[part])


class Parts:
    """Parts that are opened one by one, as there may be more of them than files may be open.

    Args:
        paths: list of their files. tables: as for Part.
    """

    def __init__(self, paths, *tables):
        self.paths, self.tables = paths, tables

    def __iter__(self):
        for path in self.paths:
            yield Part(path, *self.tables)


def merge(path, parts, beside=None, added=None, metadata=None):
    """Write one part of the rows of several, one after the other, in the memory of one of them.

    Args:
        path: Path of the file.
        parts: Parts; all columns of their tables are taken over.
        beside: dict of further tensors.
        added: dict from the name of a column of numbers to what is added to it, a number for each part.
        metadata: dict of texts.
    """
    kinds = [kind for table in parts.tables for kind in table]
    texts = [kind.name for kind in kinds if kind.dtype is None]
    names = [kind.name for kind in kinds] + [name + ENDS for name in texts]
    lengths = {name: [] for name in names}
    for part in parts:
        for name in names:
            lengths[name].append(len(part.arrays[name]))
    added = {**(added or {}), **{name + ENDS: np.cumsum([0, *lengths[name]])[:-1].tolist() for name in texts}}
    shapes = {kind.name: (kind.dtype or np.uint8, kind.shape) for kind in kinds}
    shapes.update({name + ENDS: (np.int64, ()) for name in texts})
    specs = [TensorSpec(name, dtype, (sum(lengths[name]), *shape)) for name, (dtype, shape) in shapes.items()]
    specs += [TensorSpec(name, array.dtype, array.shape) for name, array in (beside or {}).items()]
    specs, header = check_safetensors(path, sorted(specs, key=lambda spec: -np.dtype(spec.dtype).itemsize), metadata)
    with replacing(path) as file:
        file.write(header)
        for name in [spec.name for spec in specs]:
            if name not in lengths:
                write_pieces(file, pieces(beside[name]))
                continue
            for number, part in enumerate(parts):
                array, add = part.arrays[name], added[name][number] if name in added else 0
                write_pieces(file, pieces(array + np.asarray(add, array.dtype) if add else array))

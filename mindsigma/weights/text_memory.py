"""Where a text encoder's weights are while it waits: whole in memory, on the disk, or in memory as int8."""

import numpy as np

from mindsigma.weights.formats.finite import finite
from mindsigma.weights.formats.tensor_stream import release
from mindsigma.weights.tensors import as_tensor, weight_tensor

MEMORY = ("whole", "layers", "int8")
CHUNK = 1 << 20  # numbers that are quantised at once


class FromDisk:
    """Weights of a MappedSource, read each time they are asked for."""

    def __init__(self, tensors):
        self._tensors = tensors

    def __call__(self, name, dtype, rows=None):
        """Tensor of a weight, or of some of its rows."""
        array = self._tensors.read(name)
        tensor = weight_tensor(self._tensors.path, name, array if rows is None else array[rows], dtype)
        release(array)
        return tensor


class Int8(FromDisk):
    """The matrices of the layers as int8 with a scale for each row, an output channel: value = int8 * scale.

    Embedding (of which a text needs a few rows), norms and position bias are read from the files when asked for.
    """

    def __init__(self, tensors):
        super().__init__(tensors)
        self._held = {}
        for name in tensors.names():
            if tensors.shape(name)[1:] and name.startswith("encoder.block") and "bias" not in name:
                array = tensors.read(name)
                self._held[name] = quantised(finite(tensors.path, name, array))
                release(array)

    @property
    def nbytes(self):
        """Bytes held."""
        return sum(part.nbytes for parts in self._held.values() for part in parts)

    def __call__(self, name, dtype, rows=None):
        """Tensor of a weight, or of some of its rows, in floating point."""
        if name not in self._held:
            return super().__call__(name, dtype, rows)
        values, scales = self._held[name]
        return as_tensor(np.multiply(values, scales, dtype=np.float32), dtype)


def quantised(matrix):
    """int8 (out, in) and float32 scales (out, 1) of a matrix (out, in): largest magnitude of the row / 127."""
    values, scales = np.empty(matrix.shape, np.int8), np.empty((matrix.shape[0], 1), np.float32)
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        part = np.asarray(matrix[start : start + step], np.float32)
        scale = np.abs(part).max(1, keepdims=True) / np.float32(127)
        scales[start : start + step] = scale
        values[start : start + step] = np.rint(part / np.where(scale == 0, np.float32(1), scale))
    return values, scales

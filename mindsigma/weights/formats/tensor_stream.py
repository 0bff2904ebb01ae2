"""Tensors on their way to a file: announced beforehand, fetched one at a time, written in pieces."""

import contextlib
import mmap
import zlib
from typing import NamedTuple

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.safetensors_file import byte_length

PIECE = 64 * 2**20  # bytes written at once, between two reports of progress


class TensorSpec(NamedTuple):
    """What a tensor will be: `name`, NumPy `dtype` (`ml_dtypes.bfloat16` included), `shape` as tuple of ints."""

    name: str
    dtype: np.dtype
    shape: tuple

    @property
    def nbytes(self):
        return byte_length(self.dtype, self.shape)


def checked_specs(path, specs, dtypes, kind):
    """The specs as a list, dtype and shape normalised.

    Raises MindSigmaError, naming the target `path`, for a name that is empty, unprintable or comes twice, an impossible
    shape, or a dtype outside of `dtypes`, those a `kind` file can hold.
    """
    checked = [TensorSpec(name, np.dtype(dtype), tuple(map(int, shape))) for name, dtype, shape in specs]
    seen = set()
    for name, dtype, shape in checked:
        where = f"{path}: tensor '{one_line(name)}'"
        if not name or not name.isprintable():
            raise MindSigmaError(f"{where} has an empty or unprintable name; rename it")
        if name in seen:
            raise MindSigmaError(f"{where} comes twice; rename one of the two")
        if dtype not in dtypes:
            raise MindSigmaError(
                f"{where} is {dtype}, which a {kind} file cannot hold; convert it to float32 (--dtype)"
            )
        if byte_length(dtype, shape) is None:
            raise MindSigmaError(f"{where} has the impossible shape {one_line(shape, 80)}")
        seen.add(name)
    if not checked:
        raise MindSigmaError(f"{path}: there is no tensor to write")
    return checked


def fetch(path, spec, read):
    """`read(name)`, an array as announced by `spec`; raises MindSigmaError where it is another or cannot be read."""
    where = f"{path}: tensor '{one_line(spec.name)}'"
    try:
        array = read(spec.name)
    except OSError as error:
        raise MindSigmaError(f"{where} cannot be read from its source ({error.strerror or error})") from error
    if not isinstance(array, np.ndarray) or array.dtype != spec.dtype or array.shape != spec.shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise MindSigmaError(f"{where} arrives as {found} where {spec.dtype} {spec.shape} was announced")
    return array


def pieces(array):
    """The bytes of an array of any strides, in C order, as uint8 arrays of at most PIECE bytes.

    Of an array mapped from a file, what has been used is released again.
    """
    if array.flags.c_contiguous:
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, PIECE):
            yield flat[begin : begin + PIECE]
            release(array)
    elif array.nbytes <= PIECE:
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        release(array)
    else:
        rows = max(1, PIECE // array[:1].nbytes)
        for begin in range(0, len(array), rows):
            yield from pieces(array[begin] if rows == 1 and array.ndim > 1 else array[begin : begin + rows])


def write_pieces(file, some, progress=None):
    """Write uint8 arrays, call `progress(bytes)` after each; returns the CRC-32 of them all."""
    crc = 0
    for piece in some:
        file.write(piece)
        crc = zlib.crc32(piece, crc)
        if progress:
            progress(piece.size)
    return crc


def checksum(array, progress=None):
    """CRC-32 of an array's bytes in C order, as write_pieces returns it, without writing them."""
    return write_pieces(_Nowhere, pieces(array), progress)


class _Nowhere:
    """Takes bytes and drops them."""

    @staticmethod
    def write(piece):
        pass


def release(array):
    """Let go of the pages that reading a file mapped read-only has brought into memory; other arrays are left alone.

    Without this a stream through a mapped file counts as resident whatever of it was read. The array stays valid.
    """
    while array is not None and not isinstance(array, mmap.mmap):
        array = getattr(array, "base", None)
    # of a private, writable map the call would drop what was written
    if array is not None and memoryview(array).readonly and hasattr(mmap, "MADV_DONTNEED"):
        with contextlib.suppress(OSError, ValueError):
            array.madvise(mmap.MADV_DONTNEED)

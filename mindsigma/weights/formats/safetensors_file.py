"""Memory-mapped reader of one `.safetensors` file that believes nothing its header says."""

import math

import ml_dtypes
import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, map_file

MAX_HEADER = 25_000_000  # some 200,000 tensors; the reference implementation allows four times as much
MAX_TENSORS = 2**15  # whole Stable Diffusion checkpoints hold some 2500
MAX_RANK = 32  # of NumPy 1.x
MAX_BYTES = 2**62

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "C64": np.dtype("<c8"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),  # scales of blocks
}


def read_safetensors(path):
    """Map the tensors of a `.safetensors` file.

    Returns `(tensors, metadata)`: name -> read-only array view of the mapped file in the order of the header (bfloat16
    is `ml_dtypes.bfloat16`; the views are not necessarily aligned), and the header's `__metadata__` as dict[str, str].
    Raises MindSigmaError unless the header is valid and its tensors fill the file without overlap or hole.
    """
    return parse_safetensors(path, map_file(path))


def parse_safetensors(path, data):
    """What read_safetensors gives of the bytes of a file, uint8 (bytes,), which are called `path` in messages."""
    start, header = _header(path, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(path, "its __metadata__ is not a map of text to text")
    if len(header) > MAX_TENSORS:
        raise MindSigmaError(f"{path}: holds {len(header)} tensors, over the limit of {MAX_TENSORS}")
    entries = {name: _entry(path, name, entry) for name, entry in header.items()}
    _check_tiling(path, entries, data.size - start)
    tensors = {
        name: data[start + begin : start + end].view(dtype).reshape(shape)
        for name, (dtype, shape, begin, end) in entries.items()
    }
    return tensors, metadata


def byte_length(dtype, shape):
    """Bytes of a tensor, or None where `shape` is no shape NumPy can hold (a size that is no int >= 0, too large)."""
    if len(shape) > MAX_RANK or not all(type(n) is int and 0 <= n < MAX_BYTES for n in shape):
        return None
    if math.prod(max(n, 1) for n in shape) * dtype.itemsize > MAX_BYTES:  # NumPy minds this even where a size is 0
        return None
    return math.prod(shape) * dtype.itemsize


def _header(path, data):
    if data.size < 8:
        raise _damaged(path, f"truncated: {data.size} bytes found, at least 8 expected")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_HEADER:
        raise _damaged(path, f"its header claims {length} bytes, more than the {MAX_HEADER} that are read")
    if 8 + length > data.size:
        raise _damaged(path, f"truncated: {data.size} bytes found, at least {8 + length} expected for its header")
    return 8 + length, load_json(path, data[8 : 8 + length].tobytes(), "the safetensors header")


def _entry(path, name, entry):
    """Check one header entry by itself; returns (dtype, shape, begin, end)."""
    where = f"tensor '{one_line(name)}'"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{where} is not described by dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise MindSigmaError(
            f"{path}: {where} has the unknown dtype {one_line(entry['dtype'], 40)}, perhaps a quantised form; "
            f"convert it to one of {', '.join(DTYPES)}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    expected = byte_length(dtype, shape) if isinstance(shape, list) else None
    if expected is None:
        raise _damaged(path, f"{where} has the impossible shape {one_line(shape, 80)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _damaged(path, f"{where} has the impossible data_offsets {one_line(offsets, 80)}")
    begin, end = offsets
    if end - begin != expected:
        raise _damaged(path, f"{where} spans {end - begin} bytes where its shape and dtype need {expected}")
    return dtype, tuple(shape), begin, end


def _check_tiling(path, entries, found):
    """The tensors, in the order of their offsets, must follow each other from 0 to the end of the file."""
    expected = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != expected:
            fault = "overlaps another tensor" if begin < expected else f"leaves a hole of {begin - expected} bytes"
            raise _damaged(path, f"tensor '{one_line(name)}' {fault}")
        expected = end
    if found < expected:
        raise _damaged(path, f"truncated: {found} bytes of tensor data found, {expected} expected")
    if found > expected:
        raise _damaged(path, f"{found} bytes of tensor data found, {expected} expected")


def _damaged(path, fault):
    return MindSigmaError(f"{path}: damaged safetensors file: {fault}; copy or download it again")

"""Streaming writer of one `.safetensors` file, replaced whole or not at all."""

import json

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import map_file
from mindsigma.weights.formats.atomic import replacing
from mindsigma.weights.formats.safetensors_file import DTYPES, MAX_HEADER, read_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec, checked_specs, checksum, fetch, pieces, write_pieces

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(path, specs, read, metadata=None, progress=None):
    """Write the tensors `specs` announces into the file `path` (Path); returns dict name -> CRC-32 of its bytes.

    `specs`: iterable of TensorSpec. `read(name)`: called once a tensor, gives the array, contiguous or strided, of
    exactly that dtype and shape; none is kept. `metadata`: dict[str, str] of the header. `progress(bytes)` is called
    after every piece of at most 64 MB. The file lists, holds and asks for the tensors by falling item size, else in the
    order of `specs`, so that all are aligned; MindSpore wants the header in the order of the data.
    Raises MindSigmaError for a tensor unlike its spec and where the file cannot be written; `path` is then untouched.
    """
    specs, header = check_safetensors(path, specs, metadata)
    crcs = {}
    with replacing(path) as file:
        file.write(header)
        for spec in _by_alignment(specs):
            array = fetch(path, spec, read)
            crcs[spec.name] = write_pieces(file, pieces(array), progress)
    return {spec.name: crcs[spec.name] for spec in specs}


def safetensors_pieces(path, tensors, metadata=None):
    """list of the bytes and arrays that write_safetensors makes a file of; tensors: dict name -> array."""
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    specs, header = check_safetensors(path, specs, metadata)
    return [header, *(np.ascontiguousarray(tensors[spec.name]).data for spec in _by_alignment(specs))]


def written_crcs(path, specs, metadata=None, progress=None):
    """What write_safetensors returned, where `path` already is the file it would write: header and size as they must.

    Else None. The data themselves are read for their checksums but cannot be compared with anything: `metadata` has to
    tell one source from another.
    """
    specs, header = check_safetensors(path, specs, metadata)
    size = len(header) + sum(spec.nbytes for spec in specs)
    if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
        return None
    if map_file(path)[: len(header)].tobytes() != header:
        return None
    return {name: checksum(array, progress) for name, array in read_safetensors(path)[0].items()}


def check_safetensors(path, specs, metadata=None):
    """(specs, header) as they are written; raises what write_safetensors refuses before it begins."""
    specs = checked_specs(path, specs, NAMES, "safetensors")
    return specs, safetensors_header(path, specs, metadata)


def safetensors_header(path, specs, metadata):
    """The first bytes of the file: the header's length, the header, blanks up to a multiple of 8 bytes."""
    table = {}
    if metadata:
        wrong = [key for pair in metadata.items() for key in pair if not isinstance(key, str)]
        if wrong:
            raise MindSigmaError(f"{path}: safetensors metadata are texts, not {type(wrong[0]).__name__}")
        table["__metadata__"] = dict(metadata)
    end = 0
    for spec in _by_alignment(specs):
        if spec.name == "__metadata__":
            raise MindSigmaError(f"{path}: a safetensors file can hold no tensor named __metadata__; rename it")
        begin, end = end, end + spec.nbytes
        table[spec.name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise MindSigmaError(f"{path}: {len(text)} bytes of header are more than the {MAX_HEADER} that are read again")
    return len(text).to_bytes(8, "little") + text


def _by_alignment(specs):
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)

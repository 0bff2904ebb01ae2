"""Streaming writer of PyTorch's zip files (`.pth`), which `torch.load(weights_only=True)` reads; no PyTorch needed."""

import pickle
import struct
import zipfile

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.atomic import replacing
from mindsigma.weights.formats.tensor_stream import checked_specs, fetch, pieces
from mindsigma.weights.formats.torch_file import STORAGES

STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
ALIGNMENT = 64  # bytes, of every member's data, as torch.save has it
MAX_DEPTH = 20  # of lists and dicts beside the state dict
ZIP64_FROM = 2**30  # bytes; below the 2 GB where zipfile begins to ask for it
EMPTY_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_torch(path, specs, read, extra=None, progress=None, flat=False):
    """Write `{"state_dict": OrderedDict, **extra}`, or the bare OrderedDict if `flat`, as torch.save would.

    Returns dict name -> CRC-32 of its bytes. `path` is a Path; `specs`, `read` and `progress` are those of
    write_safetensors; every tensor is contiguous, on the CPU, with a storage of its own. `extra`: dict of numbers,
    texts, bools, None, and lists, tuples and dicts of these.
    Raises MindSigmaError for a dtype torch lacks, a value in `extra` that is none of these, and as write_safetensors.
    """
    specs, program = check_torch(path, specs, extra, flat)
    crcs = {}
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write_member(file, archive, "data.pkl", [program], len(program))
        _write_member(file, archive, "byteorder", [b"little"], 6)
        for key, spec in enumerate(specs):
            array = fetch(path, spec, read)
            crcs[spec.name] = _write_member(file, archive, f"data/{key}", pieces(array), spec.nbytes, progress)
        _write_member(file, archive, "version", [b"3\n"], 2)
    return crcs


def check_torch(path, specs, extra=None, flat=False):
    """(specs, pickle) as they are written; raises what write_torch refuses before it begins."""
    specs = checked_specs(path, specs, STORAGE_NAMES, "PyTorch")
    if flat and extra:
        raise MindSigmaError(f"{path}: a bare state dict has no place for {', '.join(map(one_line, extra))}")
    if extra and "state_dict" in extra:
        raise MindSigmaError(f"{path}: what stands beside the state dict cannot be named state_dict")
    return specs, _program(path, specs, extra or {}, flat)


def _write_member(file, archive, name, content, size, progress=None):
    """Store a member with its data aligned by a field of padding in the local header; returns its CRC-32."""
    info = zipfile.ZipInfo(f"archive/{name}")
    zip64 = size >= ZIP64_FROM
    start = file.tell() + 30 + len(info.filename) + 20 * zip64 + 4
    padding = -start % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=zip64) as member:
        for piece in content:
            member.write(piece)
            if progress:
                progress(len(piece))
    info.extra = b""  # not repeated in the directory
    return info.CRC


def _program(path, specs, extra, flat):
    """The pickle, protocol 2: one opcode after the other, without a memo."""
    tensors = b"".join(_text(spec.name) + _tensor(key, spec) for key, spec in enumerate(specs))
    state_dict = EMPTY_ORDERED_DICT + b"(" + tensors + b"u"
    if not flat:
        beside = b"".join(_text(key) + _plain(path, key, value) for key, value in extra.items())
        state_dict = b"}(" + _text("state_dict") + state_dict + beside + b"u"
    return b"\x80\x02" + state_dict + b"."


def _tensor(key, spec):
    """A call of torch._utils._rebuild_tensor_v2 on the storage `key`."""
    strides, step = [], 1  # in elements
    for size in reversed(spec.shape):
        strides.insert(0, step)
        step *= max(size, 1)
    module, _, name = STORAGE_NAMES[spec.dtype].rpartition(".")
    count = spec.nbytes // spec.dtype.itemsize
    storage = b"(" + _text("storage") + f"c{module}\n{name}\n".encode() + _text(str(key)) + _text("cpu") + _int(count)
    view = b"K\x00(" + b"".join(map(_int, spec.shape)) + b"t(" + b"".join(map(_int, strides)) + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"tQ" + view + b"\x89" + EMPTY_ORDERED_DICT + b"tR"


def _text(text):
    encoded = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(number):
    return pickle.dumps(number, protocol=2)[2:-1]


def _plain(path, key, value, depth=0):
    """Opcodes of a value beside the state dict."""
    if depth > MAX_DEPTH:
        raise MindSigmaError(f"{path}: '{one_line(key)}' is nested more than {MAX_DEPTH} deep; leave it out")
    if type(value) in (list, tuple):
        items = b"".join(_plain(path, key, item, depth + 1) for item in value)
        return b"](" + items + b"e" if type(value) is list else b"(" + items + b"t"
    if type(value) is dict and all(type(k) in (str, int) for k in value):
        items = (item for pair in value.items() for item in pair)
        return b"}(" + b"".join(_plain(path, key, item, depth + 1) for item in items) + b"u"
    if type(value) is str:
        return _text(value)
    if value is None or type(value) in (bool, float) or (type(value) is int and abs(value) < 2**63):
        return pickle.dumps(value, protocol=2)[2:-1]
    raise MindSigmaError(f"{path}: '{one_line(key)}' is more than numbers, texts, lists and dicts; leave it out")

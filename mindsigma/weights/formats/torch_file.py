"""Memory-mapped reader of PyTorch's zip files (`.pth`, `.pt`, `.bin`, `.ckpt`): no PyTorch, no pickle is run.

The pickle inside is a program. It is interpreted here by hand: of all it may name, only the few globals below mean
something, and what they mean is written in this file; every other name ends the reading.
"""

import pickletools
import struct
import warnings
import zipfile
import zlib

import ml_dtypes
import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import map_file
from mindsigma.weights.formats.safetensors_file import byte_length

MAX_PICKLE = 64 * 2**20  # bytes; a state dict takes about a hundred per tensor
MAX_OPCODES = 4_000_000  # bounds the stack and the memo as well: no opcode adds more than one item to either
MAX_EXPANDED = 2**24  # elements an expanded view (stride 0) may have beyond those stored

STORAGES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype(np.bool_),
}
# What torch has no storage class for is saved as plain bytes, its dtype beside them.
BYTES = "torch.storage.UntypedStorage"
NEW_DTYPES = {
    "torch.float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch.float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "torch.float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "torch.float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "torch.float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "torch.uint16": np.dtype("<u2"),
    "torch.uint32": np.dtype("<u4"),
    "torch.uint64": np.dtype("<u8"),
}
FLOATS, INTS = ("float64", "float32", "float16", "bfloat16"), ("int64", "int32", "int16", "int8", "uint8", "bool")
TORCH_DTYPES = {f"torch.{name}" for name in FLOATS + INTS} | set(NEW_DTYPES)
CALLABLES = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch._utils._rebuild_parameter",
}

# opcodes that push their own argument, a new value, or a tuple of the topmost items
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINBYTES", "BINBYTES"}
LITERALS |= {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
MAKERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
MAKERS |= {"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_torch(path):
    """Map the tensors of a PyTorch zip file.

    Returns the saved object as nested dict, list, tuple, number, str, bytes, bool and None; a tensor is a read-only
    array view of the mapped file, strided as it was saved, bfloat16 as `ml_dtypes.bfloat16`; a torch.dtype is its name.
    Raises MindSigmaError where the archive is damaged, a member is compressed or encrypted, a view leaves its storage,
    or the pickle refers to anything but tensors and plain containers.
    """
    members = _Members(path)
    order = members.content("byteorder")
    if order not in (None, b"little"):
        raise MindSigmaError(
            f"{path}: byte order is '{one_line(order.decode('latin-1'), 20)}', not little; save it again as safetensors"
        )
    return Interpreter(path, members).run(members.content("data.pkl"))


class _Members:
    """The members of the archive, located in the mapped file."""

    def __init__(self, path):
        self.path = path
        self.data = map_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                infos, directory = archive.infolist(), archive.start_dir
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, OSError) as error:
            raise self.damaged("truncated, or its zip directory is damaged") from error
        infos.sort(key=lambda info: info.header_offset)
        ends = [info.header_offset for info in infos[1:]] + [directory]
        self.spans = {}  # member name -> (begin, end, CRC-32) in the file
        for info, end in zip(infos, ends):
            if info.filename in self.spans:
                raise self.damaged(f"two members are named {one_line(info.filename)}")
            self.spans[info.filename] = (*self._locate(info, end), info.CRC)
        roots = [name[: -len("data.pkl")] for name in self.spans if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(roots) != 1:
            raise MindSigmaError(f"{path}: a zip file, but not one of torch.save: it holds {len(roots)} data.pkl")
        self.root = roots[0]

    def _locate(self, info, limit):
        """Where the bytes of a stored member are, (begin, end); they must reach to `limit` and not beyond."""
        name = one_line(info.filename)
        if info.flag_bits & 0x2041:  # encrypted; strongly; with a masked directory
            raise MindSigmaError(f"{self.path}: member {name} is encrypted; save it again with torch.save")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise MindSigmaError(f"{self.path}: member {name} is compressed; save it again with torch.save")
        at = info.header_offset
        local = self.data[at : at + 30].tobytes() if at >= 0 else b""
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise self.damaged(f"member {name} is not where the zip directory says")
        flags, method, name_length, extra_length = struct.unpack("<2xHH16xHH", local[4:])
        stored_name = self.data[at + 30 : at + 30 + name_length].tobytes()
        listed_name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
        if flags & 0x2041 or method != zipfile.ZIP_STORED or stored_name != listed_name:
            raise self.damaged(f"member {name} differs from the zip directory")
        begin = at + 30 + name_length + extra_length
        end = begin + info.file_size
        if end > limit:
            raise self.damaged(f"member {name} overlaps what follows it or leaves the file")
        # torch.save leaves no gap but a data descriptor; a gap means that `begin` is not to be believed
        gap = self.data[end:limit].tobytes() if limit - end in (0, 16, 24) else b"?"
        if gap and gap[:4] != b"PK\x07\x08":
            raise self.damaged(f"member {name} does not end where the next begins")
        return begin, end

    def content(self, name):
        """The bytes of a member other than a storage, or None where it is absent."""
        if self.root + name not in self.spans:
            return None
        begin, end, crc = self.spans[self.root + name]
        if end - begin > MAX_PICKLE:
            raise MindSigmaError(
                f"{self.path}: {name} has {end - begin} bytes, over the limit of {MAX_PICKLE}; "
                "save the state dict alone, or as safetensors"
            )
        content = self.data[begin:end].tobytes()
        if crc and zlib.crc32(content) != crc:  # 0: saved with torch.serialization.set_crc32_options(False)
            raise self.damaged(f"{name} does not match its checksum")
        return content

    def storage(self, key, dtype, count):
        """The `count` elements of storage `key` as a flat array (count,)."""
        span = self.spans.get(f"{self.root}data/{key}")
        if span is None:
            raise self.damaged(f"storage {one_line(key)} is absent")
        begin, end, _ = span
        if byte_length(dtype, (count,)) != end - begin:
            raise self.damaged(f"storage {one_line(key)} has {end - begin} bytes where {count} x {dtype} is expected")
        return self.data[begin:end].view(dtype)

    def damaged(self, fault):
        return MindSigmaError(f"{self.path}: damaged PyTorch file: {fault}; copy or download it again")


class NamedGlobal:
    """A name the pickle refers to, standing for itself only."""

    def __init__(self, name):
        self.name = name


class Interpreter:
    """The opcodes torch.save writes (pickle protocols 2 to 5), over plain containers and the globals above.

    Nothing here walks a nested value, so neither depth nor a value shared many times costs anything.
    """

    def __init__(self, path, members):
        self.path, self.members = path, members
        self.stack, self.below, self.memo = [], [], {}  # `below`: the stacks set aside by each MARK

    def run(self, pickle):
        """The object that the bytes of a pickle make."""
        try:
            return self._run(pickle)
        except MindSigmaError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
            raise self.members.damaged("its pickle is malformed") from error

    def _run(self, pickle):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pickletools warns of a backslash in a name
            for count, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
                if count > MAX_OPCODES:
                    raise MindSigmaError(f"{self.path}: its pickle is too long; save the state dict alone")
                if opcode.name != "STOP":
                    self._step(opcode.name, arg)
        (result,) = self.stack
        return result

    def _step(self, name, arg):
        stack = self.stack
        if name in LITERALS:
            stack.append(arg)
        elif name in MAKERS:
            stack.append(MAKERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name == "TUPLE":
            items = self._since_mark()
            self.stack.append(tuple(items))
        elif name in TUPLES:
            self._push_tuple(TUPLES[name])
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._set_items(items)
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            self._require(type(self.stack[-1]) is list)
            self.stack[-1].extend(items)
        elif name == "GLOBAL":
            stack.append(self._global(arg.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            self._require(type(attribute) is str and type(module) is str)  # to print another value may take forever
            stack.append(self._global(f"{module}.{attribute}"))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name == "REDUCE":
            args, function = stack.pop(), stack.pop()
            stack.append(self._call(function, args))
        elif name == "BUILD":  # the `_metadata` attribute of a state dict
            state = stack.pop()
            self._require(type(state) is dict and type(stack[-1]) is dict)
        elif name not in ("PROTO", "FRAME"):
            raise MindSigmaError(
                f"{self.path}: refuses the pickle's instruction {name}, which torch.save does not write for tensors; "
                "convert it to safetensors where you trust it"
            )

    def _since_mark(self):
        items, self.stack = self.stack, self.below.pop()
        return items

    def _push_tuple(self, count):
        self._require(len(self.stack) >= count)
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _set_items(self, items):
        target, keys = self.stack[-1], items[::2]
        self._require(type(target) is dict and len(items) % 2 == 0)
        # a tuple for a key would be hashed, to any depth, on the C stack
        self._require(all(isinstance(key, (str, int)) for key in keys))
        for value in items[1::2]:
            if type(value) is NamedGlobal:  # known, but of no use as a value
                raise self._refused(value.name)
        target.update(zip(keys, items[1::2]))

    def _global(self, name):
        if name in TORCH_DTYPES:
            return name
        if name not in CALLABLES and name not in STORAGES and name != BYTES:
            raise self._refused(name)
        return NamedGlobal(name)

    def _refused(self, name):
        return MindSigmaError(
            f"refuses the pickle's reference to {one_line(name)} in {self.path}; "
            "convert it to safetensors where you trust it"
        )

    def _call(self, function, args):
        self._require(type(function) is NamedGlobal and function.name in CALLABLES and type(args) is tuple)
        if function.name == "collections.OrderedDict":
            self._require(args == ())
            return {}
        if function.name == "torch.Size":
            self._require(len(args) == 1 and type(args[0]) is tuple)
            return args[0]
        if function.name == "torch._utils._rebuild_parameter":
            self._require(len(args) == 3 and isinstance(args[0], np.ndarray))
            return args[0]
        if function.name == "torch._utils._rebuild_tensor_v3":
            self._require(len(args) in (7, 8) and type(args[0]) is Storage and args[0].untyped)
            self._require(type(args[6]) is str and args[6] in NEW_DTYPES)
            return self._view(args[0].seen_as(NEW_DTYPES[args[6]], self._require), *args[1:4])
        self._require(len(args) in (6, 7) and type(args[0]) is Storage and not args[0].untyped)
        return self._view(*args[:4])

    def _storage(self, reference):
        self._require(type(reference) is tuple and len(reference) == 5)
        tag, kind, key, _, count = reference  # the fourth is the device it was saved from
        self._require(type(tag) is str and tag == "storage" and type(key) is str and type(count) is int)
        self._require(type(kind) is NamedGlobal and (kind.name in STORAGES or kind.name == BYTES))
        dtype = STORAGES.get(kind.name, np.dtype(np.uint8))
        return Storage(key, self._stored(key, dtype, count), kind.name == BYTES)

    def _stored(self, key, dtype, count):
        return self.members.storage(key, dtype, count)

    def _view(self, storage, offset, shape, strides):
        """A tensor over its storage: shape and strides in elements, as torch counts them."""
        self._require(type(offset) is int)
        self._require(type(shape) is tuple and type(strides) is tuple and len(shape) == len(strides))
        flat = storage.flat  # (stored elements,)
        size = byte_length(flat.dtype, shape)
        where = f"a tensor of storage {one_line(storage.key)}"
        if size is None or offset < 0 or not all(type(step) is int and step >= 0 for step in strides):
            raise self.members.damaged(f"{where} has an impossible offset {one_line(offset, 40)}, shape or stride")
        if size == 0:
            return _strided(flat[:0], shape, [0] * len(shape))
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides))
        if last >= flat.size:
            raise self.members.damaged(f"{where} reaches element {one_line(last, 40)} of {flat.size}")
        if size // flat.itemsize > flat.size + MAX_EXPANDED:
            raise self.members.damaged(f"{where} spreads {flat.size} elements over {size // flat.itemsize}")
        byte_strides = [step * flat.itemsize if n > 1 else 0 for n, step in zip(shape, strides)]
        return _strided(flat[offset:], shape, byte_strides)

    def _require(self, condition):
        if not condition:
            raise self.members.damaged("its pickle is malformed")


def _strided(flat, shape, strides):
    # As integers: NumPy's function does not know the dtypes of ml_dtypes.
    plain = flat.view(f"u{flat.itemsize}")
    return np.lib.stride_tricks.as_strided(plain, shape, strides, writeable=False).view(flat.dtype)


class Storage:
    """The flat elements of a storage, which tensors are views of."""

    def __init__(self, key, flat, untyped=False):
        self.key, self.flat, self.untyped = key, flat, untyped

    def seen_as(self, dtype, require):
        require(self.flat.size % dtype.itemsize == 0)
        return Storage(self.key, self.flat.view(dtype))

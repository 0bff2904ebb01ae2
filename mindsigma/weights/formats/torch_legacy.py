"""Memory-mapped reader of what torch.save wrote before PyTorch 1.6: pickles one behind the other, then the storages.

Weights of old projects are such files, among them those of pytorch-fid and, by Python 2, of lpips. The pickles are
interpreted as `torch_file.py` does it: nothing is run.
"""

import io
import pickletools
import struct

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import map_file
from mindsigma.weights.formats.safetensors_file import byte_length
from mindsigma.weights.formats.torch_file import MAX_OPCODES, MAX_PICKLE, Interpreter, NamedGlobal, Storage

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the first pickle: the number 0x1950a86a20f9469cfc6c
PROTOCOL = 1001
MAX_STORAGES = 2**18
REBUILD_BEFORE_0_4 = "torch._utils._rebuild_tensor"


def is_legacy(head):
    """Whether the first bytes of a file are those of such a file."""
    return head.startswith(MAGIC)


def read_torch_legacy(path):
    """Map the tensors of a file; returns and raises what `torch_file.read_torch` does."""
    file = _File(path)
    file.next_pickle()  # the magic number
    version, info = (_Old(path, file).run(file.next_pickle()) for _ in range(2))
    if version != PROTOCOL or not isinstance(info, dict) or info.get("little_endian") is not True:
        raise MindSigmaError(f"{path}: of protocol {one_line(version, 40)} or byte order unknown; save it again")
    saved, keys = file.next_pickle(), _Old(path, file).run(file.next_pickle())
    survey = _Survey(path, file)
    survey.run(saved)
    file.locate(keys, survey.seen)
    return _Reader(path, file).run(saved)


class _File:
    """The pickles of the file in turn, then its storages by key; stands for the members of a zip file."""

    def __init__(self, path):
        self.path, self.data = path, map_file(path)
        self._pickles = io.BytesIO(self.data[:MAX_PICKLE].tobytes())
        self._storages = {}

    def next_pickle(self):
        """Bytes of the next pickle, up to its end."""
        start = self._pickles.tell()
        try:
            for count, _ in enumerate(pickletools.genops(self._pickles)):
                if count > MAX_OPCODES:
                    raise MindSigmaError(f"{self.path}: its pickle is too long; save the state dict alone")
        except (ValueError, IndexError, OverflowError, struct.error) as error:
            raise self.damaged("its pickle is malformed, or cut off") from error
        return self._pickles.getvalue()[start : self._pickles.tell()]

    def locate(self, keys, seen):
        """Find the storages, which follow in the order of their keys: eight bytes of their length, then the elements.

        Args:
            keys: list of texts.
            seen: dict key -> (dtype, elements) of those that tensors refer to.
        """
        texts = isinstance(keys, list) and len(keys) <= MAX_STORAGES and all(type(key) is str for key in keys)
        if not texts or set(keys) != set(seen):
            raise self.damaged("its list of storages is not that of its tensors")
        at = self._pickles.tell()
        for key in keys:
            dtype, count = seen[key]
            size = byte_length(dtype, (count,))
            stored = self.data[at : at + 8].tobytes()
            if len(stored) < 8 or size is None or int.from_bytes(stored, "little") != count:
                raise self.damaged(f"storage {one_line(key)} has not the length that its tensors tell")
            if at + 8 + size > self.data.size:
                raise self.damaged(f"storage {one_line(key)} is cut off")
            self._storages[key] = at + 8
            at += 8 + size

    def storage(self, key, dtype, count):
        """The `count` elements of storage `key` as a flat array (count,)."""
        begin = self._storages[key]
        return self.data[begin : begin + byte_length(dtype, (count,))].view(dtype)

    def damaged(self, fault):
        """A MindSigmaError about the file."""
        return MindSigmaError(f"{self.path}: damaged PyTorch file: {fault}; copy or download it again")


class _Old(Interpreter):
    """What Python 2 wrote, too: texts as strings of bytes, the pairs of an OrderedDict as a list that it is made of."""

    def _step(self, name, arg):
        if name in ("SHORT_BINSTRING", "BINSTRING"):
            self._require(arg.isascii())
            self.stack.append(arg)
        else:
            super()._step(name, arg)

    def _global(self, name):
        return NamedGlobal(name) if name == REBUILD_BEFORE_0_4 else super()._global(name)

    def _call(self, function, args):
        known = type(function) is NamedGlobal and type(args) is tuple
        if known and function.name == REBUILD_BEFORE_0_4:
            self._require(len(args) == 4)
            return self._view(*args)
        if known and function.name == "collections.OrderedDict" and args != ():
            self._require(len(args) == 1 and type(args[0]) is list)
            self._require(all(type(pair) is list and len(pair) == 2 for pair in args[0]))
            self.stack.append({})
            self._set_items([item for pair in args[0] for item in pair])
            return self.stack.pop()
        return super()._call(function, args)

    def _view(self, storage, offset, shape, strides):
        self._require(type(storage) is Storage)
        return super()._view(storage, offset, shape, strides)


class _Reader(_Old):
    """References have a sixth part, which tells views of storages, written by none since 0.4."""

    def _storage(self, reference):
        self._require(type(reference) is tuple and len(reference) == 6 and reference[5] is None)
        return super()._storage(reference[:5])


class _Survey(_Reader):
    """Learns which storages there are, of what dtype and length, and makes no tensor."""

    def __init__(self, path, members):
        super().__init__(path, members)
        self.seen = {}

    def _stored(self, key, dtype, count):
        self._require(self.seen.setdefault(key, (dtype, count)) == (dtype, count))
        return np.zeros(0, dtype)

    def _view(self, storage, offset, shape, strides):
        self._require(type(storage) is Storage)
        return np.zeros(0)

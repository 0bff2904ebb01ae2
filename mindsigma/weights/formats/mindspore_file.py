"""Memory-mapped reader of MindSpore's `.ckpt` files that believes nothing they say; no protobuf is needed.

The file is the protobuf message Checkpoint of mindspore/ccsrc/utils/checkpoint.proto:
`Checkpoint { repeated Value value = 1 }`,
`Value { string tag = 1; TensorProto tensor = 2; MapTensorProto maptensor = 3 }`,
`TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3 }`.
A tensor of more than 512 MB is cut into Values of the same tag, each with the dims of the whole.
"""

import ml_dtypes
import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import map_file
from mindsigma.weights.formats.safetensors_file import MAX_RANK, byte_length

MAX_VALUES = 2**16
MAX_TEXT = 2**20  # bytes of a tag, or of a text saved beside the tensors
CRC_MARK, CRC_LENGTH = b"crc_num", 17  # what save_checkpoint(crc_check=True) appends: the mark and 10 bytes

TYPES = {
    "Float64": np.dtype("<f8"),
    "Float32": np.dtype("<f4"),
    "Float16": np.dtype("<f2"),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Int64": np.dtype("<i8"),
    "Int32": np.dtype("<i4"),
    "Int16": np.dtype("<i2"),
    "Int8": np.dtype("i1"),
    "UInt64": np.dtype("<u8"),
    "UInt32": np.dtype("<u4"),
    "UInt16": np.dtype("<u2"),
    "UInt8": np.dtype("u1"),
    "Bool": np.dtype(np.bool_),
}


class SlicedTensor:
    """A tensor stored in several pieces: `shape`, `dtype`, and `numpy.asarray` to put it together, read-only."""

    def __init__(self, dtype, shape, slices):
        self.dtype, self.shape = dtype, shape
        self._slices = slices  # uint8 arrays mapped from the file

    def __array__(self, dtype=None, copy=None):
        whole = np.empty(self.shape, self.dtype)
        np.concatenate(self._slices, out=whole.reshape(-1).view(np.uint8))
        whole.flags.writeable = False
        return whole if dtype is None else whole.astype(dtype, copy=False)


def read_mindspore_ckpt(path):
    """Map the tensors of a `.ckpt` file (Path).

    Returns `(tensors, metadata)`: name -> read-only array view of the mapped file, or a SlicedTensor, in the order of
    the file; and dict[str, str] of the texts saved beside them (numbers saved beside them are scalar tensors). The
    views are not necessarily aligned; bfloat16 is `ml_dtypes.bfloat16`. A checksum at the end is not verified.
    Raises MindSigmaError for a damaged file, a type it does not know, and a MapParameter.
    """
    return _Reader(path).read()


class _Reader:
    def __init__(self, path):
        self.path = path
        self.data = map_file(path)
        self.bytes = memoryview(self.data)

    def read(self):
        found, last = {}, None  # tag -> (type, dims, list of the (begin, end) of its contents)
        for tag, kind, dims, span in self._values():
            if tag in found and (tag != last or found[tag][:2] != (kind, dims)):
                raise self.damaged(f"two values are named '{one_line(tag)}'")
            found.setdefault(tag, (kind, dims, []))[2].append(span)
            last = tag
        texts = {tag: self._text(tag, spans) for tag, (kind, _, spans) in found.items() if kind == "str"}
        tensors = {tag: self._tensor(tag, *value) for tag, value in found.items() if tag not in texts}
        if not tensors:
            raise MindSigmaError(f"{self.path}: a MindSpore checkpoint without a tensor; save the network's parameters")
        return tensors, texts

    def _values(self):
        """Yield (tag, type, dims, span of the content) of every Value."""
        position, size, count = 0, len(self.bytes), 0
        while position < size:
            if size - position == CRC_LENGTH and self.bytes[position : position + len(CRC_MARK)] == CRC_MARK:
                return
            number, span, position = self._field(position, size)
            count += 1
            if number != 1 or type(span) is not tuple:
                raise self.damaged(f"field {number} where a value is expected")
            if count > MAX_VALUES:
                raise MindSigmaError(f"{self.path}: holds more than {MAX_VALUES} values; save the weights alone")
            yield self._value(span)

    def _value(self, span):
        parts = self._once(span, {1: "tag", 2: "tensor", 3: "maptensor"})
        tag = self._decoded(parts.get("tag"), "utf-8")
        if "maptensor" in parts:
            raise MindSigmaError(f"{self.path}: '{one_line(tag)}' is a MapParameter, which is not read; leave it out")
        if "tensor" not in parts:
            raise self.damaged(f"'{one_line(tag)}' has no tensor")
        parts, dims = self._once(parts["tensor"], {2: "tensor_type", 3: "tensor_content"}, repeated=1)
        if "tensor_content" not in parts:
            raise self.damaged(f"tensor '{one_line(tag)}' has no content")
        return tag, self._decoded(parts.get("tensor_type"), "ascii"), dims, parts["tensor_content"]

    def _once(self, span, names, repeated=None):
        """Spans of the fields of a message by name, none twice; with them, if wanted, the numbers of one repeated."""
        parts, numbers = {}, []
        position, end = span
        while position < end:
            number, value, position = self._field(position, end)
            if number == repeated:
                numbers += self._packed(*value) if type(value) is tuple else [value]
                if len(numbers) > MAX_RANK:
                    raise self.damaged(f"a tensor of more than {MAX_RANK} dimensions")
            elif number not in names or names[number] in parts or type(value) is not tuple:
                raise self.damaged(f"field {number} is unknown, or comes twice")
            else:
                parts[names[number]] = value
        return parts if repeated is None else (parts, tuple(numbers))

    def _packed(self, position, end):
        numbers = []
        while position < end and len(numbers) <= MAX_RANK:
            number, position = self._varint(position, end)
            numbers.append(number)
        return numbers

    def _field(self, position, end):
        """(number, value, position of the next): the value is an int, or the (begin, end) of bytes."""
        key, position = self._varint(position, end)
        value, position = self._varint(position, end)
        if key & 7 == 0:
            return key >> 3, value, position
        if key & 7 != 2:
            raise self.damaged(f"a field of wire type {key & 7}")
        if value > end - position:
            raise self.damaged(f"truncated: {value} bytes are expected where {end - position} are left")
        return key >> 3, (position, position + value), position + value

    def _varint(self, position, end):
        number = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise self.damaged("truncated within a number")
            byte = self.bytes[position]
            position += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number, position
        raise self.damaged("a number of more than 10 bytes")

    def _decoded(self, span, encoding):
        begin, end = span or (0, 0)
        if not 0 < end - begin <= MAX_TEXT:
            raise self.damaged(f"a tag or type of {end - begin} bytes")
        try:
            return self.bytes[begin:end].tobytes().decode(encoding)
        except UnicodeDecodeError as error:
            raise self.damaged(f"a tag or type that is not {encoding}") from error

    def _text(self, tag, spans):
        """A text saved by append_dict: NumPy's unicode array of one item."""
        if sum(end - begin for begin, end in spans) > MAX_TEXT:
            raise self.damaged(f"the text '{one_line(tag)}' has over {MAX_TEXT} bytes")
        content = b"".join(self.bytes[begin:end].tobytes() for begin, end in spans)
        try:
            return content.decode("utf-32-le").rstrip("\0")
        except UnicodeDecodeError as error:
            raise self.damaged(f"the text '{one_line(tag)}' is not UTF-32") from error

    def _tensor(self, tag, kind, dims, spans):
        where = f"tensor '{one_line(tag)}'"
        dtype = TYPES.get(kind)
        if dtype is None:
            raise MindSigmaError(
                f"{self.path}: {where} has the unknown type {one_line(kind, 40)}; "
                f"convert it to one of {', '.join(TYPES)}"
            )
        found = sum(end - begin for begin, end in spans)
        if dims == (0,) and found:  # a scalar of older versions
            dims = ()
        expected = byte_length(dtype, dims)
        if expected is None:
            raise self.damaged(f"{where} has the impossible shape {one_line(dims, 80)}")
        if found != expected:
            raise self.damaged(f"{where} has {found} bytes where its shape and type need {expected}")
        slices = [self.data[begin:end] for begin, end in spans]
        return slices[0].view(dtype).reshape(dims) if len(slices) == 1 else SlicedTensor(dtype, dims, slices)

    def damaged(self, fault):
        return MindSigmaError(f"{self.path}: damaged MindSpore checkpoint: {fault}; copy or download it again")

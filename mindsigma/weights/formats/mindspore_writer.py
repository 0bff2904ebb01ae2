"""Streaming writer of MindSpore's `.ckpt` files, which mindspore.load_checkpoint reads; no protobuf is needed."""

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.atomic import replacing
from mindsigma.weights.formats.mindspore_file import TYPES
from mindsigma.weights.formats.tensor_stream import checked_specs, fetch, pieces, write_pieces

TYPE_NAMES = {dtype: name for name, dtype in TYPES.items()}
SLICE = 512 * 2**20  # bytes of content in one Value, as save_checkpoint has it


def write_mindspore_ckpt(path, specs, read, texts=None, progress=None):
    """Write a `.ckpt` that mindspore.load_checkpoint reads; returns dict name -> CRC-32 of its bytes.

    `path` is a Path; `specs`, `read` and `progress` are those of write_safetensors. `texts`: dict[str, str] to stand
    behind the tensors, as save_checkpoint's append_dict has them: load_checkpoint gives them back as str, and
    load_param_into_net passes over them. Raises MindSigmaError for a dtype or a shape MindSpore cannot read from such a
    file, and as write_safetensors does.
    """
    specs, texts = check_mindspore_ckpt(path, specs, texts)
    crcs = {}
    with replacing(path) as file:
        for spec in specs:
            array = fetch(path, spec, read)
            crcs[spec.name] = write_pieces(_Values(file, spec), pieces(array), progress)
            if not spec.nbytes:
                file.write(_value_head(spec, 0))
        for name, text in texts.items():
            file.write(_text_value(name, text))
    return crcs


def check_mindspore_ckpt(path, specs, texts=None):
    """(specs, texts) as they are written; raises what write_mindspore_ckpt refuses before it begins."""
    specs = checked_specs(path, specs, TYPE_NAMES, "MindSpore .ckpt")
    for spec in specs:
        if spec.shape == (0,):  # load_checkpoint takes it for a scalar
            raise MindSigmaError(f"{path}: tensor '{one_line(spec.name)}' has shape (0,), which .ckpt cannot hold")
    texts = texts or {}
    for name in texts:
        if name in {spec.name for spec in specs}:
            raise MindSigmaError(f"{path}: the text '{one_line(name)}' is called as a tensor is; rename one of the two")
    return specs, texts


class _Values:
    """Takes the bytes of one tensor and puts the head of a Value before each slice of them."""

    def __init__(self, file, spec):
        self.file, self.spec = file, spec
        self.left, self.room = spec.nbytes, 0

    def write(self, piece):
        data = memoryview(piece)
        while len(data):
            if self.room == 0:
                self.room = min(self.left, SLICE)
                self.file.write(_value_head(self.spec, self.room))
            count = min(len(data), self.room)
            self.file.write(data[:count])
            data = data[count:]
            self.room -= count
            self.left -= count


def _value_head(spec, count):
    """All of a Value but its `count` bytes of content."""
    tensor = b"".join(b"\x08" + _varint(size) for size in spec.shape)
    tensor += _field(2, TYPE_NAMES[spec.dtype].encode()) + b"\x1a" + _varint(count)
    value = _field(1, spec.name.encode()) + b"\x12" + _varint(len(tensor) + count) + tensor
    return b"\n" + _varint(len(value) + count) + value


def _text_value(name, text):
    """A Value that holds a text: one item of NumPy's unicode type, its dims 0 as MindSpore writes a scalar's."""
    tensor = b"\x08\x00" + _field(2, b"str") + _field(3, text.encode("utf-32-le"))
    return _field(1, _field(1, name.encode()) + _field(2, tensor))


def _field(number, content):
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number):
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)

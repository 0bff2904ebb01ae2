"""Lies in the protobuf messages of a MindSpore .ckpt."""


def varint(number):
    """A number as protobuf writes it."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    return bytes([*encoded, number])


def field(number, content):
    """A field of bytes."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def value(tag=b"x", dims=(2,), kind=b"Float32", content=bytes(8), more=b""):
    """A whole Value."""
    sizes = b"".join(b"\x08" + varint(size) for size in dims)
    return field(1, field(1, tag) + field(2, sizes + field(2, kind) + field(3, content) + more))


def _read_varint(data, at):
    number = shift = 0
    while True:
        number |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return number, at


def _values(data):
    """The encoded Values of a sound file."""
    found, at = [], 0
    while at < len(data):
        length, begin = _read_varint(data, at + 1)
        found.append(data[at : begin + length])
        at = begin + length
    return found


def _drawn(edit):
    """One drawn Value, which is not the first, replaced by the list of Values that `edit` makes of it."""

    def change(rng, data):
        values = _values(data)
        i = int(rng.integers(1, len(values)))
        values[i : i + 1] = edit(values[i])
        return b"".join(values)

    return change


def _appended(content):
    return lambda rng, data: data + content


MUTATIONS = {
    "value lost": _drawn(lambda one: []),
    "value twice": _drawn(lambda one: [one, one]),
    "value cut": _drawn(lambda one: [one[:-3]]),
    "first value alone": lambda rng, data: _values(data)[0],
    "values reversed": lambda rng, data: b"".join(_values(data)[::-1]),
    "length beyond the file": _drawn(lambda one: [b"\n" + varint(2**40) + one[2:]]),
    "length of 64 bits": _drawn(lambda one: [b"\n" + varint(2**64 - 1) + one[2:]]),
    "endless length": _drawn(lambda one: [b"\n" + b"\xff" * 30 + one[2:]]),
    "long zero": _drawn(lambda one: [b"\n" + b"\x80" * 9 + b"\0"]),
    "length 0": _drawn(lambda one: [b"\n\0" + one[2:]]),
    "other field": _drawn(lambda one: [b"\x12" + one[1:]]),
    "group": _drawn(lambda one: [b"\x0b" + one[1:]]),
    "fixed number": _drawn(lambda one: [b"\x0d" + one[1:]]),
    "field 0": _drawn(lambda one: [b"\x02" + one[1:]]),
    "huge field number": _drawn(lambda one: [varint(2**60 << 3 | 2) + one[1:]]),
    "renamed dtype": lambda rng, data: data.replace(b"Float32", b"Float16", 1),
    "unknown dtype": lambda rng, data: data.replace(b"Float32", b"Float\x1b\n", 1),
    "all wider": lambda rng, data: data.replace(b"Float32", b"Float64"),
    "unknown value": _appended(value(b"hook")),
    "far block": _appended(value(b"blocks.999999999.attn.qkv.weight")),
    "block of 5000 digits": _appended(value(b"blocks." + b"9" * 5000 + b".attn.qkv.weight")),
    "negative size": _appended(value(dims=(2**64 - 1,))),
    "absurd size": _appended(value(dims=(2**40, 2**40), content=b"")),
    "absurd and empty": _appended(value(dims=(0, 2**60, 2**60), content=b"")),
    "rank 1000": _appended(value(dims=(1,) * 1000, content=bytes(4))),
    "packed rank": _appended(value(dims=(), more=field(1, b"\x01" * 1_000_000))),
    "too much content": _appended(value(content=bytes(9))),
    "no content": _appended(field(1, field(1, b"x") + field(2, field(2, b"Float32")))),
    "no tensor": _appended(field(1, field(1, b"x"))),
    "map parameter": _appended(field(1, field(1, b"x") + field(3, b""))),
    "unknown field": _appended(value(more=field(9, b"x"))),
    "tag not UTF-8": _appended(value(b"\xff\xfe")),
    "newline in a tag": _appended(value(b"x\nerror: no")),
    "NUL in a tag": _appended(value(b"x\0")),
    "empty tag": _appended(value(b"")),
    "long tag": _appended(value(b"x" * (2**20 + 1))),
    "text": _appended(value(b"t", (0,), b"str", b"abc")),
    "stored config": _appended(value(b"config", (0,), b"str", '{"depth": 1}'.encode("utf-32-le"))),
    "stored deep config": _appended(value(b"config", (0,), b"str", ("[" * 200_000).encode("utf-32-le"))),
    "stored wrong config": _appended(
        value(b"config", (0,), b"str", '{"_class_name": "DiT", "depth": 99999999}'.encode("utf-32-le"))
    ),
    "crc mark": _appended(b"crc_num" + bytes(10)),
    "crc mark alone": lambda rng, data: b"crc_num" + bytes(10),
    "300000 values": _appended(b"".join(value(b"v%d" % i, (0, 1), content=b"") for i in range(300_000))),
    "slices unlike": _appended(value(b"s", (4,)) + value(b"s", (6,))),
    "many slices": _appended(b"".join(value(b"s", (200_000,)) for i in range(100_000))),
    "slice elsewhere": _appended(value(b"s", (4,)) + value(b"r") + value(b"s", (4,))),
}

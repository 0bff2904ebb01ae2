"""Lies in the header of a safetensors file."""

import json


def _parts(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header, rest, pad=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest + pad


def _drawn_name(rng, header):
    names = [name for name in header if name != "__metadata__"]
    return names[int(rng.integers(len(names)))]


def _entry(**changes):
    """Fields of one drawn tensor replaced; a callable makes the new value from the old."""

    def change(rng, data):
        header, rest = _parts(data)
        entry = header[_drawn_name(rng, header)]
        for key, value in changes.items():
            entry[key] = value(entry[key]) if callable(value) else value
        return _joined(header, rest)

    return change


def _header(edit):
    """The whole header replaced by `edit(rng, header)`."""

    def change(rng, data):
        header, rest = _parts(data)
        edited = edit(rng, header)
        return _joined(header if edited is None else edited, rest)

    return change


def _renamed(make):
    def edit(rng, header):
        old = _drawn_name(rng, header)
        return {make(old, header) if name == old else name: entry for name, entry in header.items()}

    return _header(edit)


def _added(name, entry):
    return _header(lambda rng, header: header.update({name: entry}))


def _length(number):
    return lambda rng, data: number.to_bytes(8, "little") + data[8:]


def _other(old, header):
    return next((name for name in header if name not in (old, "__metadata__")), f"{old} too")


def _doubled(rng, header):
    """One key of the header written twice, which no dict can hold."""
    name = _drawn_name(rng, header)
    return json.dumps(header)[:-1].encode() + b"," + json.dumps({name: header[name]})[1:].encode()


def _same_place(rng, header):
    """Two tensors of one size on the same bytes, and a hole."""
    names = [name for name in header if name != "__metadata__"]
    sizes = {}
    for name in names:
        begin, end = header[name]["data_offsets"]
        if end - begin in sizes:
            header[name]["data_offsets"] = header[sizes[end - begin]]["data_offsets"]
            return
        sizes[end - begin] = name


def _dropped(rng, header):
    del header[_drawn_name(rng, header)]


def _metadata(value):
    return _header(lambda rng, header: header.update({"__metadata__": value}))


def _texts(value):
    """Every text of the header, and those that adapters have, with this value; what names the format stays."""

    def edit(rng, header):
        texts = header.setdefault("__metadata__", {})
        texts.update(
            {key: value for key in (*texts, "lora_adapter_metadata", "config") if key not in ("format", "kind")}
        )

    return _header(edit)


def _stored_config(**changes):
    """A header that claims to be of this project, with a config of its own."""
    config = {"_class_name": "DiT", "input_size": 8, "num_heads": 1, "pe_interpolation": 0.125, **changes}
    return _metadata({"format": "mindsigma", "config": json.dumps(config)})


MUTATIONS = {
    "negative size": _entry(shape=[-1]),
    "negative sizes": _entry(shape=lambda shape: [-size for size in shape]),
    "zero size": _entry(shape=[0]),
    "absurd size": _entry(shape=[10**18]),
    "overflowing shape": _entry(shape=[2**32, 2**32]),
    "empty but overflowing": _entry(shape=[0, 2**60, 2**60]),
    "fraction": _entry(shape=[1.5]),
    "boolean": _entry(shape=[True]),
    "text for a shape": _entry(shape="72"),
    "no shape": _entry(shape=None),
    "number for a shape": _entry(shape=72),
    "rank 40": _entry(shape=lambda shape: shape + [1] * 40),
    "rank 100000": _entry(shape=[1] * 100_000),
    "axes of one": _entry(shape=lambda shape: [1, *shape]),
    "flat": _entry(shape=lambda shape: [__import__("math").prod(shape)]),
    "turned": _entry(shape=lambda shape: shape[::-1]),
    "unknown dtype": _entry(dtype="F4"),
    "other dtype": _entry(dtype="I16"),
    "wider dtype": _entry(dtype="F64"),
    "list of dtypes": _entry(dtype=["F32"]),
    "null dtype": _entry(dtype=None),
    "negative offset": _entry(data_offsets=lambda offsets: [-offsets[1], 0]),
    "offsets turned": _entry(data_offsets=lambda offsets: offsets[::-1]),
    "beyond the file": _entry(data_offsets=lambda offsets: [offset + 2**40 for offset in offsets]),
    "beyond 64 bits": _entry(data_offsets=lambda offsets: [offset + 2**70 for offset in offsets]),
    "one early": _entry(data_offsets=lambda offsets: [offset - 1 for offset in offsets]),
    "one late": _entry(data_offsets=lambda offsets: [offset + 1 for offset in offsets]),
    "three offsets": _entry(data_offsets=lambda offsets: [*offsets, 0]),
    "offsets as fractions": _entry(data_offsets=[0.0, 8.0]),
    "offsets as text": _entry(data_offsets=["0", "8"]),
    "further field": _entry(strides=[1]),
    "overlap": _header(_same_place),
    "tensor dropped": _header(_dropped),
    "doubled key": _header(_doubled),
    "entry a number": _header(lambda rng, header: header.update({_drawn_name(rng, header): 7})),
    "entry null": _header(lambda rng, header: header.update({_drawn_name(rng, header): None})),
    "unknown tensor": _added("hook", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "far block": _added("blocks.999999999.attn.qkv.weight", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "far level": _added(
        "encoder.down.99999999.block.0.norm1.weight", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    ),
    "block of 5000 digits": _added(
        f"blocks.{'9' * 5000}.attn.qkv.weight", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    ),
    "block no number": _added("blocks.x.attn.qkv.weight", {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "empty name": _renamed(lambda old, header: ""),
    "newline in a name": _renamed(lambda old, header: old + "\nerror: no"),
    "escape in a name": _renamed(lambda old, header: "\x1b[2J" + old),
    "NUL in a name": _renamed(lambda old, header: old + "\0"),
    "surrogate in a name": _renamed(lambda old, header: "\ud800" + old),
    "right to left": _renamed(lambda old, header: "\u202e" + old),
    "path for a name": _renamed(lambda old, header: "../../" + old),
    "percent in a name": _renamed(lambda old, header: old + "%s%n{0}"),
    "long name": _renamed(lambda old, header: "w" * 100_000),
    "wrapped name": _renamed(lambda old, header: "module." + _other(old, header)),
    "other digits": _renamed(lambda old, header: old.replace("0", "\u0660")),
    "metadata a text": _metadata("x"),
    "metadata of numbers": _metadata({"epoch": 3}),
    "metadata nested": _metadata({"config": {"a": 1}}),
    "texts of a surrogate": _texts("\ud800"),
    "texts of a number": _texts("3"),
    "texts of a list": _texts("[[3]]"),
    "texts that are deep": _texts("[" * 100_000),
    "texts of nothing": _texts("{}"),
    "config no JSON": _metadata({"config": "{"}),
    "config a list": _metadata({"config": "[]"}),
    "config deep": _metadata({"config": "[" * 200_000}),
    "config of 5000 digits": _metadata({"config": '{"depth": ' + "9" * 5000 + "}"}),
    "config empty key": _stored_config(**{"": 1}),
    "config unknown": _stored_config(shell="touch executed"),
    "config deep network": _stored_config(depth=10**9),
    "config wide network": _stored_config(hidden_size=72 * 10**9),
    "config of text": _stored_config(depth="2", hidden_size="72"),
    "config huge ratio": _stored_config(mlp_ratio=1e300),
    "config NaN": _stored_config(mlp_ratio=float("nan"), pe_interpolation=float("nan")),
    "config long compression": _stored_config(kv_compression="conv:2:0-999999999999"),
    "config of compression": _stored_config(kv_compression={"sampling": "conv", "factor": None, "layers": ["a"]}),
    "config large grid": _stored_config(input_size=10**6),
    "no JSON": _header(lambda rng, header: b"{'a': 1}"),
    "a list": _header(lambda rng, header: [header]),
    "an empty object": _header(lambda rng, header: {}),
    "nested deeply": _header(lambda rng, header: b'{"a":' * 100_000),
    "deep list": _header(lambda rng, header: b'{"a":' + b"[" * 500_000),
    "not UTF-8": _header(lambda rng, header: json.dumps(header).encode().replace(b"weight", b"\xff\xfe", 1)),
    "NaN": _header(lambda rng, header: json.dumps(header).encode().replace(b"[0", b"[NaN", 1)),
    "infinite": _header(lambda rng, header: json.dumps(header).encode().replace(b"[0", b"[1e999", 1)),
    "5000 digits": _header(lambda rng, header: json.dumps(header).encode().replace(b"[0", b"[" + b"9" * 5000, 1)),
    "comment": _header(lambda rng, header: json.dumps(header).encode() + b" // fine"),
    "byte order mark": _header(lambda rng, header: b"\xef\xbb\xbf" + json.dumps(header).encode()),
    "UTF-16": _header(lambda rng, header: json.dumps(header).encode("utf-16")),
    "blanks": _header(lambda rng, header: json.dumps(header).encode() + b" " * 10_000),
    "200000 tensors": _header(
        lambda rng, header: {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    ),
    "400000 empty texts": _metadata({str(i): "" for i in range(400_000)}),
    "length 0": _length(0),
    "length of all": _length(2**64 - 1),
    "length too long": _length(10**8),
    "length beyond the bound": _length(10**8 + 1),
    "length 1": _length(1),
    "more data": lambda rng, data: data + bytes(4),
    "less data": lambda rng, data: data[:-4],
}

"""Nonsense in the JSON files beside weights: config.json and the index of shards."""

import json

NUMBERS = (0, -1, 1, 3, 10**9, 10**30, 1.5, 1e999, float("nan"))
OTHERS = (None, True, "", "2", "x\ny", [], {}, [1], ["a"], {"a": 1}, [[1]], "x" * 10_000)


def _json(data):
    return json.loads(data.decode("utf-8"))


def edited(edit):
    def change(rng, data):
        table = _json(data)
        edited = edit(rng, table)
        edited = table if edited is None else edited
        return edited if isinstance(edited, bytes) else json.dumps(edited).encode()

    return change


def _drawn_key(rng, table):
    return list(table)[int(rng.integers(len(table)))]


def _one(value):
    """One drawn key with another value."""
    return edited(lambda rng, table: table.update({_drawn_key(rng, table): value}))


def _drawn_of(values):
    """One drawn key with one of the values."""
    return edited(lambda rng, table: table.update({_drawn_key(rng, table): values[int(rng.integers(len(values)))]}))


def _every(keys, value):
    """All of the keys that a config has, or could have, with the same value."""
    return edited(lambda rng, table: table.update({key: value for key in keys if key in table or key == keys[0]}))


def _dropped(rng, table):
    del table[_drawn_key(rng, table)]


def _doubled(rng, table):
    key = _drawn_key(rng, table)
    return json.dumps(table)[:-1].encode() + b"," + json.dumps({key: 1})[1:].encode()


SIZES = ("hidden_size", "num_attention_heads", "num_heads", "d_model", "norm_num_groups", "attention_head_dim")
DEPTHS = ("depth", "num_layers", "layers_per_block")
GRIDS = ("input_size", "sample_size")
SCALES = ("pe_interpolation", "interpolation_scale", "scaling_factor", "layer_norm_epsilon", "mlp_ratio")
WIDTHS = ("block_out_channels", "latent_channels", "in_channels", "caption_channels")

SYNTAX = {
    "empty object": edited(lambda rng, table: {}),
    "a list": edited(lambda rng, table: [table]),
    "a text": edited(lambda rng, table: "config"),
    "null": edited(lambda rng, table: b"null"),
    "no JSON": edited(lambda rng, table: b"{'depth': 2}"),
    "nested deeply": edited(lambda rng, table: b'{"a":' * 100_000),
    "deep list": edited(lambda rng, table: b"[" * 500_000),
    "deep but sound": edited(
        lambda rng, table: json.dumps(table)[:-1].encode() + b',"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    ),
    "doubled key": edited(_doubled),
    "5000 digits": edited(lambda rng, table: json.dumps(table)[:-1].encode() + b',"depth2":' + b"9" * 5000 + b"}"),
    "byte order mark": edited(lambda rng, table: b"\xef\xbb\xbf" + json.dumps(table).encode()),
    "UTF-16": edited(lambda rng, table: json.dumps(table).encode("utf-16")),
    "not UTF-8": edited(lambda rng, table: b'{"\xff": 1}'),
    "empty key": edited(lambda rng, table: table.update({"": 1})),
    "further key": edited(lambda rng, table: table.update({"__reduce__": "os.system"})),
    "newline in a key": edited(lambda rng, table: table.update({"x\nerror: no": "y\nz"})),
    "surrogate": edited(lambda rng, table: table.update({"\ud800": "\udfff"})),
    "key lost": edited(_dropped),
}

CONFIG = {
    **SYNTAX,
    **{f"a value {value!r:.20}": _one(value) for value in (*NUMBERS, *OTHERS)},
    **{f"any number {i}": _drawn_of(NUMBERS) for i in range(4)},
    **{f"any value {i}": _drawn_of(OTHERS) for i in range(4)},
    "absurd size": _every(SIZES, 10**12),
    "negative size": _every(SIZES, -8),
    "no size": _every(SIZES, 0),
    "text size": _every(SIZES, "72"),
    "fraction": _every(SIZES, 72.0),
    "absurd depth": _every(DEPTHS, 10**9),
    "large depth": _every(DEPTHS, 20_000),
    "negative depth": _every(DEPTHS, -1),
    "no depth": _every(DEPTHS, 0),
    "text depth": _every(DEPTHS, "two"),
    "absurd grid": _every(GRIDS, 10**9),
    "large grid": _every(GRIDS, 2**15),
    "odd grid": _every(GRIDS, 7),
    "text grid": _every(GRIDS, "128"),
    "list grid": _every(GRIDS, [128, 128]),
    "fraction of a grid": _every(GRIDS, 128.5),
    "infinite scale": _every(SCALES, 1e999),
    "no scale": _every(SCALES, 0),
    "NaN scale": _every(SCALES, float("nan")),
    "text scale": _every(SCALES, "1"),
    "long widths": _every(WIDTHS, [8] * 100_000),
    "absurd widths": _every(WIDTHS, [2**40, 2**40]),
    "zero widths": _every(WIDTHS, [0, 0]),
    "widths of text": _every(WIDTHS, ["a"]),
    "number for widths": _every(WIDTHS, 8),
    "empty widths": _every(WIDTHS, []),
    "other class": _every(("_class_name",), "StableDiffusionPipeline"),
    "class a list": _every(("_class_name",), ["DiT"]),
    "class a map": _every(("_class_name",), {}),
    "other activation": _every(("act_fn", "feed_forward_proj"), "relu"),
    "activation a map": _every(("act_fn", "feed_forward_proj"), {"a": 1}),
    "block types": _every(("down_block_types",), [["a"], {}]),
    "number of block types": _every(("down_block_types",), 4),
    "compression": _every(("kv_compression",), "conv:2:0-999999999999"),
    "compression map": _every(("kv_compression",), {"sampling": "conv", "factor": "x", "layers": [0]}),
    "compression factor": _every(("kv_compression",), {"sampling": "ave", "factor": 1e999, "layers": [0]}),
    "compression layers": _every(("kv_compression",), {"sampling": "ave", "factor": 2, "layers": ["x"]}),
    "compression unhashable": _every(("kv_compression",), {"sampling": ["ave"], "factor": 2, "layers": [0]}),
    "compression number": _every(("kv_compression",), 3),
    "compression list": _every(("kv_compression",), [1, 2]),
    "both names": edited(lambda rng, table: table.update(depth=2, num_layers=2)),
    "base size": edited(lambda rng, table: table.update(base_size="x")),
    "base and patch size": edited(lambda rng, table: table.update(base_size=4, patch_size=[2])),
}


def _place(value):
    """One drawn tensor given to another shard."""
    return edited(lambda rng, table: table["weight_map"].update({_drawn_key(rng, table["weight_map"]): value}))


def _all_in(value):
    return edited(lambda rng, table: {**table, "weight_map": dict.fromkeys(table["weight_map"], value)})


def _map(value):
    return edited(lambda rng, table: {**table, "weight_map": value})


INDEX = {
    **SYNTAX,
    "absent shard": _place("diffusion_pytorch_model-00009-of-00009.safetensors"),
    "shard above": _place("../model.safetensors"),
    "shard at the root": _place("/etc/passwd"),
    "shard a device": _place("/dev/zero"),
    "shard below": _place("sub/model.safetensors"),
    "shard ..": _place(".."),
    "shard .": _place("."),
    "shard empty": _place(""),
    "shard with NUL": _place("a\0b"),
    "shard with newline": _place("a\nerror: b"),
    "shard of backslashes": _place("..\\model.safetensors"),
    "shard on a drive": _place("C:model.safetensors"),
    "shard a URL": _place("file:///etc/passwd"),
    "shard long": _place("x" * 5000),
    "shard the index": _all_in("diffusion_pytorch_model.safetensors.index.json"),
    "shard the config": _all_in("config.json"),
    "shard a number": _place(3),
    "shard null": _place(None),
    "shard a list": _place([]),
    "all in one": _all_in("diffusion_pytorch_model-00001-of-00002.safetensors"),
    "unlisted tensor": edited(
        lambda rng, table: table["weight_map"].pop(_drawn_key(rng, table["weight_map"])) and None
    ),
    "further tensor": edited(
        lambda rng, table: table["weight_map"].update(hook="diffusion_pytorch_model-00001-of-00002.safetensors")
    ),
    "map empty": _map({}),
    "map a list": _map([]),
    "map a text": _map("model.safetensors"),
    "map null": _map(None),
    "100000 shards": _map({str(i): f"{i}.safetensors" for i in range(100_000)}),
}

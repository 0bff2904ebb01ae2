"""Nonsense in a tokenizer.json: parts of other tokenizers, patterns that never end, tables that lead out of them."""

import base64

from hostile.configs import NUMBERS, OTHERS, SYNTAX, edited

EVIL = {"Regex": "(a+)+$"}
SPLIT = {"type": "Split", "pattern": EVIL, "behavior": "Isolated", "invert": False}
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}
DEEP = {"type": "NFC"}
for _ in range(500):
    DEEP = {"type": "Sequence", "normalizers": [DEEP]}


def _set(*path):
    """The last of the path is the new value, those before it are keys."""
    *keys, last, value = path

    def edit(rng, table):
        for key in keys:
            table = table[key]
        table[last] = value

    return edited(edit)


def _places(value):
    """All (container, key) within a JSON value, but for those of long lists, of which the first stand for all."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value[:3]))
    for key, part in pairs:
        yield value, key
        if isinstance(part, (dict, list)):
            yield from _places(part)


def _anywhere(values):
    """One drawn place with one of the values."""

    def edit(rng, table):
        places = list(_places(table))
        container, key = places[int(rng.integers(len(places)))]
        container[key] = values[int(rng.integers(len(values)))]

    return edited(edit)


def _charsmap(change):
    def edit(rng, table):
        blob = bytearray(base64.b64decode(table["normalizer"]["precompiled_charsmap"]))
        table["normalizer"]["precompiled_charsmap"] = base64.b64encode(change(rng, blob) or blob).decode()

    return edited(edit)


def _flipped(count):
    def change(rng, blob):
        for place in rng.integers(0, len(blob), count):
            blob[place] ^= 1 << int(rng.integers(8))

    return change


MUTATIONS = {
    **{f"syntax: {name}": SYNTAX[name] for name in ("a list", "deep list", "doubled key", "5000 digits", "not UTF-8")},
    **{f"any value {i}": _anywhere((*NUMBERS, *OTHERS)) for i in range(6)},
    "evil splitter": _set("pre_tokenizer", SPLIT),
    "evil splitter within": _set("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT]}),
    "evil normalizer": _set("normalizer", {"type": "Replace", "pattern": EVIL, "content": ""}),
    "growing text": _set("normalizer", {"type": "Sequence", "normalizers": [GROW] * 9}),
    "deep normalizers": _set("normalizer", DEEP),
    "many normalizers": _set("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 10**5}),
    "other model": _set("model", "type", "BPE"),
    "WordLevel": _set("model", {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "no pieces": _set("model", "vocab", []),
    "many pieces": _set("model", "vocab", [["a", -1.0]] * 10**6),
    "twice the same piece": _set("model", "vocab", [["a", -1.0]] * 300),
    "endless piece": _set("model", "vocab", 5, ["a" * 10**6, -1.0]),
    "score of infinity": _set("model", "vocab", 5, ["a", 1e999]),
    "unknown beyond": _set("model", "unk_id", 2**40),
    "many added tokens": _set("added_tokens", [{"id": i, "content": f"x{i}"} for i in range(10**5)]),
    "empty added token": _set("added_tokens", 0, "content", ""),
    "ends elsewhere": _set("post_processor", "special_tokens", "</s>", "ids", [7]),
    "other processor": _set("post_processor", {"type": "BertProcessing"}),
    "one bit of the map": _charsmap(_flipped(1)),
    "bits of the map": _charsmap(_flipped(500)),
    "map cut off": _charsmap(lambda rng, blob: blob[: len(blob) // 2]),
    "map of zeros": _charsmap(lambda rng, blob: bytes(len(blob))),
    "map drawn": _charsmap(lambda rng, blob: rng.bytes(1 << 16)),
    "map that leads out": _charsmap(lambda rng, blob: blob[:4] + b"\xff" * (len(blob) - 4)),
    "endless map": _set("normalizer", "precompiled_charsmap", "A" * (8 << 20)),
}

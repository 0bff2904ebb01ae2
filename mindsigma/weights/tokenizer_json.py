"""T5's tokenizer from a tokenizer.json: checked, rebuilt from its known parts, run by the `tokenizers` library.

The file is a program of a kind: normalizers and splitters with regular expressions of whoever wrote it. Only what a
T5 has use for is taken over: a Unigram vocabulary, normalizers without a regular expression (and the one that joins
spaces), splitting at spaces and U+2581, added tokens, and a template that closes a text with the end token. All else is
refused. Field names and meanings: huggingface/tokenizers, `serialization.rs` of each part.
"""

import base64
import binascii
import json
import math

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes, understanding

MAX_BYTES = 2**26  # T5's file has 2.4 MB
MAX_PIECES = 2**19  # T5 has 32,100, mT5 250,112
MAX_ADDED = 2**12
LONGEST_PIECE = 1000  # characters; matching costs at most this for each character of a prompt
LARGEST_SCORE = 1e6  # of a log probability
MAX_CHARSMAP = 2**21  # bytes; T5's has 0.24 MB
LONGEST_REPLACEMENT = 256  # bytes that one character may become; NFKC needs 33
MAX_PARTS = 16  # normalizers, or splitters
SPACES = " {2,}"  # the regular expression of transformers' converter

PLAIN_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents")
ADDED_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer_json(path, eos):
    """A tokenizers.Tokenizer without special tokens of its own adding, truncation or padding.

    Args:
        path: the file.
        eos: id that the file's template must close a text with, if it has a template.

    Raises:
        MindSigmaError: the file is damaged, or is not of a T5.
    """
    document = load_json(path, read_bytes(path, MAX_BYTES), "the tokenizer")
    with understanding(path), _refusing(path):
        known = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(document.get("added_tokens") or []),
            "normalizer": _normalizer(document.get("normalizer")),
            "pre_tokenizer": _pre_tokenizer(document.get("pre_tokenizer")),
            "post_processor": None,
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            "model": _model(document.get("model")),
        }
        _check_template(document.get("post_processor"), eos)
        return _built(known)


def encode_with(tokenizer, path, text):
    """Token ids of a text, without the end token. Raises MindSigmaError."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:
        raise _library_fault(path, error) from None


class _Refused(Exception):
    pass


class _refusing:
    """Around the checks: what they refuse becomes a MindSigmaError that names the file."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is _Refused:
            raise MindSigmaError(
                f"{self.path}: {error}; not the tokenizer of a T5: download it again, or put T5's spiece.model there"
            ) from None
        if kind is not None and not isinstance(error, MindSigmaError) and kind.__name__ == "PanicException":
            raise _library_fault(self.path, error) from None


def _library_fault(path, error):
    """What the library raised, as a MindSigmaError; an interrupt stays one."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3's is no Exception
        return error
    return MindSigmaError(f"{path}: the tokenizer fails ({one_line(error)}); download it again")


def _require(condition, fault):
    if not condition:
        raise _Refused(fault)


def _built(known):
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(known))
    except Exception as error:  # the library raises plain Exception
        raise _Refused(f"does not fit together ({one_line(error)})") from None


def _model(model):
    _require(isinstance(model, dict), "holds no model")
    _require(model.get("type") == "Unigram", f"its model is {one_line(model.get('type'), 40)}, not Unigram")
    pieces, unknown = model.get("vocab"), model.get("unk_id")
    _require(isinstance(pieces, list) and 0 < len(pieces) <= MAX_PIECES, "its vocabulary has no usable size")
    for i, entry in enumerate(pieces):
        good = isinstance(entry, list) and len(entry) == 2 and _text(entry[0]) and _number(entry[1])
        _require(good, f"piece {i} of its vocabulary is no pair of text and score")
    _require(type(unknown) is int and 0 <= unknown < len(pieces), f"unk_id {one_line(unknown, 40)} is no piece")
    fallback = model.get("byte_fallback", False)
    _require(isinstance(fallback, bool), "byte_fallback is not true or false")
    return {"type": "Unigram", "unk_id": unknown, "vocab": pieces, "byte_fallback": fallback}


def _text(value):
    return isinstance(value, str) and 0 < len(value) <= LONGEST_PIECE and _encodes(value)


def _encodes(value):
    return not any("\ud800" <= char <= "\udfff" for char in value)


def _number(value):
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= LARGEST_SCORE


def _added_tokens(tokens):
    _require(isinstance(tokens, list) and len(tokens) <= MAX_ADDED, "its added_tokens are no usable list")
    known = []
    for token in tokens:
        good = isinstance(token, dict) and type(token.get("id")) is int and 0 <= token["id"] <= MAX_PIECES
        good = good and _text(token.get("content"))
        flags = {flag: token.get(flag, False) for flag in ADDED_FLAGS} if good else {}
        _require(good and all(isinstance(flag, bool) for flag in flags.values()), "an added token has odd fields")
        known.append({"id": token["id"], "content": token["content"], **flags})
    return known


def _parts(part, key, most=MAX_PARTS):
    """A part, or those of a Sequence, as a flat list."""
    if part is None:
        return []
    _require(isinstance(part, dict), f"'{key}' is no object")
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(key)
    _require(isinstance(inner, list), f"a Sequence without '{key}'")
    flat = [one for entry in inner for one in _parts(entry, key, most)]
    _require(len(flat) <= most, f"more than {most} '{key}'")
    return flat


def _normalizer(normalizer):
    parts = _parts(normalizer, "normalizers")
    known = [_one_normalizer(part) for part in parts]
    for kind in ("Precompiled", "Prepend"):
        _require(sum(part["type"] == kind for part in known) <= 1, f"has several normalizers {kind}")
    return {"type": "Sequence", "normalizers": known} if known else None


def _one_normalizer(part):
    kind = part.get("type")
    if kind in PLAIN_NORMALIZERS:
        return {"type": kind}
    if kind == "Strip":
        sides = {side: part.get(side, True) for side in ("strip_left", "strip_right")}
        _require(all(isinstance(value, bool) for value in sides.values()), "a Strip has odd fields")
        return {"type": kind, **sides}
    if kind == "Prepend":
        _require(isinstance(part.get("prepend"), str) and len(part["prepend"]) <= 1, "a Prepend of more than a letter")
        return {"type": kind, "prepend": part["prepend"]}
    if kind == "Replace":
        return _replace(part.get("pattern"), part.get("content"))
    _require(kind == "Precompiled", f"has the normalizer {one_line(kind, 40)}")
    return _precompiled(part.get("precompiled_charsmap"))


def _replace(pattern, content):
    good = isinstance(pattern, dict) and len(pattern) == 1 and isinstance(content, str) and _encodes(content)
    _require(good, "a Replace has odd fields")
    ((kind, text),) = pattern.items()
    if kind == "Regex":
        _require(text == SPACES and len(content) <= 1, f"replaces by the regular expression {one_line(repr(text), 60)}")
    else:
        # no longer than what it replaces, or a chain of them would blow a prompt up
        good = kind == "String" and _text(text) and len(content) <= len(text)
        _require(good, "a Replace has odd fields, or puts more than it takes")
    return {"type": "Replace", "pattern": {kind: text}, "content": content}


def _precompiled(text):
    _require(isinstance(text, str) and len(text) <= 2 * MAX_CHARSMAP, "its precompiled_charsmap is too large")
    try:
        _check_charsmap(base64.b64decode(text, validate=True))
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise _Refused("its precompiled_charsmap is damaged") from None
    return {"type": "Precompiled", "precompiled_charsmap": text}


def _check_charsmap(blob):
    """Raise ValueError unless every walk through a map of characters stays inside of it.

    The map is a double array (github.com/s-yata/darts-clone) with a size in front, and the texts it leads to, each
    closed by a NUL. The library indexes both as they say.
    """
    size = int.from_bytes(blob[:4], "little")
    if len(blob) > MAX_CHARSMAP or size % 4 or size < 4 or 4 + size > len(blob):
        raise ValueError("size")
    units = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(blob, np.uint8, -1, 4 + size)
    texts.tobytes().decode("utf-8")
    ends = np.concatenate([[-1], np.flatnonzero(texts == 0), [texts.size]])
    if np.diff(ends).max() > LONGEST_REPLACEMENT:
        raise ValueError("a text too long")
    offsets = (units >> 10) << ((units & 0x200) >> 6)
    labels, leaves, values = units & 0x800000FF, (units >> 8) & 1, units & 0x7FFFFFFF
    letters = np.arange(1, 256)
    todo, seen = [int(offsets[0])], np.zeros(units.size + 256, bool)
    nodes = np.array(todo)
    while nodes.size:
        reached = []
        for start in range(0, nodes.size, 4096):
            targets = nodes[start : start + 4096, None] ^ letters  # (nodes, letters)
            if targets.max() >= units.size:
                raise ValueError("leaves the array")
            found = targets[labels[targets] == letters]
            after = found ^ offsets[found]
            ending = after[leaves[found] == 1]
            if ending.size and (ending.max() >= units.size or values[ending].max() > texts.size):
                raise ValueError("leaves the texts")
            begins = values[ending]
            if ((texts[begins[begins < texts.size]] & 0xC0) == 0x80).any():
                raise ValueError("begins within a character")
            reached.append(after)
        nodes = np.unique(np.concatenate(reached))
        if nodes.size and nodes.max() >= seen.size:
            raise ValueError("leaves the array")
        nodes = nodes[~seen[nodes]]
        seen[nodes] = True


def _pre_tokenizer(part):
    known = []
    for one in _parts(part, "pretokenizers"):
        kind = one.get("type")
        if kind == "WhitespaceSplit":
            known.append({"type": kind})
            continue
        _require(kind == "Metaspace", f"has the splitter {one_line(kind, 40)}")
        fields = {key: one[key] for key in ("replacement", "prepend_scheme", "add_prefix_space", "split") if key in one}
        replacement, scheme = fields.get("replacement"), fields.get("prepend_scheme", "always")
        good = isinstance(replacement, str) and len(replacement) == 1 and scheme in ("always", "never", "first")
        good = good and all(isinstance(fields.get(key, True), bool) for key in ("add_prefix_space", "split"))
        _require(good, "a Metaspace has odd fields")
        known.append({"type": kind, **fields})
    return {"type": "Sequence", "pretokenizers": known} if known else None


def _check_template(processor, eos):
    """Raise unless a template, if there is one, puts the end token behind a text and nothing else."""
    if processor is None:
        return
    _require(isinstance(processor, dict), "its post_processor is no object")
    kind = processor.get("type")
    _require(kind == "TemplateProcessing", f"has the post-processor {one_line(kind, 40)}")
    single, specials = processor.get("single"), processor.get("special_tokens")
    good = isinstance(single, list) and len(single) == 2 and isinstance(specials, dict)
    good = good and all(isinstance(item, dict) for item in single) and "Sequence" in single[0]
    _require(good and isinstance(single[1].get("SpecialToken"), dict), "its template is not text and end token")
    ids = specials.get(single[1]["SpecialToken"].get("id"), {}).get("ids")
    _require(ids == [eos], f"its template closes a text with {one_line(ids, 40)}, not with the end token {eos}")

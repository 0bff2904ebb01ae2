"""tokenizer.json in place of spiece.model: the ids of transformers, nothing foreign run, carried along when converting.

golden/tokenizer_t5.json.gz is what diffusers 0.42 with transformers 5 writes for sigma-mini's tokenizer
(`pipe.save_pretrained`); golden/tokenizer_ids.json holds texts with the ids of transformers 4.57:

    reference = T5TokenizerFast(tokenizer_file="tokenizer.json")
    json.dump([[text, reference(text).input_ids] for text in texts], file)
"""

import base64
import gzip
import json
import os
import random
import shutil
import time

import numpy as np
import pytest
from conftest import GOLDEN

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.weights.locate import BUNDLED
from mindsigma.weights.tokenizer import Tokenizer

MINI = BUNDLED / "sigma-mini"
JSON = gzip.decompress((GOLDEN / "tokenizer_t5.json.gz").read_bytes())
IDS = [(text, ids) for text, ids in json.loads((GOLDEN / "tokenizer_ids.json").read_text())]


@pytest.fixture
def write(tmp_path):
    """A function that writes a tokenizer.json, changed by another, and returns its folder."""

    def run(change=lambda document: None):
        document = json.loads(JSON)
        change(document)
        (tmp_path / "tokenizer.json").write_text(json.dumps(document))
        return tmp_path

    return run


@pytest.fixture
def pipeline_folder(tmp_path):
    """sigma-mini with tokenizer.json in place of spiece.model."""
    folder = tmp_path / "pipeline"
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("spiece.model", "samples.png"))
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_bytes(JSON)
    return folder


def encode(tokenizer, text):
    return tokenizer.encode([text], 10**6)[0]


# the ids


def test_ids_are_those_of_transformers(write):
    tokenizer = Tokenizer(write())
    for text, ids in IDS:
        assert encode(tokenizer, text) == ids, text
    assert encode(tokenizer, "a red apple, 猫") == [3, 13, 233, 6, 42, 2, 1]  # transformers 5, too


def as_converted(document):
    """What transformers 4 makes of a spiece.model."""
    strip, spaces = {"strip_left": False, "strip_right": True}, {"Regex": " {2,}"}
    parts = [{"type": "Strip", **strip}, {"type": "Replace", "pattern": spaces, "content": "▁"}]
    document["normalizer"] = {"type": "Sequence", "normalizers": [document["normalizer"], *parts]}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    document["pre_tokenizer"] = metaspace


def as_of_old(document):
    splitters = document["pre_tokenizer"]["pretokenizers"]
    splitters[1] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True, "str_rep": "▁"}
    del document["model"]["byte_fallback"], document["version"]
    document.update(version="1.0", truncation={"max_length": 3, "strategy": "LongestFirst", "stride": 0})
    document["truncation"]["direction"] = "Right"


def without_normalizer(document):
    document["normalizer"] = None


def with_nfkc(document):
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}]}


def with_byte_fallback(document):
    vocab = document["model"]["vocab"]
    vocab[1000:1256] = [[f"<0x{i:02X}>", -20.0] for i in range(256)]
    document["model"]["byte_fallback"] = True


@pytest.mark.parametrize("change", [as_converted, as_of_old, without_normalizer, with_nfkc, with_byte_fallback])
def test_other_forms(write, change):
    transformers = pytest.importorskip("transformers")
    folder = write(change)
    reference = transformers.T5TokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer = Tokenizer(folder)
    for text, _ in IDS:
        assert encode(tokenizer, text) == reference(text, truncation=False).input_ids, text


def test_long_prompts_are_cut_before_the_end_token(write):
    tokenizer = Tokenizer(write())
    with pytest.warns(UserWarning, match="7 tokens, the limit is 4; cut off: ', "):
        assert tokenizer.encode(["a red apple, 猫"], 4) == [[3, 13, 233, 1]]
    with pytest.raises(MindSigmaError, match="lone surrogate"):
        tokenizer.encode(["a \ud800"], 9)


def test_spiece_model_is_read_where_both_are(write):
    folder = write(lambda document: document["model"]["vocab"].reverse())
    shutil.copy(MINI / "tokenizer" / "spiece.model", folder)
    assert Tokenizer(folder).path.name == "spiece.model"
    assert encode(Tokenizer(folder), "a red apple") == [3, 13, 233, 1]


# what is refused


def set_in(*path):
    """A change of the document: the last item is the new value, those before it are keys."""
    *keys, last, value = path

    def change(document):
        for key in keys:
            document = document[key]
        document[last] = value

    return change


EVIL = {"Regex": "(a+)+$"}
SPLIT = {"type": "Split", "pattern": EVIL, "behavior": "Isolated", "invert": False}
GROW = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaa"}


@pytest.mark.parametrize(
    "change, message",
    [
        (set_in("pre_tokenizer", SPLIT), "splitter Split"),
        (set_in("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT]}), "splitter Split"),
        (set_in("normalizer", {"type": "Replace", "pattern": EVIL, "content": ""}), "regular expression"),
        (set_in("normalizer", {"type": "Sequence", "normalizers": [GROW] * 9}), "more than it takes"),
        (set_in("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 99}), "more than 16"),
        (set_in("normalizer", {"type": "Script"}), "normalizer Script"),
        (set_in("normalizer", [1]), "no object"),
        (set_in("post_processor", {"type": "BertProcessing"}), "post-processor BertProcessing"),
        (set_in("post_processor", "special_tokens", "</s>", "ids", [7]), r"closes a text with \[7\]"),
        (set_in("post_processor", "single", []), "not text and end token"),
        (set_in("model", "type", "BPE"), "BPE, not Unigram"),
        (set_in("model", "unk_id", None), "unk_id None"),
        (set_in("model", "unk_id", 2**40), "unk_id"),
        (set_in("model", "vocab", {}), "no usable size"),
        (set_in("model", "vocab", 5, ["", -1.0]), "piece 5"),
        (set_in("model", "vocab", 5, ["a" * 2000, -1.0]), "piece 5"),
        (set_in("model", "vocab", 5, ["a", 1e300]), "piece 5"),
        (set_in("model", "vocab", 5, ["\ud800", -1.0]), "piece 5"),
        (set_in("added_tokens", [{"id": 1}]), "added token"),
        (set_in("added_tokens", 7), "no usable list"),
        (set_in("normalizer", "precompiled_charsmap", "AAAA"), "precompiled_charsmap is damaged"),
        (set_in("normalizer", "precompiled_charsmap", "?"), "precompiled_charsmap is damaged"),
    ],
)
def test_refused(write, change, message):
    folder = write(change)
    with pytest.raises(MindSigmaError, match=message) as error:
        Tokenizer(folder)
    assert str(folder / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model": ' + b"[" * 9999, b"null"])
def test_damaged(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(MindSigmaError, match="tokenizer.json"):
        Tokenizer(tmp_path)


def test_millions_of_values_are_refused_before_they_are_made(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": [' + b"[]," * 5_000_000 + b"0]}")
    begin = time.process_time()
    with pytest.raises(MindSigmaError, match=r"tokenizer\.json.* 10000002 values"):
        Tokenizer(tmp_path)
    assert time.process_time() - begin < 1


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(MindSigmaError, match="not a regular file"):
        Tokenizer(tmp_path)
    with pytest.raises(MindSigmaError, match="must hold spiece.model or tokenizer.json"):
        Tokenizer(GOLDEN)


def test_damaged_character_maps_never_reach_the_library(write, capfd):
    """Bits flipped: the map is refused, or every text is encoded; the library does not panic."""
    blob = bytearray(base64.b64decode(json.loads(JSON)["normalizer"]["precompiled_charsmap"]))
    size = int.from_bytes(blob[:4], "little")
    draw, refused, begin = random.Random(5), 0, time.process_time()
    small = {"type": "Unigram", "unk_id": 0, "vocab": [["?", 0.0], ["▁", -1.0], ["a", -2.0]]}
    for _ in range(25):
        flipped = bytearray(blob)
        for _ in range(draw.choice([1, 20, 500])):
            flipped[draw.randrange(4 + size)] ^= 1 << draw.randrange(8)
        charsmap = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(flipped).decode()}
        changed = {"model": small, "added_tokens": [], "normalizer": charsmap}
        folder = write(lambda document, changed=changed: document.update(changed))
        try:
            tokenizer = Tokenizer(folder)
        except MindSigmaError:
            refused += 1
            continue
        for text, _ in IDS:
            encode(tokenizer, text)
    assert 0 < refused < 25 and time.process_time() - begin < 20
    assert "panicked" not in capfd.readouterr().err


# carried along


def test_the_same_picture(pipeline_folder, mini):
    """A pipeline with either form draws the same; what is saved can be read."""
    again = PixArtSigmaPipeline.from_pretrained(pipeline_folder)
    text = ["a red apple, 猫"]
    one, two = (pipeline.encode_prompts(text).states.asnumpy() for pipeline in (mini, again))
    assert np.array_equal(one, two)
    again.save_pretrained(pipeline_folder.parent / "saved")
    assert (pipeline_folder.parent / "saved" / "tokenizer" / "tokenizer.json").read_bytes() == JSON


def test_a_vocabulary_larger_than_that_of_t5(pipeline_folder):
    document = json.loads(JSON)
    document["model"]["vocab"] += [[f"▁zebrafish{i}", -1.0] for i in range(99)]
    document["added_tokens"] = []
    (pipeline_folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(document))
    pipeline = PixArtSigmaPipeline.from_pretrained(pipeline_folder)
    with pytest.raises(MindSigmaError, match="do not belong together"):
        pipeline.encode_prompts(["a zebrafish98"])


@pytest.mark.parametrize("target", ["mindspore", "diffusers"])
def test_converted(convert, pipeline_folder, tmp_path, target):
    convert(pipeline_folder, tmp_path / "out", "--to", target, "--verify")
    assert (tmp_path / "out" / "tokenizer" / "tokenizer.json").read_bytes() == JSON
    assert encode(Tokenizer(tmp_path / "out" / "tokenizer"), "a red apple") == [3, 13, 233, 1]
    if target == "diffusers":
        index = json.loads((tmp_path / "out" / "model_index.json").read_text())
        assert index["tokenizer"] == ["transformers", "T5TokenizerFast"]
        transformers = pytest.importorskip("transformers")
        theirs = transformers.T5TokenizerFast.from_pretrained(tmp_path / "out" / "tokenizer")
        assert [theirs(text).input_ids for text, _ in IDS] == [ids for _, ids in IDS]


def test_overwritten_folder_keeps_no_other_tokenizer(convert, pipeline_folder, tmp_path):
    """spiece.model of an earlier conversion would be read in place of the new tokenizer.json."""
    convert("sigma-mini", tmp_path / "out", "--to", "mindspore")
    assert Tokenizer(tmp_path / "out" / "tokenizer").path.name == "spiece.model"
    convert(pipeline_folder, tmp_path / "out", "--to", "mindspore", "--overwrite")
    assert Tokenizer(tmp_path / "out" / "tokenizer").path.name == "tokenizer.json"

"""Extracted features: equal to what the networks give, complete or absent, shared by ranks, continued after a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load_tool, relative_error
from killing import killed_everywhere
from mindspore import Tensor
from PIL import Image

from mindsigma.data import BucketSampler, FeatureSet, Loader, Records, Resolution, open_data, open_records
from mindsigma.data.features import FeatureFolder, sample_file
from mindsigma.data.images import training_array
from mindsigma.data.prepared import convert
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.training import extraction as features_module
from mindsigma.training.extraction import Encoders, Extraction
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.locate import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
KILLED = Path(__file__).with_name("extraction_killed.py")
SMALL = Resolution(64)
CAPTIONS = [("a red apple", "a red apple that lies on a white table"), ("", "three cats on blue"), ("a dog", "")]
LENGTH = 24  # tokens


# Runs a tool that is killed while it writes tensor 8: one of the null caption, 3 each of two records, 1 of a third.
@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Nine images of three shapes; captions short and long, long alone, short alone."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for i in range(9):
        height, width = [(80, 80), (64, 100), (120, 70)][i % 3]
        path = folder / f"{i}.png"
        pixels = np.random.default_rng(i).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(path)
        short, long = CAPTIONS[i // 3]
        rows.append(Record(path.name, short, long, height, width, str(path)))
    return Records(rows)


class Stub:
    """Stands for Encoders where only the bookkeeping is tested: numbers that depend on image and text alone."""

    state_width = 5
    vae_config = SimpleNamespace(latent_channels=2, downsampling=8)

    def __init__(self, name="stub", scale=1.0):
        self.identity, self.scale, self.images = {"vae": name, "text_encoder": name}, scale, 0

    def memory(self):
        return []

    def load(self):
        pass

    def moments(self, images):
        self.images += len(images)
        n, _, height, width = images.shape
        means = images.reshape(n, 3, height // 8, 8, width // 8, 8).mean((3, 5))
        return self.scale * np.concatenate([means, means[:, :1]], 1).astype(np.float32)

    def states(self, texts, max_length, min_length=1):
        tokens = np.array([min(len(text.split()) + 1, max_length) for text in texts])
        states = np.zeros((len(texts), max(min_length, tokens.max()), 5), np.float32)
        for i, text in enumerate(texts):
            states[i] = np.random.default_rng(zlib.crc32(text.encode())).normal(size=states.shape[1:])
        return states, tokens, 0


def extract(records, folder, encoders=None, resolution=SMALL, rank=0, ranks=1, **options):
    extraction = Extraction(records, folder, encoders or Stub(), resolution, max_length=LENGTH, **options)
    extraction.run(extraction.missing(rank, ranks))
    return extraction.finish()


def sample_files(folder):
    return {path.name: path for path in Path(folder).rglob("*") if path.parent.parent.name == "samples"}


@pytest.fixture(scope="module")
def encoders():
    return Encoders("sigma-mini")


def test_features_are_what_the_networks_give(records, encoders, mini, tmp_path):
    assert extract(records, tmp_path, encoders, states_dtype="fp32") == 0
    features = FeatureSet(tmp_path)
    for index in (0, 4, 8):
        record = records[index]
        image = training_array(records.image(index), 64, 64, "bilinear")
        mean, log_variance = np.split(mini.vae.encode(Tensor(image[None])).asnumpy()[0], 2)
        for real in (True, False):
            moments, states = features.read(index, real)
            assert relative_error(moments[:4], mean) < 1e-5
            assert relative_error(moments[4:], np.exp(log_variance / 2)) < 1e-5
            text = record.caption(real)
            caption = mini.text_encoder([text], LENGTH)
            tokens = int(caption.mask.asnumpy().sum())
            assert features.caption(index, real) == text and states.shape == (tokens, 256)
            assert relative_error(states, caption.states.asnumpy()[0, :tokens]) < 1e-5
    states, mask = features.null_caption()
    caption = mini.text_encoder([""], LENGTH, min_length=LENGTH)
    assert relative_error(states, caption.states.asnumpy()[0]) < 1e-5
    assert np.array_equal(mask, caption.mask.asnumpy()[0]) and mask.sum() == 1
    assert features.null_caption(7)[0].shape == (7, 256)


def test_a_killed_extraction_leaves_no_half_file_and_is_continued(records, encoders, tmp_path):
    data, folder = tmp_path / "data", tmp_path / "features"
    convert(records, data, "official")
    options = ["--model", "sigma-mini", "--resolution", "64", "--max-length", str(LENGTH), "--batch-size", "1"]
    run = subprocess.run([sys.executable, str(KILLED), str(data), str(folder), *options], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    done = {n: p.stat().st_mtime_ns for n, p in sample_files(folder).items() if p.suffix == ".safetensors"}
    assert len(done) == 2 and not (folder / "index.jsonl").exists()
    assert [p.suffix for n, p in sample_files(folder).items() if n not in done] == [".part"]
    for name in done:
        assert "moments" in read_safetensors(sample_files(folder)[name])[0]
    with pytest.raises(MindSigmaError, match="not finished"):
        FeatureSet(folder)
    again = open_records(data, progress=False)
    assert extract(again, folder, encoders, batch_size=1) == 0
    files = {name: path for name, path in sample_files(folder).items() if path.suffix == ".safetensors"}
    assert all(files[name].stat().st_mtime_ns == stamp for name, stamp in done.items())
    assert len(FeatureSet(folder)) == 9
    whole = tmp_path / "whole"
    extract(again, whole, encoders, batch_size=1)
    assert all(path.read_bytes() == files[name].read_bytes() for name, path in sample_files(whole).items())


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_extraction_killed_at_any_instant_is_continued(records, tmp_path):
    """The first, and one that replaces what is there: what passes for complete is the old or the new."""
    folder, old = tmp_path / "features", Records(list(records)[:2])
    new = Records([old[0]._replace(prompt="another caption"), *list(old)[1:]])
    extract(old, tmp_path / "old", threads=1)
    extract(new, tmp_path / "new", threads=1)
    whole = files_of(tmp_path / "new")
    for start in (None, tmp_path / "old"):
        kills = 0
        for number in killed_everywhere(lambda: extract(new, folder, threads=1)):
            if (folder / "index.jsonl").exists() and files_of(folder) != whole:
                found, kept = FeatureSet(folder), FeatureSet(tmp_path / "old")
                assert list(found) == list(kept)
                assert all(np.array_equal(found.read(i, True)[1], kept.read(i, True)[1]) for i in range(2))
            assert extract(new, folder, threads=1) == 0
            assert files_of(folder) == whole
            shutil.rmtree(folder)
            if start:
                shutil.copytree(start, folder)
            kills = number
        assert kills > 10 and files_of(folder) == whole
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "old", folder)


def test_loading_features_equals_loading_images(records, tmp_path):
    resolution = Resolution(256, multi_scale=True)
    extract(records, tmp_path, resolution=resolution, batch_size=2, moments_dtype="fp32", states_dtype="fp32")
    features, stub = open_data(tmp_path), Stub()
    assert isinstance(features, FeatureSet) and features.resolution == resolution
    options = {"seed": 4, "real_prompt_ratio": 0.5, "caption_dropout": 0.3}
    one = Loader(records, BucketSampler(records, 4, resolution, seed=1), **options)
    two = Loader(features, BucketSampler(features, 4, resolution, seed=1), max_length=30, threads=2, **options)
    steps = len(one.sampler)
    assert steps == len(two.sampler) > 2
    for a, b in zip(one.batches(0, steps), two.batches(0, steps)):
        assert (a.step, a.height, a.width, a.captions) == (b.step, b.height, b.width, b.captions)
        for name in ("draws", "dropped", "image_size", "aspect_ratio"):
            assert np.array_equal(getattr(a, name), getattr(b, name))
        assert b.images is None and b.moments.dtype == b.states.dtype == np.float32 and b.mask.dtype == np.int32
        assert np.allclose(b.moments, stub.moments(a.images), atol=1e-6)
        for text, states, mask in zip(b.captions, b.states, b.mask):
            expected, tokens, _ = stub.states([text], LENGTH)
            assert states.shape == (30, 5) and mask.tolist() == [1] * tokens[0] + [0] * (30 - tokens[0])
            assert np.array_equal(states[: tokens[0]], expected[0]) and not states[tokens[0] :].any()


def test_ranks_share_the_work_and_the_last_writes_the_index(records, tmp_path):
    assert extract(records, tmp_path / "two", rank=1, ranks=2) == 5
    with pytest.raises(MindSigmaError, match="not finished"):
        open_data(tmp_path / "two")
    assert extract(records, tmp_path / "two", rank=0, ranks=2) == 0
    extract(records, tmp_path / "one")
    one, two = sample_files(tmp_path / "one"), sample_files(tmp_path / "two")
    assert len(one) == 9 and {n: p.read_bytes() for n, p in one.items()} == {n: p.read_bytes() for n, p in two.items()}
    assert FeatureSet(tmp_path / "one").fingerprint() == FeatureSet(tmp_path / "two").fingerprint()


def test_only_what_is_missing_damaged_or_changed_is_done_again(records, tmp_path):
    extract(records, tmp_path, batch_size=1)
    changed = Records([records[0]._replace(prompt="another caption"), *list(records)[1:]])
    extraction = Extraction(changed, tmp_path, Stub(), SMALL, max_length=LENGTH, batch_size=1)
    assert extraction.missing() == [0]
    absent, damaged = (extraction.folder.sample_file(records[i].key) for i in (3, 7))
    absent.unlink()
    damaged.write_bytes(damaged.read_bytes()[:-5])
    assert extraction.missing() == [0, 3, 7] and extraction.missing(1, 2) == [3, 7] and extraction.finish() == 3
    extraction.run(extraction.missing())
    assert extraction.encoders.images == 3 and extraction.missing() == [] and extraction.finish() == 0
    assert FeatureSet(tmp_path).caption(0, True) == "another caption"


def test_features_of_something_else_are_told_apart(records, tmp_path):
    extract(records, tmp_path)
    for options, word in (
        ({"encoders": Stub("other")}, "vae"),
        ({"resolution": Resolution(128)}, "resolution"),
        ({"states_dtype": "fp32"}, "states_dtype"),
    ):
        with pytest.raises(MindSigmaError, match=f"made with {word}"):
            extract(records, tmp_path, **options)
    features = FeatureSet(tmp_path)
    for resolution, options, word in (
        (Resolution(128), {}, "training wants"),
        (SMALL, {"max_length": 5}, "--max-length 5"),
        (SMALL, {"flip": 0.5}, "mirrored"),
    ):
        with pytest.raises(MindSigmaError, match=word):
            Loader(features, BucketSampler(features, 3, resolution), **options)
    with pytest.raises(MindSigmaError, match="--max-length 300"):
        features.null_caption(300)


def test_captions_cut_at_the_limit_are_not_padded_to_more(tmp_path, records):
    long = Records([record._replace(long_prompt="word " * 40) for record in records])
    extract(long, tmp_path)
    features = FeatureSet(tmp_path)
    features.check_use(SMALL, LENGTH)
    with pytest.raises(MindSigmaError, match="--max-length 300"):
        features.check_use(SMALL, 300)


def test_what_fp16_cannot_hold_is_refused(records, tmp_path):
    with pytest.raises(MindSigmaError, match="exceed fp16"):
        extract(records, tmp_path, Stub(scale=1e6), moments_dtype="fp16")
    with pytest.raises(MindSigmaError, match="not finite"):
        extract(records, tmp_path / "nan", Stub(scale=np.nan))


def test_damage_is_told_with_its_file(records, tmp_path):
    extract(records, tmp_path / "whole")
    for name, data in (("features.json", b"{}"), ("index.jsonl", b'{"key": 1}\n'), ("index.jsonl", b"\xff")):
        shutil.copytree(tmp_path / "whole", tmp_path / "broken")
        (tmp_path / "broken" / name).write_bytes(data)
        with pytest.raises(MindSigmaError, match=name):
            open_data(tmp_path / "broken")
        shutil.rmtree(tmp_path / "broken")
    features = FeatureSet(tmp_path / "whole")
    for file in sample_files(tmp_path / "whole").values():
        file.unlink()
    for limit in (0, 100):
        with pytest.raises(MindSigmaError, match="no such file.*extract_features"):
            list(Loader(features, BucketSampler(features, 3, SMALL), max_bad_images=limit).batches(0, 1))
    with pytest.raises(MindSigmaError, match="no folder of features"):
        FeatureSet(tmp_path / "absent")


def copied(records, folder, keys=None):
    """The records with images of their own, under other keys if given."""
    folder.mkdir()
    result = []
    for i, record in enumerate(records):
        file = folder / f"{i}.png"
        shutil.copy(record.file, file)
        result.append(record._replace(file=str(file), key=keys[i] if keys else record.key))
    return Records(result, path=str(folder))


def spoil(record):
    """Cut off a record's image behind its sound header; its bytes before."""
    data = Path(record.file).read_bytes()
    Path(record.file).write_bytes(data[:100])
    return data


def test_an_image_of_another_content_is_extracted_again(records, tmp_path):
    """Of the same size, even at the same time; one that was only copied or touched is not."""
    mine = copied(records, tmp_path / "images")
    extract(mine, tmp_path / "features")

    def missing():
        return Extraction(mine, tmp_path / "features", Stub(), SMALL, max_length=LENGTH).missing()

    file = Path(mine[4].file)
    data, found = bytearray(file.read_bytes()), file.stat()
    os.utime(file, (1, 1))
    assert missing() == []
    data[-20] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert file.stat().st_mtime_ns == found.st_mtime_ns and missing() == [4]
    shutil.copy(records[5].file, file)
    assert missing() == [4]
    shutil.copy(records[4].file, file)
    assert missing() == []


def test_images_within_shards_are_told_apart(records, tmp_path):
    mine = copied(records, tmp_path / "images")
    convert(mine, tmp_path / "shards", "webdataset")
    extract(open_records(tmp_path / "shards", progress=False), tmp_path / "features")
    spoiled = bytearray(Path(mine[2].file).read_bytes())
    spoiled[-20] ^= 1
    Path(mine[2].file).write_bytes(spoiled)
    convert(mine, tmp_path / "shards", "webdataset")
    again = open_records(tmp_path / "shards", progress=False)
    assert Extraction(again, tmp_path / "features", Stub(), SMALL, max_length=LENGTH).missing() == [2]


def test_what_replaces_features_makes_the_folder_incomplete_until_all_are_done(records, tmp_path):
    """So that a kill leaves no mixture of old and new that passes for complete; adding records does."""
    mine, folder = copied(records, tmp_path / "images"), tmp_path / "features"
    extract(Records(list(mine)[:7]), folder)
    extraction = Extraction(mine, folder, Stub(), SMALL, max_length=LENGTH)
    extraction.run([7, 8])
    assert len(FeatureSet(folder)) == 7
    extraction.run([3])
    with pytest.raises(MindSigmaError, match="not finished"):
        FeatureSet(folder)
    assert extraction.finish() == 0 and len(FeatureSet(folder)) == 9


def test_bad_images_are_listed_and_left_out(records, tmp_path):
    """Of all ranks; until they are mended."""
    mine, folder = copied(records, tmp_path / "images"), tmp_path / "features"
    good = {i: spoil(mine[i]) for i in (0, 4, 5)}
    assert extract(mine, folder, rank=1, ranks=2) == 5
    extraction = Extraction(mine, folder, Stub(), SMALL, max_length=LENGTH)
    extraction.run(extraction.missing(0, 2))
    assert extraction.finish() == 0 and [Path(row.where).name for row in extraction.left_out] == [
        f"{i}.png" for i in good
    ]
    lines = (folder / "left_out.txt").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith(f"not a readable image\t{mine[0].file}\t")
    features = FeatureSet(folder)
    assert [row[0] for row in features] == [record.key for i, record in enumerate(mine) if i not in good]
    whole = tmp_path / "whole"
    extract(records, whole)
    assert np.array_equal(features.read(0, True)[0], FeatureSet(whole).read(1, True)[0])
    with pytest.raises(MindSigmaError, match=r"0\.png.*--strict.*prepare_data"):
        extract(mine, folder, strict=True)
    for i, data in good.items():
        Path(mine[i].file).write_bytes(data)
        assert extract(mine, folder) == 0
    assert len(FeatureSet(folder)) == 9 and not (folder / "left_out.txt").exists()


def test_the_tool_tells_what_it_left_out(records, tmp_path, monkeypatch, capsys):
    """And goes on; with --strict it does not."""
    mine, data = copied(records, tmp_path / "images"), tmp_path / "data"
    convert(mine, data, "official")
    bad = open_records(data, progress=False)[2]
    spoil(bad)
    monkeypatch.setattr(features_module, "Encoders", lambda *_: Stub())
    command = ["extract_features.py", str(data), str(tmp_path / "features"), "--model", "x", "--resolution", "64"]
    monkeypatch.setattr(sys, "argv", command)
    assert load_tool("extract_features").main() == 0
    said = capsys.readouterr().out
    assert "left out, as they cannot be read: 1 images" in said and bad.file in said and "complete: " in said
    assert bad.file in (tmp_path / "features" / "left_out.txt").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--strict"])
    with pytest.raises(MindSigmaError, match=Path(bad.file).name):
        load_tool("extract_features").main()


def test_an_image_that_went_bad_loses_its_features(records, tmp_path):
    mine, folder = copied(records, tmp_path / "images"), tmp_path / "features"
    extract(mine, folder)
    spoil(mine[6])
    Path(mine[7].file).unlink()
    assert extract(mine, folder) == 0 and len(FeatureSet(folder)) == 7


def test_where_every_image_is_bad_one_is_named(records, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    broken = Records([records[0]._replace(file=str(tmp_path / "bad.png"))])
    with pytest.raises(MindSigmaError, match=r"bad\.png.*prepare_data"):
        extract(broken, tmp_path / "features")


def test_keys_of_any_text(records, tmp_path):
    """Names that are no UTF-8, line breaks, halves of surrogate pairs."""
    keys = ["a\udcff.png", "b\n.png", "\ud800", "\u2028", "e" * 5000, "\0", "", "../h", "i"]
    mine = copied(records, tmp_path / "images", keys)
    extract(mine, tmp_path / "features")
    features = FeatureSet(tmp_path / "features")
    assert [row[0] for row in features] == keys
    assert all(len(features.read(i, True)[0]) == 4 for i in range(9))


def test_a_folder_of_something_else_is_left_alone(records, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MindSigmaError, match="holds something else, such as notes.txt"):
        extract(records, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_leftovers_of_kills_are_removed_and_nothing_else(records, tmp_path):
    """Also of a kill in the first write of all; no link is followed, and nobody who still writes is disturbed."""
    folder, elsewhere = tmp_path / "features", tmp_path / "elsewhere"
    (folder / "samples" / "ab").mkdir(parents=True)
    elsewhere.mkdir()
    os.symlink(elsewhere, folder / "samples" / "cd")
    (folder / "samples").rename(folder / ".samples")
    leftovers = [folder / ".features.json.77.part", folder / ".samples" / "ab" / ".x.safetensors.1234.part"]
    others = [elsewhere / ".y.safetensors.77.part", folder / ".z.part"]
    for path in leftovers + others:
        path.write_text("half")
    extract(records, folder)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in others)
    held = Extraction(records, folder, Stub(), SMALL, max_length=LENGTH)
    leftovers[0].write_text("of a process that writes")
    Extraction(records, folder, Stub(), SMALL, max_length=LENGTH)
    assert leftovers[0].exists()
    del held
    Extraction(records, folder, Stub(), SMALL, max_length=LENGTH)
    assert not leftovers[0].exists()


ROW = {"key": "0.png", "prompt": "a", "sharegpt4v": "", "height": 64, "width": 64, "tokens": [2, 0]}


@pytest.mark.parametrize(
    "changes",
    [
        {"key": 5},
        {"key": None},
        {"prompt": ["a"]},
        {"prompt": "", "tokens": [0, 0]},
        {"height": "64"},
        {"height": 64.0},
        {"height": True},
        {"width": 0},
        {"width": -1},
        {"width": 2**31},
        {"width": 10**19},
        {"height": float("inf")},
        {"height": float("nan")},
        {"tokens": [2]},
        {"tokens": "20"},
        {"tokens": [2.0, 0]},
        {"tokens": [True, 0]},
        {"tokens": [LENGTH + 1, 0]},
        {"tokens": [0, 0]},
        {"tokens": [2, 1]},
        {"tokens": {"0": 1}},
        {"tokens": [[2], 0]},
    ],
    ids=str,
)
def test_rows_of_an_index_that_no_extraction_writes(whole, changes):
    (whole / "index.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "key": "1.png", **changes}) + "\n")
    with pytest.raises(MindSigmaError, match=r"index\.jsonl: line 2.*delete the file") as caught:
        open_data(whole)
    assert "\n" not in str(caught.value)


@pytest.fixture
def whole(records, tmp_path):
    """A folder of features."""
    extract(records, tmp_path / "features")
    return tmp_path / "features"


def lines_of(text):
    return (json.dumps(ROW) + "\n" + text).encode("utf-8", "surrogateescape")


@pytest.mark.parametrize(
    "data, said",
    [
        (lines_of(json.dumps(ROW) + "\n"), "twice"),
        (lines_of("[" * 10**5 + "\n"), "line 2"),
        (lines_of("[" * 80 + "]" * 80 + "\n"), "line 2"),
        (lines_of("[1]\n"), "line 2"),
        (lines_of('{"key": ' + "9" * 10**6 + "}\n"), "line 2"),
        (lines_of("\n"), "line 2"),
        (lines_of("\udcff\n"), "line 2"),
        (lines_of(json.dumps({**ROW, "key": "x"})), "line 2 is cut off"),
        (b"\0" * 10**6, "line 1"),
        (b"", "tells no record"),
    ],
    ids=range(10),
)
def test_an_index_that_is_none(whole, data, said):
    (whole / "index.jsonl").write_bytes(data)
    with pytest.raises(MindSigmaError, match=rf"index\.jsonl.*{said}"):
        open_data(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"resolution": 64},
        {"resolution": {"base": 64}},
        {"resolution": {"base": 64.0, "multi_scale": False, "table": "training"}},
        {"resolution": {"base": True, "multi_scale": False, "table": "training"}},
        {"resolution": {"base": 10**15, "multi_scale": False, "table": "training"}},
        {"resolution": {"base": 256, "multi_scale": 1, "table": "training"}},
        {"resolution": {"base": 256, "multi_scale": True, "table": ["training"]}},
        {"resolution": {"base": 256, "multi_scale": True, "table": "other"}},
        {"state_width": float("inf")},
        {"state_width": 10**12},
        {"state_width": "5"},
        {"max_length": -1},
        {"max_length": float("nan")},
        {"latent_channels": None},
        {"latent_channels": 2.5},
        {"downsampling": 0},
        {"downsampling": 7},
    ],
    ids=str,
)
def test_a_description_that_no_extraction_writes(whole, changes):
    file = whole / "features.json"
    document = json.loads(file.read_text())
    document["config"].update(changes)
    file.write_text(json.dumps(document))
    with pytest.raises(MindSigmaError, match=r"features\.json: ") as caught:
        open_data(whole)
    assert "\n" not in str(caught.value)
    for text in ("[]", '{"format": ["mindsigma-features"]}', "[" * 10**5, json.dumps({**document, "config": [1]})):
        file.write_text(text)
        with pytest.raises(MindSigmaError, match=r"features\.json: "):
            open_data(whole)


@pytest.mark.parametrize("name", ["features.json", "index.jsonl", "null_caption.safetensors", "sample"])
def test_only_regular_files_of_a_sane_size_are_read(whole, records, name):
    """A FIFO would be waited for, /dev/zero and a sparse giant read until the memory is full."""
    file = next((whole / "samples").rglob("*.safetensors")) if name == "sample" else whole / name

    def read():
        features = FeatureSet(whole)
        features.null_caption()
        for index in range(len(features)):
            features.read(index, True)

    read()
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path), giant, Path.mkdir):
        file.unlink() if file.is_file() or file.is_fifo() or file.is_symlink() else file.rmdir()
        make(file)
        with pytest.raises(MindSigmaError) as caught:
            read()
        assert "\n" not in str(caught.value)
        # What is no regular file is replaced by nobody, as it might be a device.
        again = make is giant and name != "features.json"
        with nullcontext() if again else pytest.raises(MindSigmaError, match=re.escape(str(whole))):
            extract(records, whole)


def giant(path):
    with open(path, "wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize(
    "tensors, metadata",
    [
        ({"states": np.zeros((LENGTH, 4), np.float32)}, {"tokens": "1"}),
        ({"states": np.zeros((LENGTH, 5), np.int32)}, {"tokens": "1"}),
        ({"states": np.zeros(5, np.float32)}, {"tokens": "1"}),
        ({"other": np.zeros((LENGTH, 5), np.float32)}, {"tokens": "1"}),
        ({"states": np.zeros((LENGTH, 5), np.float32)}, {}),
        ({"states": np.zeros((LENGTH, 5), np.float32)}, {"tokens": "-1"}),
        ({"states": np.zeros((LENGTH, 5), np.float32)}, {"tokens": "9" * 5000}),
        ({"states": np.zeros((LENGTH, 5), np.float32)}, {"tokens": "1e999"}),
    ],
    ids=range(8),
)
def test_a_null_caption_that_is_none(whole, records, tensors, metadata):
    FeatureFolder._write(whole / "null_caption.safetensors", tensors, metadata)
    with pytest.raises(MindSigmaError, match=r"null_caption\.safetensors.*delete it and run"):
        FeatureSet(whole).null_caption()
    extract(records, whole)  # makes it again
    FeatureSet(whole).null_caption()


@pytest.mark.parametrize(
    "changes",
    [
        {"moments": np.zeros((4, 8, 9), np.float32)},
        {"moments": np.zeros((4, 8), np.float32)},
        {"moments": np.zeros((4, 8, 8), np.complex64)},
        {"moments": np.zeros((4, 8, 8), np.int32)},
        {"states": np.zeros((LENGTH + 1, 5), np.float16)},
        {"states": np.zeros((0, 5), np.float16)},
        {"states": np.zeros((4, 5), np.bool_)},
        {"states": np.zeros((), np.float16)},
    ],
    ids=range(8),
)
def test_arrays_that_do_not_fit_are_told_and_made_again(whole, records, changes):
    file = sample_file(whole, records[0].key)
    tensors, metadata = read_safetensors(file)
    FeatureFolder._write(file, {**{name: np.array(value) for name, value in tensors.items()}, **changes}, metadata)
    with pytest.raises(MindSigmaError, match=r"its (moments|states) are .*delete it and run"):
        FeatureSet(whole).read(0, True)
    assert Extraction(records, whole, Stub(), SMALL, max_length=LENGTH).missing() == [0]


def test_rank_comes_from_flags_or_environment(monkeypatch):
    tool = load_tool("extract_features")
    needed = ["data", "features", "--model", "x"]
    monkeypatch.delenv("RANK_ID", raising=False)
    monkeypatch.delenv("RANK_SIZE", raising=False)
    assert tool.rank_of(tool.build_parser().parse_args(needed)) == [0, 1]
    monkeypatch.setenv("RANK_ID", "3")
    monkeypatch.setenv("RANK_SIZE", "8")
    assert tool.rank_of(tool.build_parser().parse_args(needed)) == [3, 8]
    assert tool.rank_of(tool.build_parser().parse_args([*needed, "--rank", "1"])) == [1, 8]
    for flags in (["--rank", "8"], ["--rank", "-1"], ["--ranks", "0"]):
        with pytest.raises(MindSigmaError):
            tool.rank_of(tool.build_parser().parse_args(needed + flags))
    monkeypatch.setenv("RANK_ID", "x")
    with pytest.raises(MindSigmaError, match="RANK_ID"):
        tool.rank_of(tool.build_parser().parse_args(needed))


def test_another_model_is_another_identity(tmp_path, encoders):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED / "sigma-mini", folder)
    assert Encoders(folder).identity == encoders.identity
    file = folder / "text_encoder" / "model.safetensors"
    data = bytearray(file.read_bytes())
    tensors, _ = read_safetensors(file)
    name = min(tensors, key=lambda name: (tensors[name].size, name))
    place = bytes(data).index(tensors[name].tobytes())
    data[place] ^= 1
    file.write_bytes(data)
    changed = Encoders(folder).identity
    assert [key for key in changed if changed[key] != encoders.identity[key]] == ["text_encoder"]

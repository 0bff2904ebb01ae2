"""Extracted features: equal to what the networks give, complete or absent, shared by ranks, continued after a kill."""

import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load_tool, relative_error
from mindspore import Tensor
from PIL import Image

from mindsigma.checkpoints.safetensors_file import read_safetensors
from mindsigma.data import BucketSampler, FeatureSet, Loader, Records, Resolution, open_data, open_records
from mindsigma.data.conversion import convert
from mindsigma.data.images import training_array
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.locate import BUNDLED
from mindsigma.training.features import Encoders, Extraction

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "extract_features.py"
SMALL = Resolution(64)
CAPTIONS = [("a red apple", "a red apple that lies on a white table"), ("", "three cats on blue"), ("a dog", "")]
LENGTH = 24  # tokens

# Runs a tool that is killed while it writes tensor 8: one of the null caption, 3 each of two records, 1 of a third.
KILLED = """
import os, runpy, signal, sys
from mindsigma.checkpoints import safetensors_writer as writer
count, write = [0], writer.write_pieces
def dying(file, *rest):
    count[0] += 1
    if count[0] == 8:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, *rest)
writer.write_pieces = dying
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
    run = subprocess.run([sys.executable, "-c", KILLED, str(TOOL), str(data), str(folder), *options], cwd=ROOT)
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
    with pytest.raises(MindSigmaError, match="no such file"):
        list(Loader(features, BucketSampler(features, 3, SMALL)).batches(0, 1))
    with pytest.raises(MindSigmaError, match="no folder of features"):
        FeatureSet(tmp_path / "absent")


def test_a_bad_image_is_named(records, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    broken = Records([records[0]._replace(file=str(tmp_path / "bad.png"))])
    with pytest.raises(MindSigmaError, match=r"bad\.png.*prepare_data"):
        extract(broken, tmp_path / "features")


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

"""The subcommands that compare folders of pictures: .npz files in place of folders, what is left out, what is told."""

import json
import shutil

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image

from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.clip import cosines
from mindsigma.evaluation.fid import Statistics, frechet_distance
from mindsigma.evaluation.kernel_distances import cmmd, kid
from mindsigma.evaluation.precision_recall import precision_recall
from mindsigma.pipeline.pictures import save_png


class Pixels:
    """An extractor of the means of an image's channels."""

    size = 3

    def __init__(self, source, *options):
        self.source, self.batch, self.about = source, options[-1], f"means by {source}"

    def prepare(self, image):
        return np.asarray(image, np.float32).mean((0, 1))

    def __call__(self, inputs):
        assert 1 <= len(inputs) <= self.batch
        return np.stack(inputs)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders of pictures, their features, and the tool with a cheap extractor."""
    monkeypatch.setattr("mindsigma.evaluation.features.InceptionFeatures", Pixels)
    random, wanted = np.random.default_rng(0), []
    for name, count in (("a", 9), ("b", 7)):
        (tmp_path / name / "below").mkdir(parents=True)
        pixels = random.integers(0, 256, (count, 5, 6, 3), np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / ("below" if i % 2 else "") / f"{i}.png")
        (tmp_path / name / "bad.jpg").write_bytes(b"no image")
        (tmp_path / name / "notes.txt").write_text("no image either")
        wanted.append(pixels.astype(np.float32).mean((1, 2)))
    return tmp_path, wanted


@pytest.fixture
def tool(folders, monkeypatch):
    """A function that runs a subcommand and returns what it writes as JSON."""

    def run(command, *arguments, output=True):
        result = folders[0] / "result.json"
        more = ["--json", str(result)] if output else []
        monkeypatch.setattr("sys.argv", ["evaluate.py", command, *map(str, arguments), *more])
        assert load_tool("evaluate").main() == 0
        return json.loads(result.read_text()) if output else None

    return run


def test_two_folders(folders, tool, capsys):
    path, (one, other) = folders
    options = ("--images", path / "a", "--reference", path / "b", "--inception", "weights.pth", "--batch-size", "4")
    result = tool("fid", *options)
    assert result["fid"] == pytest.approx(frechet_distance(Statistics.of(one), Statistics.of(other)), rel=1e-9)
    assert (result["images"], result["reference_images"], result["left_out"]) == (9, 7, 2)
    assert result["features"] == "means by weights.pth"
    assert "fid: " in capsys.readouterr().out
    result = tool("kid", *options, "--subsets", "5", "--subset-size", "6", "--seed", "3")
    wanted = kid(sorted_as_files(one), sorted_as_files(other), 5, 6, 3)
    assert (result["kid"], result["deviation"]) == pytest.approx(wanted, rel=1e-6)
    result = tool("precision-recall", *options, "--neighbours", "2")
    assert (result["precision"], result["recall"]) == precision_recall(one, other, 2)


def sorted_as_files(features):
    """In the order of the files: those of the folder itself, of even numbers, then those below."""
    return np.concatenate([features[::2], features[1::2]])


def test_statistics_in_place_of_folders(folders, tool, capsys):
    path, (one, other) = folders
    for name, more in (("a", ()), ("b", ("--features",))):
        tool(
            "statistics",
            "--images",
            path / name,
            "--output",
            path / f"{name}.npz",
            "--inception",
            "w",
            *more,
            output=False,
        )
    shutil.rmtree(path / "a")
    result = tool("fid", "--images", path / "a.npz", "--reference", path / "b.npz")
    assert result["fid"] == pytest.approx(frechet_distance(Statistics.of(one), Statistics.of(other)), rel=1e-9)
    assert (result["images"], result["reference_images"], result["features"]) == (9, 7, "as stored")
    result = tool("kid", "--images", path / "b.npz", "--reference", path / "b", "--inception", "w", "--subsets", "2")
    assert result["reference_images"] == 7
    with pytest.raises(MindSigmaError, match="statistics --features"):
        tool("kid", "--images", path / "a.npz", "--reference", path / "b.npz")
    with pytest.raises(MindSigmaError, match="written as .npz"):
        tool("statistics", "--images", path / "b", "--output", path / "b.txt", "--inception", "w", output=False)


class Angles:
    """A stand-in for Clip: an image is the means of its channels, a text its first three letters."""

    length = 4

    def __init__(self, name):
        self.name = str(name)
        self.network = self
        self.projection_dim = 3

    def open_tokenizer(self):
        pass

    def pixels(self, images):
        return np.stack([np.asarray(image, np.float32) for image in images])

    def features_of_pixels(self, pixels):
        return pixels.mean((1, 2))

    def text_features(self, texts, cut):
        return np.array(
            [[ord(c) - 96 for c in (text if cut == "truncated" else "aaa")[:3]] for text in texts], np.float32
        )

    def count_tokens(self, text):
        return len(text)


def test_cmmd_and_clip(folders, tool, monkeypatch):
    path, (one, other) = folders
    monkeypatch.setattr("mindsigma.evaluation.clip.Clip", Angles)
    result = tool("cmmd", "--images", path / "a", "--reference", path / "b", "--clip", "small", "--batch-size", "4")
    assert result["cmmd"] == pytest.approx(cmmd(one, other), rel=1e-6) and result["features"] == "CLIP small"
    with pytest.raises(MindSigmaError, match="no picture there holds a prompt"):
        tool("clip", "--images", path / "b", "--clip", "small")
    save_png(Image.open(path / "a" / "0.png"), path / "c" / "0.png", {"prompt": "abc", "seed": 1})
    shutil.copy(path / "a" / "2.png", path / "c" / "2.png")
    (path / "c" / "2.txt").write_text("zabcd\n")
    shutil.copy(path / "a" / "4.png", path / "c" / "without.png")
    result = tool("clip", "--images", path / "c", "--clip", "small")
    wanted = cosines(one[[0, 2]], [[1, 2, 3], [26, 1, 2]])
    assert result["truncated"]["cosine"] == pytest.approx(wanted.mean(), rel=1e-6)
    assert result["truncated"]["torchmetrics"] == pytest.approx(100 * wanted.mean(), rel=1e-6)
    assert result["sliced"]["cosine"] == pytest.approx(cosines(one[[0, 2]], np.ones((2, 3))).mean(), rel=1e-6)
    assert (result["pictures"], result["prompts_too_long"], result["left_out"]) == (2, 1, 1)

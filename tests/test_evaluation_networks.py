"""Inception and CLIP against the original programs' outputs, for weights drawn by one rule."""

import json
import shutil
import threading
import zipfile
import zlib

import numpy as np
import pytest
from conftest import GOLDEN
from mindspore import Tensor
from PIL import Image
from safetensors.numpy import save_file

from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.clip import Clip, cosines, cut_ids, scores
from mindsigma.evaluation.features import InceptionFeatures, batched, features_of, statistics_of
from mindsigma.evaluation.inception import features, load_inception
from mindsigma.evaluation.inception_inputs import clean_resized, prepared

FOLDER = GOLDEN / "evaluation"
LIMIT = 1e-4  # of Inception's features; a wrong pool shows as 0.08, wrong corners as 0.0036


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(FOLDER / "inception.npz"))


def drawn(seed, name, shape):
    """The value of a tensor of the reference case."""
    z = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if name.endswith("running_var"):
        return 1 + np.float32(0.1) * np.abs(z)
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * z
    if len(shape) == 1:
        return np.float32(0.1) * z
    return z * np.float32((2 / np.prod(shape[1:])) ** 0.5)


@pytest.fixture(scope="module")
def weights(golden, tmp_path_factory):
    """Path of the drawn weights of Inception, without the classifier, which tells the two networks apart."""
    names, seed = json.loads(str(golden["names"])), int(golden["seed"])
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    tensors = {name: drawn(seed, name, shape) for name, shape in names.items() if not name.startswith("fc.")}
    save_file({name: np.asarray(value, np.float32) for name, value in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def network(weights):
    return load_inception(weights)


def inputs(golden, resize, chosen=(0, 1, 2)):
    return np.stack([prepared(golden[f"image_{i}"], resize) for i in chosen])


def test_inception_of_pytorch_fid(golden, network):
    *blocks, last = network.stages(Tensor(inputs(golden, "pytorch-fid")))
    for i, block in enumerate(blocks):
        assert np.abs(block.asnumpy().mean((2, 3)) - golden[f"block{i}"]).max() < 1e-5
    assert np.abs(last.asnumpy().mean((2, 3)) - golden["pytorch_fid"]).max() < LIMIT


def test_inception_of_clean_fid(golden, network):
    found = features(network, inputs(golden, "clean", (1, 2)))  # enlarged and made smaller
    assert np.abs(found - golden["clean_fid"][1:]).max() < LIMIT


def test_clean_resize(golden):
    resized = clean_resized(Image.fromarray(golden["image_0"]))
    assert np.abs(resized[::23, ::23] - golden["clean_resized_0"]).max() < 1e-3


def test_inception_of_textatlas(golden, weights):
    """torchvision's: the weights are drawn by the same rule under the same names, but for the classes."""
    network = load_inception(weights, "torchvision")
    found = features(network, inputs(golden, "textatlas", (1, 2)))
    assert np.abs(found - golden["textatlas"][1:]).max() < LIMIT


def test_batches_are_filled_and_bad_images_left_out(golden, weights, monkeypatch):
    monkeypatch.setattr("mindsigma.evaluation.features.load_inception", lambda *_: None)
    seen = []

    def mean_of(network, images):
        seen.append(len(images))
        return images.mean((2, 3))

    monkeypatch.setattr("mindsigma.evaluation.features.features", mean_of)

    def read(source):
        if source is None:
            raise MindSigmaError("no image")
        return Image.fromarray(golden[f"image_{source}"])

    extract = InceptionFeatures(weights, batch=2)
    found = list(batched(extract, [0, None, 1, None, None, 2, None, None], read))
    assert [places for places, _ in found] == [[0], [2], [5]] and seen == [2, 2, 2]
    wanted = [prepared(golden[f"image_{i}"], "pytorch-fid").mean((1, 2)) for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([values for _, values in found]), np.stack(wanted))


def test_bad_inception_weights(tmp_path):
    def refused(path, match, variant="fid"):
        with pytest.raises(MindSigmaError, match=match) as caught:
            load_inception(path, variant)
        assert str(path) in str(caught.value)

    refused(tmp_path / "absent.pth", "curl -LO https://github.com/mseitzer/pytorch-fid")
    few = {"fc.weight": np.zeros((1008, 2048), np.float32)}
    few["Conv2d_1a_3x3.bn.weight"] = np.ones(32, np.float32)
    save_file(few, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "1008 classes", "torchvision")
    refused(tmp_path / "a.safetensors", "Conv2d_1a_3x3.bn.bias is missing, expected \\(32,\\)")
    with zipfile.ZipFile(tmp_path / "inception.pt", "w") as archive:
        archive.writestr("inception/code/__torch__.py", "import os")
        archive.writestr("inception/constants.pkl", b"")
    refused(tmp_path / "inception.pt", "TorchScript")


@pytest.fixture(scope="module")
def clip_golden():
    return dict(np.load(FOLDER / "clip.npz"))


@pytest.fixture(scope="module")
def clip(clip_golden, tmp_path_factory):
    """The small random CLIP of the reference case, in a folder as on the hub."""
    pytest.importorskip("mindone.transformers", reason="mindone is not installed")
    folder = tmp_path_factory.mktemp("clip")
    shutil.copy(FOLDER / "clip.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(str(clip_golden["config"]))
    return Clip(folder)


def test_clip_features(clip, clip_golden):
    images = [Image.fromarray(clip_golden[f"image_{i}"]) for i in range(4)]
    assert np.abs(clip.pixels(images) - clip_golden["pixel_values"]).max() < 1e-5
    assert np.abs(clip.image_features(images) - clip_golden["image_features"]).max() < 1e-5
    for cut in ("sliced", "truncated"):
        found = clip.features_of_tokens(clip_golden[f"input_ids_{cut}"], clip_golden["attention_mask_sliced"])
        assert np.abs(found - clip_golden[f"text_features_{cut}"]).max() < 1e-5


def test_clip_scores(clip_golden):
    found = {}
    for cut in ("sliced", "truncated"):
        found[cut] = cosines(clip_golden["image_features"], clip_golden[f"text_features_{cut}"])
        assert np.abs(found[cut] - clip_golden[f"cosine_{cut}"]).max() < 1e-6
    assert abs(scores(found["sliced"].mean(), 0)["cosine"] - clip_golden["clip_score"]) < 1e-6
    cut = found["truncated"]
    made = scores(cut.mean(), np.maximum(cut, 0).mean())
    assert abs(made["torchmetrics"] - clip_golden["clip_score_torchmetrics"]) < 1e-5
    assert abs(made["hessel"] - clip_golden["clipscore_hessel"]) < 1e-5


def test_cut_prompts(clip_golden):
    for cut in ("sliced", "truncated"):
        for i, length in enumerate((5, 20, 90, 77)):
            row = cut_ids(clip_golden["input_ids"][i, :length].tolist(), 77, cut)
            assert row == clip_golden[f"input_ids_{cut}"][i, : min(length, 77)].tolist()


def test_texts_through_the_tokenizer(clip, tmp_path):
    """A byte-level vocabulary of single letters: long prompts lose their end token where they are sliced."""
    folder = tmp_path / "clip"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((clip.folder / name).read_bytes())
    with pytest.raises(MindSigmaError, match="vocab.json"):
        Clip(folder).open_tokenizer()
    vocabulary = {f"{letter}</w>": i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    vocabulary.update({"<|startoftext|>": 510, "<|endoftext|>": 511})
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    opened = Clip(folder)
    long = " ".join("a" * 100)
    ids, mask = opened.tokens(["b c", long], "truncated")
    assert ids[0, :4].tolist() == [510, 1, 2, 511] and mask.sum(1).tolist() == [4, 77]
    assert ids[1, 0] == 510 and ids[1, -1] == 511 and set(ids[1, 1:-1]) == {0}
    assert opened.tokens([long], "sliced")[0][0, -1] == 0 and opened.count_tokens(long) == 102
    # Without its end every long prompt is one and the same to CLIP.
    sliced = opened.text_features([long, " ".join("b" * 100)], "sliced")
    assert np.array_equal(sliced[0], sliced[1])


def test_bad_clip_folders(tmp_path, clip):
    for path, match in ((tmp_path / "no folder", "no such folder"), (tmp_path, "lacks config.json or weights")):
        with pytest.raises(MindSigmaError, match=match):
            Clip(path)
    with pytest.raises(MindSigmaError, match="hf download openai/absent-model"):
        Clip("openai/absent-model")


class Meeting:
    """Two processes as two threads: what each sends, both get."""

    def __init__(self):
        self.barrier, self.sent = threading.Barrier(2, timeout=30), [None, None]

    def all_sent(self, rank, value):
        self.barrier.wait()
        self.sent[rank] = value
        self.barrier.wait()
        return list(self.sent)


class Together(Collectives):
    """The Collectives of one of two threads."""

    def __init__(self, rank, meeting):
        self.ranks, self.alone, self.meeting = Ranks(rank, 2), False, meeting

    def total(self, values):
        return np.sum(self.meeting.all_sent(self.ranks.rank, np.asarray(values, np.float32)), 0).tolist()

    def gather(self, tensor):
        return Tensor(np.stack(self.meeting.all_sent(self.ranks.rank, tensor.asnumpy())))


class Pixels:
    """An extractor of three numbers of an image."""

    size, batch = 3, 4

    def prepare(self, image):
        return np.asarray(image, np.float32).mean((0, 1))

    def __call__(self, inputs):
        return np.stack(inputs)


@pytest.mark.parametrize("count", [1, 11])
def test_two_processes_share_features_and_statistics(count):
    """Sums of float64 arrive in all their digits, and a process without an image is none too many."""
    random = np.random.default_rng(1)
    images = [Image.fromarray(random.integers(0, 256, (5, 7, 3), np.uint8)) for _ in range(count)] + [None]

    def read(image):
        if image is None:
            raise MindSigmaError("no image")
        return image

    wanted = np.stack([Pixels().prepare(image) for image in images[:-1]])
    meeting, results = Meeting(), [None, None]

    def work(rank):
        together = Together(rank, meeting)
        running, left = statistics_of(Pixels(), images, together, read)
        results[rank] = running, left, features_of(Pixels(), images, together, read)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for running, left, found in results:
        assert (running.count, left) == (count, 1)
        np.testing.assert_allclose(running.mean, wanted.astype(np.float64).mean(0), rtol=1e-14)
        deviations = wanted - wanted.astype(np.float64).mean(0)
        np.testing.assert_allclose(running.scatter, deviations.T @ deviations, rtol=1e-12, atol=1e-20)
        assert np.array_equal(np.sort(found, 0), np.sort(wanted, 0))

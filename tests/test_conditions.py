"""Condition pictures: their definitions, folders of them, features and batches with them."""

import shutil

import cv2
import numpy as np
import pytest
from conftest import load_tool
from PIL import Image
from test_data_features import LENGTH, SMALL, Stub, extract, sample_files

from mindsigma.data import BucketSampler, FeatureSet, Loader, Records, open_data, open_records
from mindsigma.data.conditions import Condition
from mindsigma.data.images import cover_and_crop, to_array
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.training.extraction import Extraction


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Four images of two shapes, and a folder with a condition of each, which is its negative in another format."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for i in range(4):
        height, width = [(80, 80), (64, 100)][i % 2]
        pixels = np.random.default_rng(i).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        path = folder / "photos" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        other = folder / "conditions" / f"{i}.webp"
        other.parent.mkdir(exist_ok=True)
        Image.fromarray(255 - np.asarray(image)).save(other, lossless=True)
        rows.append(Record(path.name, f"picture {i}", "", height, width, str(path)))
    return Records(rows)


@pytest.fixture
def folder(records, tmp_path):
    """A copy of the folder of conditions."""
    source = records[0].file.rsplit("/photos/", 1)[0]
    return shutil.copytree(f"{source}/conditions", tmp_path / "conditions")


def picture(seed=0, size=(48, 32)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_canny_is_opencvs():
    for text, thresholds in (("canny", (100, 200)), ("canny:20:60", (20, 60))):
        found = np.asarray(Condition.of(text).computed(picture()))
        wanted = cv2.Canny(np.asarray(picture()), *thresholds)
        assert found.shape == (32, 48, 3) and found.dtype == np.uint8 and 0 < wanted.mean() < 255
        for channel in range(3):
            np.testing.assert_array_equal(found[..., channel], wanted)


def test_edges_are_sobels_gradient():
    """Of OpenCV's Sobel, without the Gaussian; and a step of 60 in one channel gives 2 * 60 on both of its sides."""
    source = np.asarray(picture(), np.float32)
    across, down = (cv2.Sobel(source, cv2.CV_32F, *axis, borderType=cv2.BORDER_REPLICATE) for axis in ((1, 0), (0, 1)))
    wanted = np.minimum(np.hypot(across, down).max(-1) / 2, 255)
    found = np.asarray(Condition.of("edges:0").computed(picture()), np.float32)
    np.testing.assert_allclose(found[..., 1], wanted, atol=0.5001)
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:, 2] = 60
    found = np.asarray(Condition.of("edges:0").computed(Image.fromarray(step)))
    assert (found[:, 3:5] == 120).all() and not found[:, :3].any() and not found[:, 5:].any()


def test_blur_and_tile_keep_means():
    source = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 48, 3), np.uint8))
    blurred = np.asarray(Condition.of("blur:2").computed(source), np.float32)
    assert abs(blurred.mean() - np.asarray(source).mean()) < 2
    assert (
        np.abs(np.diff(blurred, axis=0)).mean() < 0.6 * np.abs(np.diff(np.asarray(source, np.float32), axis=0)).mean()
    )
    cells = np.repeat(np.repeat(np.array([[10, 90], [50, 200]], np.uint8), 8, 0), 8, 1)
    cells[::2] -= 4  # lost with the details
    cells[1::2] += 4
    tile = np.asarray(Condition.of("tile:8").computed(Image.fromarray(np.stack([cells] * 3, -1))))[..., 0]
    assert (tile[0, 0], tile[0, -1], tile[-1, 0], tile[-1, -1]) == (10, 90, 50, 200)
    assert (tile[0, 4:12] == np.round(10 + 80 * (np.arange(8) + 0.5) / 8)).all()  # bilinear between centres


@pytest.mark.parametrize(
    "text,said",
    [
        ("cany", "must be one of canny, edges, blur, tile"),
        ("canny:1", "write canny, or canny:LOW:HIGH"),
        ("canny:200:100", "LOW must not be above HIGH"),
        ("blur:nan", "RADIUS must lie in"),
        ("tile:0", "FACTOR must lie in"),
        ("edges:1:2", "write edges, or edges:SIGMA"),
        ("canny\n:x", "not canny"),
    ],
)
def test_wrong_kinds(text, said):
    with pytest.raises(MindSigmaError, match=said) as caught:
        Condition.of(text)
    assert "\n" not in str(caught.value)


def test_both_or_an_absent_folder(tmp_path):
    with pytest.raises(MindSigmaError, match="give one"):
        Condition.of("canny", str(tmp_path))
    with pytest.raises(MindSigmaError, match="no such folder"):
        Condition.of(None, str(tmp_path / "x"))
    assert Condition.of(None) is None


def moments_of(image):
    return Stub().moments(to_array(image)[None])[0]


@pytest.mark.parametrize("kind", ["canny", "folder"])
def test_extraction_stores_what_is_made_of_the_same_crop(records, folder, tmp_path, kind):
    condition = Condition.of("canny") if kind == "canny" else Condition.of(None, str(folder))
    assert extract(records, tmp_path / "features", condition=condition) == 0
    features = FeatureSet(tmp_path / "features")
    assert features.has_condition and features.config["condition"]["kind"] == kind
    for i in range(4):
        cut = cover_and_crop(records.image(i), 64, 64, "bilinear")
        wanted = Condition.of("canny").computed(cut)
        if kind == "folder":
            wanted = cover_and_crop(Image.fromarray(255 - np.asarray(records.image(i))), 64, 64, "bilinear")
        np.testing.assert_array_equal(features.condition(i), moments_of(wanted))
        np.testing.assert_array_equal(features.read(i, True)[0], moments_of(cut))


def test_shards_hold_them_too(records, folder, tmp_path):
    """The same arrays as files; a picture that was replaced is extracted again."""
    condition, sharded = Condition.of(None, str(folder)), tmp_path / "shards"
    extract(records, tmp_path / "files", condition=condition)

    def extracted():
        extraction = Extraction(
            records, sharded, Stub(), SMALL, max_length=LENGTH, shard_records=3, condition=condition
        )
        count = extraction.run_shards()
        assert extraction.finish() == 0
        return count

    assert (extracted(), extracted()) == (4, 0)
    files, shards = FeatureSet(tmp_path / "files"), open_data(sharded)
    assert shards.has_condition
    for i in range(4):
        np.testing.assert_array_equal(shards.condition(i), files.condition(i))
        shards.require_sound(i)
    Image.new("RGB", (100, 64), "red").save(folder / "1.webp", lossless=True)
    assert extracted() == 1
    np.testing.assert_array_equal(open_data(sharded).condition(1), moments_of(Image.new("RGB", (64, 64), "red")))


def test_extraction_is_continued_and_follows_the_pictures(records, folder, tmp_path):
    """What is there stays; a picture that was replaced, removed or put back is done again, alone."""
    condition, features = Condition.of(None, str(folder)), tmp_path / "features"
    assert extract(records, features, rank=0, ranks=2, condition=condition) == 2
    stamps = {name: path.stat().st_mtime_ns for name, path in sample_files(features).items()}

    def changed(encoded):
        encoders = Stub()
        assert extract(records, features, encoders, condition=condition, batch_size=1) == 0
        assert encoders.images == 2 * encoded
        now = {name: path.stat().st_mtime_ns for name, path in sample_files(features).items()}
        different = [name for name in now if now[name] != stamps.get(name)]
        stamps.update(now)
        return len(different)

    assert changed(2) == 2 and changed(0) == 0
    kept = (folder / "1.webp").read_bytes()
    Image.new("RGB", (100, 64), "red").save(folder / "1.webp", lossless=True)
    assert changed(1) == 1
    np.testing.assert_array_equal(FeatureSet(features).condition(1), moments_of(Image.new("RGB", (64, 64), "red")))
    (folder / "1.webp").unlink()
    assert changed(0) == 1 and len(FeatureSet(features)) == 3
    assert "no picture of this name" in (features / "left_out.txt").read_text()
    (folder / "1.webp").write_bytes(kept)
    assert changed(1) == 1 and len(FeatureSet(features)) == 4
    with pytest.raises(MindSigmaError, match="holds features made with condition"):
        extract(records, features)


def test_pictures_of_another_shape_are_left_out(records, folder, tmp_path):
    Image.new("RGB", (80, 64)).save(folder / "0.webp")
    assert extract(records, tmp_path / "features", condition=Condition.of(None, str(folder))) == 0
    assert "64 x 80, its image 80 x 80, which is another shape" in (tmp_path / "features" / "left_out.txt").read_text()


def test_names_do_not_lead_out_of_the_folder(records, folder):
    with pytest.raises(MindSigmaError, match="leads out of"):
        Condition.of(None, str(folder)).companion(records[0]._replace(key="../photos/0.png"))


def batch_of(source, condition=None, **options):
    sampler = BucketSampler(source, 4, SMALL, 0)
    return next(Loader(source, sampler, max_length=LENGTH, threads=1, condition=condition, **options).batches(0, 1))


def test_batches(records, tmp_path):
    """Image and condition are mirrored together; features give the moments; draws tell which conditions are dropped."""
    condition = Condition.of("canny")
    plain, mirrored = batch_of(records, condition), batch_of(records, condition, flip=1.0)
    np.testing.assert_array_equal(mirrored.images, plain.images[..., ::-1])
    np.testing.assert_array_equal(mirrored.control_images, plain.control_images[..., ::-1])
    assert set(np.unique(plain.control_images)) == {-1.0, 1.0} and not plain.control_dropped.any()
    assert batch_of(records).control_images is None and plain.control_moments is None
    extract(records, tmp_path, condition=condition)
    features = FeatureSet(tmp_path)
    batch = batch_of(features, condition_dropout=0.5)
    order = [int(text.split()[1]) for text in batch.captions]
    np.testing.assert_array_equal(batch.control_moments, np.stack([features.condition(i) for i in order]))
    drops = [
        batch_of(features, condition_dropout=share, seed=seed).control_dropped
        for share in (0.5, 1.0)
        for seed in range(9)
    ]
    assert 9 < np.sum(drops[:9]) < 27 and np.all(drops[9:])


@pytest.mark.parametrize(
    "fault,said",
    [
        ("missing", "no picture of this name is the condition of"),
        ("shape", "64 x 80, its image 80 x 80, which is another shape"),
        ("text", "0.webp: not an image"),
    ],
)
def test_a_condition_that_cannot_be_read_is_named(records, folder, fault, said):
    """In one line with its remedy; or another record takes the place, if some may be left out."""
    file, condition = folder / "0.webp", Condition.of(None, str(folder))
    file.unlink()
    if fault == "shape":
        Image.new("RGB", (80, 64)).save(file)
    elif fault == "text":
        file.write_text("no picture")
    with pytest.raises(MindSigmaError, match=said) as error:
        batch_of(records, condition, max_bad_images=0)
    assert "\n" not in str(error.value) and "--max-bad-images N leaves out up to N" in str(error.value)
    with pytest.warns(UserWarning, match=said):
        batch = batch_of(records, condition, max_bad_images=1)
    assert "picture 0" not in batch.captions and len(batch.captions) == 4


def test_a_condition_for_drawing(records, tmp_path, monkeypatch):
    """The tool writes what extraction makes of the same picture, and leaves what is there."""
    tool = load_tool("make_condition")
    for _ in range(2):
        arguments = [records[1].file, tmp_path / "edges.png", "--condition", "canny", "--height", 64, "--width", 64]
        monkeypatch.setattr("sys.argv", ["make_condition.py", *map(str, arguments)])
        assert tool.main() == 0
    found = [np.asarray(Image.open(tmp_path / name)) for name in ("edges.png", "edges-2.png")]
    cut = cover_and_crop(records.image(1), 64, 64, "lanczos")
    for one in found:
        np.testing.assert_array_equal(one, np.asarray(Condition.of("canny").computed(cut)))


@pytest.mark.parametrize("change,said", [(["--height", "64"], "belong together"), (["--condition", "x"], "one of")])
def test_wrong_options_of_the_tool(records, tmp_path, monkeypatch, change, said):
    arguments = ["make_condition.py", records[0].file, str(tmp_path / "x.png"), "--condition", "canny", *change]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(MindSigmaError, match=said):
        load_tool("make_condition").main()
    assert not list(tmp_path.iterdir())


def test_pairs_of_a_data_set_read_from_disk(records, folder):
    """A folder data set finds its conditions by the names of its images."""
    photos = folder.parent / "photos"
    shutil.copytree(records[0].file.rsplit("/", 1)[0], photos)
    for i in range(4):
        (photos / f"{i}.txt").write_text(f"picture {i}")
    found = open_records(photos, progress=False)
    names = {Condition.of(None, str(folder)).companion(record).file for record in found}
    assert names == {str(folder / f"{i}.webp") for i in range(4)}

"""Runs whose data are bad or change: bad images are left out and counted, removed ones leave the run as it would be."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from training_runs import assert_same, checkpoint, log_lines, run_here, square_features, write_network

from mindsigma.data import FeatureSet, Records, Resolution, open_data
from mindsigma.data.feature_shards import Translation
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.training.prior import draw_class_images
from mindsigma.training.record_list import RecordList
from mindsigma.training.run_options import build_parser
from mindsigma.training.trainer import fitting
from mindsigma.weights.formats.safetensors_file import read_safetensors

STEPS, BAD = 4, "5.jpg"


def train(network, data, output, **changes):
    """Train in this process; the Trainer afterwards."""
    changes = {"optimizer": "adamw", "steps": STEPS, "batch_size": 2, "save_every": 1, **changes}
    return run_here(build_parser().parse_args, (network, data), output, **changes)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("network") / "network")


@pytest.fixture
def images(tmp_path):
    """Eight images with captions, one of them cut off behind a sound header."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.jpg")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    data = (folder / BAD).read_bytes()
    (folder / BAD).write_bytes(data[: len(data) * 2 // 3])
    return folder


def test_a_bad_image_ends_no_run_and_removing_it_changes_none(network, images, tmp_path):
    """Left out with a warning; or the run stops where it is drawn, and goes on to the same weights without it."""
    with pytest.warns(UserWarning, match=rf"{BAD}: .*truncated.*; another takes its place \(1 so far\)"):
        trainer = train(network, images, tmp_path / "whole", save_every=STEPS)
    assert list(trainer.loader.bad) == [5] and trainer.step == STEPS
    replaced = [line["step"] for line in log_lines(tmp_path / "whole") if "replaced" in line]
    assert len(replaced) == 1 and replaced[0] > 1

    strict = {"max_bad_images": 0}
    with pytest.raises(MindSigmaError, match=rf"{BAD}: .*truncated.*remove.*the same command goes on"):
        train(network, images, tmp_path / "strict", **strict)
    assert log_lines(tmp_path / "strict")[-1]["step"] == replaced[0] - 1
    for file in images.glob("5.*"):
        file.unlink()
    trainer = train(network, images, tmp_path / "strict", **strict)
    assert trainer.records.gone == 1 and not trainer.loader.bad
    assert_same(checkpoint(tmp_path / "strict", STEPS), checkpoint(tmp_path / "whole", STEPS))
    assert log_lines(tmp_path / "strict") == log_lines(tmp_path / "whole")


def test_features_that_were_removed_or_damaged(network, tmp_path, capsys):
    """As images; what is new or changed is still told, by name."""
    features = square_features(tmp_path / "features", 6)
    train(network, features, tmp_path / "run", steps=1)
    index, lines = features / "index.jsonl", (features / "index.jsonl").read_text().splitlines(keepends=True)
    index.write_text("".join(lines[:2] + lines[3:]))
    trainer = train(network, features, tmp_path / "run", steps=2)
    assert trainer.records.gone == 1 and "1 records of the run are gone" in capsys.readouterr().out
    for changed, said in (
        ([*lines, lines[0].replace("0.png", "7.png")], "1 records are new, e.g. 7.png"),
        ([*lines[:5], lines[5].replace("picture 5", "another")], "5.png has another caption or size"),
        (lines[:2], "4 of 6 records are gone"),
    ):
        index.write_text("".join(changed))
        with pytest.raises(MindSigmaError, match=rf"data .* of the fingerprint .*{said}.*--overwrite"):
            train(network, features, tmp_path / "run", steps=3)
    index.write_text("".join(lines))
    for file in (features / "samples").rglob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(MindSigmaError, match=r"can be read.*\.safetensors.*extract_features"):
        train(network, features, tmp_path / "run", steps=3)


def test_a_run_goes_on_with_its_features_in_shards(network, tmp_path):
    """To the weights that it would have had; data are the same in either form."""
    features = square_features(tmp_path / "features", 6)
    assert Translation(FeatureSet(features), tmp_path / "shards", 4).run() == 0
    train(network, features, tmp_path / "whole", steps=2)
    train(network, features, tmp_path / "run", steps=1)
    trainer = train(network, tmp_path / "shards", tmp_path / "run", steps=2)
    assert trainer.records.fingerprint == open_data(features).fingerprint() and trainer.step == 2
    assert_same(checkpoint(tmp_path / "run", 2), checkpoint(tmp_path / "whole", 2))


def test_class_images_take_nobodys_place(tmp_path):
    """What is no drawn image of this prompt is told, not replaced, not waited for."""

    def draw():
        draw_class_images(lambda *_, **__: pytest.fail("drawn"), tmp_path, "an alien", 1, seed=0)

    image, text = tmp_path / "000000.png", tmp_path / "000000.txt"
    image.write_bytes(b"mine")
    with pytest.raises(MindSigmaError, match=r"000000\.png: has no 000000\.txt"):
        draw()
    assert image.read_bytes() == b"mine"
    text.write_bytes(b"\xff")
    with pytest.raises(MindSigmaError, match=r"000000\.txt: not UTF-8"):
        draw()
    for path in (text, image):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(MindSigmaError, match=f"{path.name}: is in the way"):
            draw()
        path.unlink()
        path.write_text("an alien")
    draw()


def test_another_number_of_processes_is_told_how_it_takes_the_batch():
    assert fitting(64, 8) == "8 processes take it with --batch-size x --accumulation = 8"
    assert fitting(64, 3) == "3 processes cannot share it equally, 2 can"


# the list of records, without a run


def record(i, **changes):
    return Record(f"{i}.png", f"picture {i}", "", 64, 64 + i, "")._replace(**changes)


def test_a_list_holds_the_order_of_a_run(tmp_path):
    then, file = Records([record(i) for i in range(5)]), tmp_path / "data.safetensors"
    RecordList(then, file).write()
    now = Records([record(i, file="elsewhere") for i in (4, 0, 3)])
    kept = RecordList(now, file, resumed=True)
    assert kept.places.tolist() == [1, -1, -1, 2, 0] and kept.gone == 2 and kept.fingerprint == then.fingerprint()
    assert np.array_equal(kept.sizes, then.sizes)
    before = file.read_bytes()
    kept.write()
    assert file.read_bytes() == before
    anew = RecordList(now, file)
    assert anew.places.tolist() == [0, 1, 2] and anew.fingerprint == now.fingerprint() and not anew.gone
    anew.write()
    assert file.read_bytes() != before


@pytest.mark.parametrize(
    "rows, said",
    [
        ([record(0), record(1), record(2, prompt="other")], "2.png has another caption or size"),
        ([record(0), record(1), record(2, height=65)], "2.png has another caption or size"),
        ([record(i) for i in range(4)], "1 records are new, e.g. 3.png"),
        ([record(0, key="a\nb")], r"new, e.g. a\\nb"),
        ([record(1)], "2 of 3 records are gone"),
    ],
)
def test_other_data_are_told(tmp_path, rows, said):
    file = tmp_path / "data.safetensors"
    RecordList(Records([record(i) for i in range(3)]), file).write()
    now = Records(rows)
    other = RecordList(now, file, resumed=True)
    assert other.fingerprint == now.fingerprint() and not other.gone
    with pytest.raises(MindSigmaError, match=said):
        raise MindSigmaError(other.difference)


def test_a_damaged_list_stops_nobody_whose_data_are_the_same(tmp_path):
    records, file = Records([record(i) for i in range(3)]), tmp_path / "data.safetensors"
    RecordList(records, file).write()
    whole = file.read_bytes()
    assert set(read_safetensors(file)[0]) == {"keys", "contents", "sizes"}
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        kept = RecordList(records, file, resumed=True)
        assert kept.fingerprint == records.fingerprint() and kept.places.tolist() == [0, 1, 2]
        fewer = RecordList(Records([record(0), record(2)]), file, resumed=True)
        assert fewer.difference or fewer.gone == 1
    kept.write()
    file.write_bytes(whole[:50])
    RecordList(records, file, resumed=True).write()
    assert file.read_bytes() == whole


def test_images_do_not_stand_for_features(tmp_path):
    features = FeatureSet(square_features(tmp_path / "features", 3))
    file = tmp_path / "data.safetensors"
    RecordList(features, file).write()
    assert RecordList(open_data(features.path), file, resumed=True).fingerprint == features.fingerprint()
    images = Records([Record(key, *row[:2], *row[2], "") for key, *row in features])
    assert "images" in RecordList(images, file, resumed=True).difference
    assert features.resolution == Resolution(64)
    shutil.rmtree(features.path)

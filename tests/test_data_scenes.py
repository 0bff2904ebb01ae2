"""Composed scenes: captions tell what is drawn and where, the held-out split holds, the tools write data sets."""

import contextlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from killing import killed_everywhere

from mindsigma.data import open_records
from mindsigma.data.scenes import (
    COLOURS,
    Placed,
    Scene,
    SceneMaker,
    Thing,
    draw,
    is_held_out,
    load_things,
    plural,
    with_article,
)
from mindsigma.errors import MindSigmaError
from mindsigma.weights.locate import BUNDLED

ROOT = Path(__file__).resolve().parent.parent


def run(tool, *arguments):
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def things():
    return load_things()


def test_every_sprite_has_a_name_and_the_other_way_round(things):
    stems = {path.stem for path in (BUNDLED / "emoji" / "sprites").glob("*.webp")}
    assert {thing.stem for thing in things} == stems and len(stems) == len(things) == 990
    assert len({thing.name for thing in things}) == 990


def test_captions_tell_the_scene(things):
    maker, kinds = SceneMaker(things, seed=1), {"one": 0, "pair": 0, "counted": 0}
    words = {"two": 2, "three": 3, "four": 4}
    for number in range(1500):
        caption, colour, objects = maker.scene(number)
        names = {placed.thing.name for placed in objects}
        for placed in objects:
            called = placed.thing.name in caption or plural(placed.thing.name) in caption
            assert called or sum(tag in caption or plural(tag) in caption for tag in placed.thing.tags) >= 2, caption
        assert caption.endswith((f"on a {colour} background", f"on {colour}", f", {colour} background")) or (
            colour == "white"
        )
        word = caption.split()[0]
        if word in words and len(objects) == words[word] and len(names) == 1:
            kinds["counted"] += 1
        elif len(objects) == 2:
            kinds["pair"] += 1
            (ax, ay), (bx, by) = (placed.centre for placed in objects)
            order = {" to the left of ": ax < bx, " to the right of ": ax > bx, " above ": ay < by, " below ": ay > by}
            assert all(holds for relation, holds in order.items() if relation in caption), caption
        else:
            kinds["one"] += 1
            assert len(objects) == 1
            if caption.startswith("a small "):
                assert objects[0].size < 0.5
    shares = {kind: count / 1500 for kind, count in kinds.items()}
    assert abs(shares["one"] - 0.6) < 0.04 and abs(shares["pair"] - 0.25) < 0.04


def test_scenes_follow_from_seed_and_number(things):
    one, same, other = (SceneMaker(things, seed=seed) for seed in (1, 1, 2))
    assert [one.scene(i) for i in (5, 3)] == [same.scene(5), same.scene(3)] and one.scene(5) != other.scene(5)
    assert draw(one.scene(5), 64, 96).tobytes() == draw(same.scene(5), 64, 96).tobytes()


@pytest.mark.parametrize("height, width", [(64, 64), (48, 96), (128, 32)])
def test_things_are_where_they_belong(height, width):
    thing = next(thing for thing in load_things() if thing.name == "red apple")
    places = [(0.27, 0.5), (0.73, 0.5)] if width >= height else [(0.5, 0.27), (0.5, 0.73)]
    scene = Scene("", "blue", [Placed(thing, place, 0.45) for place in places])
    pixels = np.asarray(draw(scene, height, width)).astype(int)
    assert pixels.shape == (height, width, 3) and tuple(pixels[0, 0]) == COLOURS["blue"]
    drawn = np.abs(pixels - COLOURS["blue"]).sum(-1) > 60
    half = (slice(None), slice(0, width // 2)) if width >= height else (slice(0, height // 2), slice(None))
    rows, columns = np.nonzero(drawn[half])
    short = min(height, width)
    assert abs(columns.mean() + 0.5 - places[0][0] * width) < 0.06 * short
    assert abs(rows.mean() + 0.5 - places[0][1] * height) < 0.06 * short
    extent = max(np.ptp(columns), np.ptp(rows)) + 1
    assert 0.7 * 0.45 * short < extent <= round(0.45 * short)


def test_held_out_compositions_never_appear_in_training(things):
    things = things[:40]
    maker = SceneMaker(things, seed=3, held_out=0.2)
    train = set().union(*(maker.scene(i).compositions() for i in range(800)))
    for number in range(150):
        scene = maker.scene(number, held_out=True)
        assert not scene.compositions() <= train  # something in it was never shown
        assert is_held_out(scene, 0.2)
    other = SceneMaker(things, seed=4, held_out=0.2)
    assert not any(is_held_out(other.scene(i), 0.2) for i in range(200))  # the split does not depend on the seed
    pairs = [c for c in train if c[1] not in COLOURS]
    assert pairs and all(first < second for first, second in pairs)


def test_grammar():
    assert [with_article(word) for word in ("apple", "cat")] == ["an apple", "a cat"]
    assert [plural(word) for word in ("cat", "fox", "berry", "monkey", "torch", "bus")] == [
        "cats",
        "foxes",
        "berries",
        "monkeys",
        "torches",
        "buses",
    ]
    scene = Scene("", "red", [Placed(Thing("s", name, ()), (0, 0), 1) for name in ("b", "a")])
    assert scene.compositions() == {("a", "red"), ("b", "red"), ("a", "b")}


def test_things_by_name():
    assert [thing.name for thing in load_things(only=["cat"])] == ["cat"]
    assert len(load_things(exclude=["cat", "dog"])) == 988
    with pytest.raises(MindSigmaError, match="red apple"):
        load_things(only=["red aple"])
    with pytest.raises(MindSigmaError, match="left"):
        load_things(only=["cat"], exclude=["cat"])
    with pytest.raises(MindSigmaError, match="no held-out scene"):
        SceneMaker(load_things(only=["cat"])).scene(0, held_out=True)


def test_the_tool_writes_data_sets_that_the_other_tool_reads(tmp_path):
    out = tmp_path / "scenes"
    flags = ["--count", 24, "--aspect-ratios", "0.78,1.0,1.29", "--held-out", 0.2, "--held-out-count", 3]
    made = run("make_scenes", out, *flags)
    assert made.returncode == 0, made.stderr
    records = open_records(out / "train", strict=True, progress=False)
    assert len(records) == 24 and len(open_records(out / "held-out", strict=True, progress=False)) == 3
    sizes, counts = np.unique(records.sizes, axis=0, return_counts=True)
    assert sizes.tolist() == [[224, 288], [256, 256], [288, 224]] and counts.tolist() == [8, 8, 8]
    maker = SceneMaker(load_things(), held_out=0.2)
    assert [record.prompt for record in records] == [maker.scene(i).caption for i in range(24)]
    row = json.loads((out / "train" / "InternData" / "data_info.json").read_text())[0]
    assert set(row) == {"path", "prompt", "sharegpt4v", "height", "width", "ratio"}

    (out / "train" / "InternImgs" / "00000" / "00000003.png").write_bytes(b"junk")
    flags = ["--check", "--resolution", 256, "--batch-size", 4, "--benchmark", 2]
    prepared = run("prepare_data", out / "train", tmp_path / "shards", "--to", "webdataset", *flags)
    assert prepared.returncode == 0, prepared.stderr
    text = prepared.stdout
    assert "rows 24, kept 23, bad 1" in text and "not a readable image: 1" in text and "loader: 8 samples" in text
    assert text.count("256 x 256") == text.count("224 x 288") == 1
    assert "00000003.png" in (tmp_path / "shards.bad_rows.txt").read_text()
    assert len(open_records(tmp_path / "shards", strict=True, progress=False)) == 23
    strict = run("prepare_data", out / "train", tmp_path / "other", "--strict", "--check")
    assert strict.returncode == 2 and not (tmp_path / "other").exists()
    assert strict.stderr.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in strict.stderr


def test_the_tool_writes_a_folder_of_any_size(tmp_path):
    out = tmp_path / "scenes"
    made = run(
        "make_scenes", out, "--count", 4, "--size", 96, "--layout", "folder", "--format", "webp", "--only", "cat"
    )
    assert made.returncode == 0, made.stderr
    records = open_records(out, strict=True, progress=False)
    assert len(records) == 4 and records.layout == "folder" and (records.sizes == 96).all()
    for flags in (["--count", 0], ["--held-out", 1], ["--held-out-count", 3], ["--only", "nothing"], ["--size", 5]):
        wrong = run("make_scenes", tmp_path / "wrong", *flags)
        assert wrong.returncode == 2 and len(wrong.stderr.strip().splitlines()) == 1, wrong.stderr
        assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("flags", [["--layout", "folder"], ["--held-out", 0.3, "--held-out-count", 1]])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, flags):
    """After every kill the same command ends with what a run in peace writes; other options are refused by name."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    tool = importlib.import_module("make_scenes")

    def make(out, *more):
        options = ("--count", 2, "--size", 32, "--only", "cat", "--only", "dog", "--threads", 1)
        monkeypatch.setattr(sys, "argv", ["make_scenes.py", *map(str, (out, *options, *flags, *more))])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert tool.main() == 0

    def content(folder):
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    make(tmp_path / "good")
    good, kills, training = content(tmp_path / "good"), 0, "" if "folder" in flags else "train"
    for kills in killed_everywhere(lambda: make(tmp_path / "out")):  # noqa: B007
        with contextlib.suppress(MindSigmaError):  # no set is taken for whole before it is
            assert len(open_records(tmp_path / "out" / training, progress=False)) == 2
    assert content(tmp_path / "out") == good and kills > 10
    with pytest.raises(MindSigmaError, match="another conversion, or one of other .* options"):
        make(tmp_path / "good", "--seed", 1)
    (tmp_path / "good" / "mine.txt").write_text("x")
    if "folder" not in flags:
        with pytest.raises(MindSigmaError, match="good: is not an empty folder"):
            make(tmp_path / "good")


# pages of text


@pytest.mark.parametrize("kind", ["words", "sentences"])
def test_pages_say_what_is_written_on_them(things, kind):
    from mindsigma.data.text_scenes import INKS, SENTENCE, PageMaker

    maker, pictures = PageMaker(things, kind, seed=2), 0
    for number in range(200):
        page = maker.scene(number)
        assert page == maker.scene(number) and page.text == " ".join(page.words)
        assert page.text in page.caption and f"in {page.ink} letters" in page.caption and page.ink in INKS
        assert len(page.words) == 1 if kind == "words" else SENTENCE[0] <= len(page.words) <= SENTENCE[1]
        pictures += page.thing is not None
        assert (page.thing is None) == page.caption.startswith("the ")
    assert 70 < pictures < 130


def test_held_out_pages_show_what_no_training_page_shows(things):
    from mindsigma.data.text_scenes import PageMaker

    maker = PageMaker(things, "words", seed=2, held_out=0.1)
    training = set().union(*(maker.scene(number).compositions() for number in range(300)))
    for number in range(100):
        assert maker.scene(number, held_out=True).compositions() - training


def test_pages_are_drawn_within_their_borders(things):
    from mindsigma.data.text_scenes import Page, draw

    for words, letters in ((("hotel",), 0.25), (("incomprehensibilities",), 1.0), (("extraordinarily",) * 10, 0.085)):
        for height, width in ((256, 256), (128, 384)):
            for thing in (None, things[0]):
                page = Page("", " ".join(words), words, "black", thing, letters)
                pixels = np.asarray(draw(page, height, width)).astype(int)
                dark = pixels.sum(-1) < 200
                assert dark.any() and not (dark[0].any() or dark[-1].any() or dark[:, 0].any() or dark[:, -1].any())


def test_pages_have_the_letters_that_are_asked_for(things):
    from mindsigma.data.text_scenes import PageMaker, draw

    def heights(**options):
        maker = PageMaker(things, "words", ("zoo",), seed=4, pictures=0.0, **options)
        pages = [maker.scene(number) for number in range(8)]
        assert {page.ink for page in pages} == set(options["inks"])
        rows = [np.flatnonzero((np.asarray(draw(page, 100, 100)) < 128).any((1, 2))) for page in pages]
        return {len(r) for r in rows}, {r[0] for r in rows}

    (small,), tops = heights(inks=("red", "black"), letters=0.2, shift=0.1)
    (large,), (top,) = heights(inks=("teal",), letters=0.4, shift=0)
    assert len(tops) > 2 and abs(large - 2 * small) <= 2 and abs(2 * top + large - 100) <= 6


def test_text_tool_writes_texts_beside_captions(tmp_path, things):
    made = run("make_scenes", tmp_path / "t", "--text", "words", "--word", "zoo", "--count", 3, "--size", 64)
    assert made.returncode == 0, made.stderr
    rows = json.loads((tmp_path / "t" / "textatlas.json").read_text())
    assert [row["raw_text"] for row in rows] == ["zoo"] * 3
    records = open_records(tmp_path / "t")
    assert [record.prompt for record in records] == [row["prompt"] for row in rows]
    assert all((tmp_path / "t" / row["original_image_path"]).is_file() for row in rows)
    for flags, said in (
        (["--word", "zoo"], "--word belongs to --text"),
        (["--shift", "0"], "--shift belongs to --text"),
        (["--text", "words", "--ink", "puce"], "'puce': no colour of letters; choose of white, black, "),
        (["--text", "words", "--letters", "0"], "the size of letters must lie in 0 ... 1 of the page's side, not 0.0"),
        (["--text", "words", "--shift", "nan"], "the shift must lie in 0 ... 0.5 of the page's side, not nan"),
    ):
        refused = run("make_scenes", tmp_path / "u", *flags)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {said}")
        assert refused.stderr.count("\n") == 1 and not (tmp_path / "u").exists()

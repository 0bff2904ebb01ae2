"""TextAtlasEval end to end on a small set of pages in its layout: read, drawn, resumed, shared, counted, told."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image
from training_runs import free_port

from mindsigma.data.scenes import load_things
from mindsigma.data.text_scenes import VOCABULARY, PageMaker, draw
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.drawing import Folder, Job, batches, texts_of_picture
from mindsigma.evaluation.measurements import Measurements
from mindsigma.evaluation.ocr import Reader, parse_settings
from mindsigma.evaluation.results import contact_sheet, items_csv, markdown
from mindsigma.evaluation.text_scores import ReferencePictures, Score, chance, summary
from mindsigma.evaluation.textatlas import TextAtlas
from mindsigma.evaluation.words import count, ratio

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (mindsigma[evaluate])")
pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed (mindsigma[evaluate])")
ROOT = Path(__file__).parents[1]
FAST_OCR = ["--ocr-setting", "Det.limit_side_len=256"]
QUICK = ["--steps", "2", "--guidance-scale", "1", "--max-sequence-length", "40", *FAST_OCR]


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_parquet(path, rows):
    """Rows of (image bytes or None, image_path, annotation, raw_text) in TextAtlasEval's schema."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": row[0], "path": row[1]} for row in rows]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {"image": pa.array(images, kind)}
    columns.update(
        {name: [row[i] for row in rows] for i, name in ((1, "image_path"), (2, "annotation"), (3, "raw_text"))}
    )
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


@pytest.fixture(scope="module")
def pages():
    maker = PageMaker(load_things(), "words", seed=3)
    return [maker.scene(i) for i in range(6)]


@pytest.fixture(scope="module")
def data(pages, tmp_path_factory):
    """TextAtlasEval in small: two subsets, the second in two shards."""
    folder = tmp_path_factory.mktemp("textatlas")
    rows = [(png(draw(page, 256, 256)), f"{i:04d}.png", page.caption, page.text) for i, page in enumerate(pages)]
    write_parquet(folder / "textvisionblend" / "train-00000-of-00001.parquet", rows[:3])
    for shard in range(2):
        part = [(*rows[3 + shard][:2], "x" * 9000 if shard else rows[3][2], rows[3 + shard][3])]
        write_parquet(folder / "styledtextsynth" / f"train-{shard:05d}-of-00002.parquet", part)
    return folder


def evaluate(monkeypatch, *arguments):
    """Run tools/evaluate.py in this process."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    return load_tool("evaluate").main()


# reading


def test_parquet(data, pages):
    atlas = TextAtlas(data)
    assert atlas.subsets == ["styledtextsynth", "textvisionblend"] and not atlas.bad
    items = [item for item in atlas.items if item.subset == "textvisionblend"]
    assert [(item.number, item.name, item.prompt, item.text) for item in items] == [
        (i, f"{i:04d}.png", page.caption, page.text) for i, page in enumerate(pages[:3])
    ]
    for item, page in zip(items, pages):
        assert np.array_equal(np.asarray(atlas.reference(item)), np.asarray(draw(page, 256, 256)))
    assert [item.number for item in TextAtlas(data, ["StyledTextSynth"]).items] == [0, 1]
    assert len(TextAtlas(data, limit=1).items) == 2


def test_json_list(tmp_path, pages):
    draw(pages[0], 64, 64).save(tmp_path / "real.png")
    rows = [{"image_path": "a.png", "original_image_path": "real.png", "prompt": "one", "raw_text": "x"}]
    rows += [{"image_path": "b.jpg", "prompt": "two", "raw_text": ""}]
    (tmp_path / "textatlas.json").write_text(json.dumps(rows))
    atlas = TextAtlas(tmp_path)
    assert [(item.name, item.prompt, item.text) for item in atlas.items] == [
        ("a.png", "one", "x"),
        ("b.jpg", "two", ""),
    ]
    assert atlas.reference(atlas.items[0]).size == (64, 64)
    with pytest.raises(MindSigmaError, match="b.jpg has no reference picture"):
        atlas.reference(atlas.items[1])


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"image_path": "a.png", "raw_text": "x"}, "lacks prompt"),
        ({"image_path": "a.png", "prompt": "p"}, "lacks raw_text"),
        ({"image_path": "../a.png", "prompt": "p", "raw_text": "x"}, "is no name of a file"),
        ({"image_path": "/etc/a.png", "prompt": "p", "raw_text": "x"}, "is no name of a file"),
        ({"image_path": "a.png", "prompt": " ", "raw_text": "x"}, "the prompt is empty"),
        ({"image_path": "a.png", "prompt": 5, "raw_text": "x"}, "annotation is no text"),
        ({"image_path": "good.png", "prompt": "p", "raw_text": "x"}, "is that of another row"),
        (7, "not an object"),
    ],
)
def test_bad_rows_are_left_out_and_told(tmp_path, row, fault):
    good = {"image_path": "good.png", "prompt": "p", "raw_text": "x"}
    (tmp_path / "textatlas.json").write_text(json.dumps([good, row]))
    atlas = TextAtlas(tmp_path)
    assert len(atlas.items) == 1 and len(atlas.bad) == 1 and fault in atlas.bad[0] and "entry 1" in atlas.bad[0]


def test_what_cannot_be_read_is_one_line(tmp_path, data):
    def refused(match, *arguments):
        with pytest.raises(MindSigmaError, match=match):
            TextAtlas(*arguments)

    refused("has no subset other; it has styledtextsynth, textvisionblend", data, ["other"])
    refused("neither .parquet nor .json", tmp_path)
    refused("hf download owner/absent-set --repo-type dataset", "owner/absent-set")
    (tmp_path / "a.json").write_text("[]")
    refused("holds no prompt", tmp_path / "a.json")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image_path": ["a"], "text": ["b"]}), tmp_path / "b.parquet")
    refused("lacks the columns annotation, raw_text; it has image_path, text", tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 is not all")
    refused("c.parquet: not a parquet file, or damaged", tmp_path / "c.parquet")


def test_the_words_of_the_miniature_are_never_mistaken():
    pairs = [(a, b) for i, a in enumerate(VOCABULARY) for b in VOCABULARY[:i]]
    assert len(VOCABULARY) == 20 and max(ratio(a, b) for a, b in pairs) < 80


# drawing


def test_a_folder_goes_on_and_refuses_other_settings(tmp_path):
    jobs = [Job(f"{i}.png", f"prompt {i} äß", (i,)) for i in range(3)]
    folder = Folder(tmp_path, {"steps": 2})
    folder.write_settings()
    image = Image.new("RGB", (8, 8))
    folder.write(jobs[0], [image], {})
    folder.write(jobs[1]._replace(prompt="another"), [image], {})
    (tmp_path / "2.png").write_bytes(b"cut off")
    assert Folder(tmp_path, {"steps": 2}).missing(jobs) == jobs[1:]
    assert texts_of_picture(tmp_path / "0.png")["prompt"] == "prompt 0 äß"
    with pytest.raises(MindSigmaError, match="drawn with steps 2, not 3"):
        Folder(tmp_path, {"steps": 3})


def test_batches_keep_grids_together():
    jobs = [Job("a", "", (0,)), Job("b", "", (1, 2, 3, 4)), Job("c", "", (5,)), Job("d", "", (6,)), Job("e", "", (7,))]
    assert [[job.name for job in batch] for batch in batches(jobs, 2)] == [["a"], ["b"], ["c", "d"], ["e"]]


def text_command(data, output):
    command = [str(ROOT / "tools" / "evaluate.py"), "textatlas", "--data", str(data), "--output", str(output)]
    return [*command, "--model", "sigma-mini", *QUICK, "--seed", "7"]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Folder of a run of the tool over all prompts, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", text_command(data, folder))
        assert load_tool("evaluate").main() == 0
    return folder


def test_draw_and_score(alone):
    assert sorted(str(path.relative_to(alone / "images")) for path in alone.glob("images/*/*.png")) == [
        "styledtextsynth/0003.png",
        "styledtextsynth/0004.png",
        "textvisionblend/0000.png",
        "textvisionblend/0001.png",
        "textvisionblend/0002.png",
    ]
    told = texts_of_picture(alone / "images" / "textvisionblend" / "0002.png")
    assert told["seed"] == "9" and told["steps"] == "2" and told["model"] == "sigma-mini"
    result = json.loads((alone / "result.json").read_text())
    assert result["drawing"]["num_inference_steps"] == 2 and result["ocr"]["engine"] == "rapidocr"
    assert result["overall"]["pictures"] == 5 and set(result["subsets"]) == {"styledtextsynth", "textvisionblend"}
    assert "| PixArt-Σ | 0.28 / 0.42 / 0.62 / 0.90 | 0.19 / 2.40 / 1.57 / 0.83 |" in (alone / "row.md").read_text()


@pytest.mark.slow
def test_killed_and_gone_on_by_two_processes(alone, data, tmp_path):
    """A run that is killed after its first picture, continued by two processes, gives what an undisturbed run gives."""
    folder = tmp_path / "o"
    process = subprocess.Popen([sys.executable, *text_command(data, folder)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list(folder.glob("images/*/*.png")) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("images/*/*.png")}
    assert 1 <= len(before) < 5 and not (folder / "result.json").exists()
    options = ["--worker_num=2", "--local_worker_num=2", f"--master_port={free_port()}", "--join=True"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["msrun", *options, f"--log_dir={tmp_path / 'logs'}", *text_command(data, folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    log = (tmp_path / "logs" / "worker_0.log").read_text()
    assert done.returncode == 0, log + done.stderr
    assert f"to draw: {5 - len(before)} of 5" in log
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert len(list(folder.glob("measured-*.jsonl"))) == 2  # both had a share
    for path in alone.glob("images/*/*.png"):
        other = folder / path.relative_to(alone)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(other)))
    one, two = (json.loads((place / "result.json").read_text()) for place in (alone, folder))
    assert one["overall"] == two["overall"] and one["subsets"] == two["subsets"]


# reading and counting


def test_the_pages_themselves_are_read(data, pages, tmp_path, monkeypatch):
    """The ceiling: every word of the references is read, and against other texts hardly any."""
    pytest.importorskip("rapidocr", reason="rapidocr is not installed (mindsigma[evaluate])")
    options = ("textatlas", "--data", data, "--output", tmp_path / "o", "--reference", *FAST_OCR)
    assert evaluate(monkeypatch, *options) == 0
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["overall"]["f1"] == 100 and result["overall"]["exact"] == 5 and result["name"] == "reference pictures"
    lines = (tmp_path / "o" / "items.csv").read_text().splitlines()
    assert len(lines) == 6 and lines[1].startswith("styledtextsynth,0003.png,1,1,1,0.000000")
    assert Image.open(tmp_path / "o" / "sheet.png").size[0] > 200
    # Measured once, they are not read again.
    monkeypatch.setattr("mindsigma.evaluation.ocr.RapidOcr.lines", lambda *_: ["never"])
    evaluate(monkeypatch, *options)
    assert json.loads((tmp_path / "o" / "result.json").read_text()) == result


def test_the_pages_through_the_vae(data, pages, tmp_path, monkeypatch):
    """Other pictures than the references, and near them: they are read again, in the same folder."""
    read = []
    monkeypatch.setattr("mindsigma.evaluation.ocr.RapidOcr.lines", lambda self, image: read.append(image) or ["zoo"])
    options = ("textatlas", "--data", data, "--output", tmp_path, "--reference", "--subset", "textvisionblend")
    assert evaluate(monkeypatch, *options) == evaluate(monkeypatch, *options, "--vae", "sigma-mini") == 0
    assert "through the VAE of sigma-mini" in json.loads((tmp_path / "result.json").read_text())["name"]
    assert len(read) == 6
    for plain, decoded in zip(read[:3], read[3:]):
        assert 0.5 < np.abs(np.asarray(plain, float) - np.asarray(decoded, float)).mean() < 8
    with pytest.raises(MindSigmaError, match="--vae belongs to --reference"):
        evaluate(
            monkeypatch, "textatlas", "--data", data, "--output", tmp_path, "--images", data, "--vae", "sigma-mini"
        )


class Stand:
    """An engine that reads what it is told."""

    about = {"engine": "stand", "version": "1", "settings": {}}

    def __init__(self, texts):
        self.texts = texts

    def read(self, image):
        return self.texts[image.size[0]], ""


def test_pictures_that_do_not_open_count_as_nothing_read(data, tmp_path, monkeypatch, capsys):
    images = tmp_path / "images" / "textvisionblend"
    images.mkdir(parents=True)
    Image.new("RGB", (10, 10)).save(images / "0000.png")
    (images / "0001.png").write_bytes(b"no picture")
    text = TextAtlas(data, ["textvisionblend"]).items[0].text
    monkeypatch.setattr("mindsigma.commands.evaluate_text.Reader", lambda *_: Stand({10: text}))
    options = ("textatlas", "--data", data, "--subset", "textvisionblend", "--images", tmp_path / "images")
    with pytest.raises(MindSigmaError, match="1 of 3 pictures are missing, the first is textvisionblend/0002.png"):
        evaluate(monkeypatch, *options, "--output", tmp_path / "o")
    evaluate(monkeypatch, *options, "--output", tmp_path / "o", "--partial")
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    one = result["overall"]
    assert (one["pictures"], one["unreadable"], one["hits"], one["wanted"]) == (2, 1, 1, 2)
    assert result["pictures_missing"] == 1 and "unreadable: 1" in capsys.readouterr().out


def test_bad_arguments_are_one_line(data, tmp_path, monkeypatch):
    def refused(match, *arguments):
        with pytest.raises(MindSigmaError, match=match):
            evaluate(monkeypatch, *arguments)

    text = ("textatlas", "--data", data, "--output", tmp_path / "o")
    refused("give one of --model, --images and --reference", *text)
    refused("not --images and --reference", *text, "--images", tmp_path, "--reference")
    refused("has no subset nothing", *text, "--reference", "--subset", "nothing")
    refused("--limit must be at least 1", *text, "--reference", "--limit", "0")
    refused("expected KEY=VALUE", *text, "--reference", "--ocr-setting", "x")
    refused("pip install paddleocr", *text, "--reference", "--ocr", "paddleocr")
    refused("no such file; fetch it with: curl", *text, "--reference", "--inception", tmp_path / "absent.pth")
    refused("unknown command paint", "paint")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    refused("fetch them with: curl -LO https://github", "fid", "--images", tmp_path, "--reference", tmp_path)
    refused("holds no images", "kid", "--images", data, "--reference", data)


def test_measurements_survive_a_kill(tmp_path):
    one = Measurements(tmp_path, 0)
    one.add("a", "1", "ocr", {"text": "x"})
    one.close()
    with open(tmp_path / "measured-0.jsonl", "ab") as file:
        file.write(b'{"picture": "b", "checksum": "1", "wh')  # cut off
    two = Measurements(tmp_path, 0)
    two.read()
    assert two.get("a", "1", "ocr") == {"text": "x"} and two.get("b", "1", "ocr") is None
    two.add("c", "1", "ocr", {"text": "z"})
    two.close()
    three = Measurements(tmp_path, 1)
    three.read()
    assert three.get("c", "1", "ocr") == {"text": "z"} and three.get("a", "2", "ocr") is None


def scores_of(atlas, texts):
    return [Score(item, text, count(text, item.text)) for item, text in zip(atlas.items, texts)]


def test_chance_is_the_level_of_other_texts(tmp_path):
    rows = [{"image_path": f"{i}.png", "prompt": "p", "raw_text": word} for i, word in enumerate(VOCABULARY)]
    (tmp_path / "textatlas.json").write_text(json.dumps(rows))
    atlas = TextAtlas(tmp_path)
    assert chance(scores_of(atlas, VOCABULARY)).f1 == 0
    always = scores_of(atlas, ["open"] * 20)  # one word everywhere: right once in twenty, whatever it is compared with
    assert summary(always)["accuracy"] == 5 and chance(always).accuracy == pytest.approx(5)
    whole = summary(scores_of(atlas, VOCABULARY))
    assert whole["f1"] == 100 and whole["exact"] == 20 and whole["intervals_95"]["f1"] == [100, 100]


def test_tables_and_sheet_hold_what_was_read(data):
    atlas = TextAtlas(data, ["textvisionblend"])
    scores = scores_of(atlas, ["a | b\nc", "", 'quote " and, comma ' * 30])
    one = summary(scores)
    result = {"name": "a|b", "ocr": {"engine": "stand", "version": "1"}, "overall": one, "subsets": {"x": one}}
    assert "a\\|b" in markdown(result)
    import csv

    rows = list(csv.reader(io.StringIO(items_csv(scores))))
    assert [row[8] for row in rows[1:]] == [score.text for score in scores]
    assert contact_sheet(scores, ReferencePictures(atlas)).size == (3 * 208 + 8, 200 + 5 * 16 + 8 + 16)


# engines


def test_settings_of_engines():
    assert parse_settings(["a=1", "b.c=0.5", "d=True", "e=x=y"]) == {"a": 1, "b.c": 0.5, "d": True, "e": "x=y"}


def test_paddleocr_is_called_as_textatlas_does(monkeypatch):
    """Its package cannot be had here: a stand-in that notes how it is called."""
    calls = []

    class PaddleOCR:
        def __init__(self, **options):
            calls.append(options)

        def ocr(self, image, cls):
            calls.append((image.shape, image[0, 0].tolist(), cls))
            if image.shape[0] == 7:
                raise RuntimeError("out of order")
            return [[[[[0, 0]], (" first line ", 0.9)], [[[0, 0]], ("second", 0.8)]]] if image.shape[0] == 4 else [None]

    module = type(sys)("paddleocr")
    module.PaddleOCR, module.__version__ = PaddleOCR, "2.9.1"
    monkeypatch.setitem(sys.modules, "paddleocr", module)
    reader = Reader("paddleocr", ["det_db_thresh=0.2"])
    assert reader.read(Image.new("RGB", (6, 4), (1, 2, 3))) == ("first line second", "")
    assert reader.read(Image.new("RGB", (6, 5))) == ("", "")
    assert reader.read(Image.new("RGB", (6, 7))) == ("", "RuntimeError: out of order")
    assert calls[0] == {"use_angle_cls": True, "lang": "en", "show_log": False, "det_db_thresh": 0.2}
    assert calls[1] == ((4, 6, 3), [3, 2, 1], True)
    assert reader.about["version"] == "2.9.1" and reader.about["settings"]["lang"] == "en"


def test_tesseract_is_a_program(tmp_path, monkeypatch):
    program = tmp_path / "tesseract"
    program.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "tesseract 5.3.0" || { cat > /dev/null; echo " $@ "; echo; }\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    reader = Reader("tesseract", ["psm=6"])
    assert (
        reader.read(Image.new("RGB", (4, 4))) == ("stdin stdout --psm 6 -l eng", "")
        and reader.about["version"] == "5.3.0"
    )
    program.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    assert reader.read(Image.new("RGB", (4, 4))) == ("", "RuntimeError: broken")  # one picture ends no run
    with pytest.raises(MindSigmaError, match="broken"):
        Reader("tesseract")
    with pytest.raises(MindSigmaError, match="psm and lang"):
        Reader("tesseract", ["other=1"])

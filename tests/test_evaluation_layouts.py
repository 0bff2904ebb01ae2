"""Folders for other benchmarks' scorers: files and prompts as their own code has them."""

import json

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image

from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.drawing import Job, texts_of_picture
from mindsigma.evaluation.layouts import LAYOUTS, jobs_of, published
from mindsigma.evaluation.prompts_of_pictures import prompt_of


@pytest.fixture
def prompts(tmp_path):
    """Prompt files of all benchmarks, small."""
    lines = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}]
    lines += [{"tag": "counting", "prompt": "a photo of two cups"}]
    (tmp_path / "evaluation_metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "dpg").mkdir()
    for name, text in (("0", "A long text.\n"), ("partiprompts1", "Another.")):
        (tmp_path / "dpg" / f"{name}.txt").write_text(text)
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\tmore\n\na red book\n")
    table = {"ab12": {"category": "food", "prompt": "a pie"}, "aa": {"category": "people", "prompt": "a man"}}
    (tmp_path / "meta_data.json").write_text(json.dumps(table))
    captions = [{"image_id": i // 2, "id": 1000 - i, "caption": f"caption  {i}\n"} for i in range(20)]
    (tmp_path / "captions_val2014.json").write_text(json.dumps({"annotations": captions, "info": {}}))
    return tmp_path


def test_geneval(prompts):
    jobs = jobs_of("geneval", prompts / "evaluation_metadata.jsonl", seed=5)
    assert len(jobs) == 8 and jobs[0] == Job("00000/samples/00000.png", "a photo of a bench", (5,))
    assert jobs[7] == Job("00001/samples/00003.png", "a photo of two cups", (8,))


def test_dpg_bench(prompts):
    jobs = jobs_of("dpg-bench", prompts / "dpg", seed=2)
    assert jobs == [
        Job("0.png", "A long text.", (2, 3, 4, 5)),
        Job("partiprompts1.png", "Another.", (2, 3, 4, 5)),
    ]


def test_t2i_compbench(prompts):
    jobs = jobs_of("t2i-compbench", prompts / "color_val.txt", images=2)
    assert [job.name for job in jobs] == [
        "samples/a green bench and a blue bowl_000000.png",
        "samples/a green bench and a blue bowl_000001.png",
        "samples/a red book_000002.png",
        "samples/a red book_000003.png",
    ]
    # The scorers' own way from the name to prompt and place.
    assert all(job.name.split("/")[-1].split("_")[0] == job.prompt for job in jobs)
    assert [int(job.name.split("_")[-1].split(".")[0]) for job in jobs] == [0, 1, 2, 3]


def test_mjhq(prompts):
    jobs = jobs_of("mjhq-30k", prompts / "meta_data.json")
    assert [(job.name, job.prompt) for job in jobs] == [("people/aa.png", "a man"), ("food/ab12.png", "a pie")]


def test_coco(prompts, monkeypatch):
    path = prompts / "captions_val2014.json"
    jobs = jobs_of("coco-30k", path)
    assert len(jobs) == 20 and jobs[0] == Job("000000000981.png", "caption 19", (0,))
    from mindsigma.evaluation.layouts import coco_jobs

    few, others = coco_jobs(path, 1, 0, count=7), coco_jobs(path, 1, 1, count=7)
    assert len({job.name for job in few}) == 7 and few == coco_jobs(path, 1, 0, count=7) != others


@pytest.mark.parametrize("name", LAYOUTS)
def test_wrong_prompt_files_are_one_line(name, tmp_path):
    for content in ("", "[]", '{"a": 1}\n', '{"annotations": [{"id": "x"}]}', "a/b_c\n"):
        path = tmp_path / "prompts.json"
        path.write_text(content)
        if name == "t2i-compbench" and content in ("[]", '{"a": 1}\n', '{"annotations": [{"id": "x"}]}'):
            continue  # any line is a prompt
        with pytest.raises(MindSigmaError, match="prompts.json"):
            jobs_of(name, path)


def test_published_numbers():
    assert "| 1024 px | 0.54 | Sana's README |" in published("geneval")
    assert "no published number" in published("coco-30k")


def test_draw_into_a_layout(prompts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    options = ["--model", "sigma-mini", "--steps", "1", "--guidance-scale", "1", "--height", "64", "--width", "64"]
    options += ["--no-resolution-binning"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["evaluate.py", "draw", *map(str, arguments), *options])
        assert load_tool("evaluate").main() == 0

    geneval = ("geneval", "--prompts", prompts / "evaluation_metadata.jsonl", "--output", out / "geneval")
    run(*geneval, "--images-per-prompt", 1)
    assert json.loads((out / "geneval/00001/metadata.jsonl").read_text())["tag"] == "counting"
    picture = out / "geneval/00001/samples/00000.png"
    assert prompt_of(picture) == "a photo of two cups" and Image.open(picture).size == (64, 64)
    run(*geneval, "--images-per-prompt", 1)
    assert "to draw: 0 of 2" in capsys.readouterr().out
    run("dpg-bench", "--prompts", prompts / "dpg", "--output", out / "dpg", "--limit", 1, "--batch-size", 4)
    grid = np.asarray(Image.open(out / "dpg/0.png"))
    assert grid.shape == (128, 128, 3) and texts_of_picture(out / "dpg/0.png")["seed"] == "0 1 2 3"
    assert not np.array_equal(grid[:64, :64], grid[64:, 64:])

"""The trainer's scores of texts: at the steps where they are due, in the log, the weights left as they were."""

import json

import pytest
from conftest import load_tool

from mindsigma.config_file import parse_with_config
from mindsigma.errors import MindSigmaError

pytest.importorskip("rapidfuzz", reason="rapidfuzz is not installed (mindsigma[evaluate])")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of text by tools/make_scenes.py, their file of texts, and a config of the evaluation."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["make_scenes.py", str(folder / "words"), "--text", "words", "--count", "4"])
        assert load_tool("make_scenes").main() == 0
    lines = [f"data: {folder / 'words'}", "limit: 3", "steps: 1", "guidance-scale: 1", "height: 64", "width: 64"]
    lines += ["resolution-binning: false", "batch-size: 2", "max-sequence-length: 40"]
    (folder / "evaluate.yaml").write_text("\n".join(lines))
    return folder


def trained(pages, output, *options):
    from mindsigma.training.run_options import build_parser
    from mindsigma.training.trainer import Trainer

    arguments = ["--data", str(pages / "words"), "--output", str(output), "--steps", "1", "--batch-size", "1"]
    arguments += ["--max-length", "40", "--save-every", "1", "--lora-rank", "1", "--lora-targets", "attn.proj"]
    Trainer(parse_with_config(build_parser(), [*arguments, *options])).run()
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_scores_are_logged(pages, tmp_path, monkeypatch):
    texts = [row["raw_text"] for row in json.loads((pages / "words" / "textatlas.json").read_text())[:3]]
    read = []

    class Stand:
        def __init__(self, engine, settings):
            assert (engine, settings) == ("rapidocr", [])

        def read(self, image):
            assert image.size == (64, 64)
            read.append(image)
            return f"{texts[(len(read) - 1) % 3]} surplus", ""

    monkeypatch.setattr("mindsigma.training.text_evaluation.Reader", Stand)
    lines = trained(pages, tmp_path / "run", "--evaluate", str(pages / "evaluate.yaml"), "--evaluate-every", "1")
    scores = [line for line in lines if "text_f1" in line]
    assert [line["step"] for line in scores] == [0, 1] and len(read) == 6
    for line in scores:
        assert (line["text_hits"], line["text_accuracy"], line["text_precision"]) == (3, 100, 50)
        assert line["text_f1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    "text, match", [("data: absent\n", "no such file or folder"), ("model: x\n", "unknown key 'model'")]
)
def test_bad_configs_are_told_before_training(pages, tmp_path, text, match):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(MindSigmaError, match=match):
        trained(pages, tmp_path / "run", "--evaluate", str(tmp_path / "bad.yaml"))
    assert not (tmp_path / "run" / "log.jsonl").exists()

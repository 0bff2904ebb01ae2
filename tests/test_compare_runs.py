"""tools/compare_runs.py: held-out losses of runs side by side."""

import json

import pytest
from conftest import load_tool
from PIL import Image

from mindsigma import MindSigmaError


def write_log(folder, losses, rate):
    folder.mkdir()
    lines = [{"step": step, "validation_loss": loss} for step, loss in losses.items()]
    lines += [{"step": step, "loss": 1.0, "seconds": step * rate, "images_per_second": 1.0} for step in (5, 10, 15)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_and_figure(tmp_path, capsys, monkeypatch):
    write_log(tmp_path / "one", {0: 0.5, 10: 0.25}, 2.0)
    write_log(tmp_path / "two", {0: 0.5, 20: 0.125}, 3.0)
    picture = tmp_path / "curves.png"
    argv = ["compare_runs.py", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(picture)]
    monkeypatch.setattr("sys.argv", argv)
    assert load_tool("compare_runs").main() == 0
    head, one, two = capsys.readouterr().out.splitlines()[:3]
    assert head.split() == ["step", "0", "step", "10", "step", "20", "s/step"]
    assert one.split() == ["one", "0.50000", "0.25000", "2.00"]
    assert two.split() == ["two", "0.50000", "0.12500", "3.00"]
    assert Image.open(picture).size == (800, 450)


def test_a_run_without_held_out_loss_is_named(tmp_path):
    with pytest.raises(MindSigmaError, match="--validation-data"):
        load_tool("compare_runs").curve_of(tmp_path)

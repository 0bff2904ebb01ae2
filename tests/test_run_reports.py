"""What a run reports elsewhere: trackers that are stood in for, the model card; compile times; times that are left."""

import json
import sys
import types
from argparse import Namespace

import mindspore as ms
import numpy as np
import pytest

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline import compiling
from mindsigma.training import run_log
from mindsigma.training.model_card import model_card
from mindsigma.training.run_log import Report
from mindsigma.training.run_options import build_parser
from mindsigma.training.trackers import TRACKERS, identity, open_tracker


class Told(types.ModuleType):
    """A stand-in for wandb or swanlab that remembers what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.Image = lambda image, caption: (image.shape, caption)

    def init(self, **options):
        self.calls.append(("init", options))
        return self

    def log(self, numbers, step):
        self.calls.append((step, numbers))

    def finish(self):
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_is_told_what_the_log_is(name, tmp_path, monkeypatch):
    module = Told(name)
    monkeypatch.setitem(sys.modules, name, module)
    tracker = open_tracker(name, tmp_path / "run", {"steps": 2})
    (tmp_path / "run").mkdir()
    with Report(tmp_path / "run", 2, 0, False, tracker) as report:
        report.step(1, {"loss": 0.5, "grad_norm": 1.0, "lr": 0.1}, 4, True)
        report.images(1, ["a cat"], [np.zeros((8, 8, 3), np.uint8)])
    first, step, images, last = module.calls
    options = first[1]
    assert options["config"] == {"steps": 2} and options["project"] == "mindsigma"
    assert options.get("id", identity(tmp_path / "run")) == identity(tmp_path / "run")  # it goes on under its name
    assert step[0] == 1 and step[1]["loss"] == 0.5 and "seconds" not in step[1]
    assert images == (1, {"samples": [((8, 8, 3), "a cat")]}) and last == ("finish",)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_there_or_not_logged_in(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MindSigmaError, match=rf"--tracker {name} needs a package: pip install 'mindsigma\[{name}\]'"):
        open_tracker(name, tmp_path, {})
    module = Told(name)
    monkeypatch.setattr(module, "init", lambda **_: {}["no key"])
    monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(MindSigmaError, match=rf"cannot begin \(KeyError: 'no key'\); log in there \({name} login\)"):
        open_tracker(name, tmp_path, {})


def test_the_time_that_is_left_leaves_out_compilation(tmp_path, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: now[0])
    values = {"loss": 0.5, "grad_norm": 1.0, "lr": 0.1}
    with Report(tmp_path, 2000, 0, False) as report:
        now[0] = 100.0
        report.compiled(100.0)
        report.step(1, values, 4, True)
        now[0] = 102.0
        report.step(2, values, 4, True)
    first, second = capsys.readouterr().out.splitlines()
    assert "to go" not in first and second.endswith("1 h 06 min to go")


def card(**changes):
    args = build_parser().parse_args(["--data", "photos|x", "--output", "runs/first"])
    vars(args).update(changes)
    told = {**vars(args), "batch": 8}
    return model_card(args, 200, changes.pop("product", "dit"), told, 12, [{"option": "a", "from": 1}], 0.25, "rank 4")


def test_model_card():
    text = card(ema_decay=0.99)
    head = dict(line.split(": ", 1) for line in text.split("---")[1].strip().splitlines())
    assert json.loads(head["base_model"]) == "sigma-mini" and json.loads(head["pipeline_tag"]) == "text-to-image"
    assert "# first, step 200" in text and "| images a step | 8 |" in text and "| validation loss | 0.25000 |" in text
    assert "--model THIS_FOLDER/ema --components sigma-mini" in text
    assert "random weights of the shape of `sigma-mini`" in card(fresh=True)
    adapter = model_card(Namespace(**vars(build_parser().parse_args(["--data", "x", "--output", "y"]))), 1,
                         "adapter.safetensors", {"batch": 1}, 3, summary="LoRA of rank 4")  # fmt: skip
    assert "An adapter (LoRA of rank 4)" in adapter and "--lora THIS_FOLDER/adapter.safetensors" in adapter


def test_no_path_of_this_machine_is_told(tmp_path):
    (tmp_path / "secret-project").mkdir()
    text = card(model=str(tmp_path / "secret-project"), data=str(tmp_path / "secret-project"))
    assert str(tmp_path) not in text and "secret-project" in text


def test_compile_times_are_told_next_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINDSIGMA_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "_seen", set())
    now = [0.0]
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: now[0])
    with compiling.compiling("a step"):  # nothing is compiled in PyNative mode
        pass
    assert capsys.readouterr().err == ""
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        for expected in ("compiling: a step (for the first time)\n", "compiling: a step (1 min 03 s last time)\n"):
            with compiling.compiling("a step"):
                now[0] += 63.0
            with compiling.compiling("a step"):
                pass
            assert capsys.readouterr().err == expected
            compiling._seen.clear()
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_samples_of_a_run_tell_how_they_were_drawn(tmp_path):
    """Of a step of sigma-mini on features of noise."""
    from PIL import Image
    from training_runs import options, write_features

    from mindsigma.data.resolution import Resolution
    from mindsigma.training.trainer import Trainer

    features = write_features(tmp_path / "features", [(256, 256)], Resolution(256))
    changes = {"batch_size": 1, "steps": 1, "save_every": 1, "ema_decay": 0, "recompute": None, "resolution": 256}
    changes.update(prompts="a cat", sample_every=1, sample_steps=2, sample_guidance=3.0, seed=7)
    Trainer(build_parser().parse_args(options("sigma-mini", features, tmp_path / "run", **changes))).run()
    (path,) = (tmp_path / "run" / "samples").glob("step_00000001_*.png")
    with Image.open(path) as image:
        text = dict(image.text)
    assert {name: text[name] for name in ("prompt", "seed", "steps", "sampler", "guidance_scale", "training_step")} == {
        "prompt": "a cat", "seed": "7", "steps": "2", "sampler": "dpm", "guidance_scale": "3.0", "training_step": "1",
    }  # fmt: skip
    assert text["model"].endswith("run, step 1") and "Steps: 2, Sampler: DPM++ 2M" in text["parameters"]
    assert "mindsigma" not in text  # no tool draws it again

"""tools/generate.py as a user runs it: pictures and what is printed, or one line that says what to mend."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image

from mindsigma import __version__, command_line
from mindsigma.weights.locate import BUNDLED

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "generate.py"
MINI = BUNDLED / "sigma-mini"
LONG_PROMPT = "a red apple on a wooden table beside a blue cup"


def start(folder, *flags, **environment):
    """Run the tool in a process of its own, in `folder`. Nothing can be fetched: the hub is offline and empty."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), **environment}
    env.pop("GLOG_v", None)  # the tool itself keeps MindSpore quiet
    run = subprocess.run(
        [sys.executable, str(TOOL), *map(str, flags)], cwd=folder, env=env, capture_output=True, timeout=300
    )
    # Decoded here, as text=True would make a line of every state of the progress bar.
    run.stdout, run.stderr = run.stdout.decode(), run.stderr.decode()
    return run


def lines(text):
    """Non-empty lines, each as it stands when the progress bar is done with it."""
    return [line for line in (line.rpartition("\r")[2] for line in text.split("\n")) if line.strip()]


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# what works


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Folder of three runs: `one` and `again` by the same command with an option file, `batch` with two images."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "options.yaml").write_text("model: sigma-mini\nsteps: 7\nseed: 1\nguidance-scale: 3.0\nverbose: true\n")
    common = ("a red apple", "--steps", 2)
    runs = {
        name: start(folder, *common, "--config", "options.yaml", "--negative-prompt", "dark", "--out", name)
        for name in ("one", "again")
    }
    flags = ("--num-images", 2, "--batch-size", 2, "--grid", "--guidance-scale", 3, "--negative-prompt", "dark")
    runs["batch"] = start(folder, *common, *flags, "--out", "batch")
    for name, run in runs.items():
        assert run.returncode == 0, (name, run.stderr)
    return folder, runs


def test_image_is_written_where_it_says(drawn):
    folder, runs = drawn
    for name in ("one", "again"):
        assert f"{name}/a-red-apple-1.png" in lines(runs[name].stdout)
        assert sorted(path.name for path in (folder / name).iterdir()) == ["a-red-apple-1.png"]
    picture = pixels(folder / "one" / "a-red-apple-1.png")
    assert picture.shape == (256, 256, 3)
    assert picture.std() > 5
    assert [line for line in lines(runs["one"].stderr) if not line.startswith("denoise: 100%")] == []


def test_png_tells_how_it_was_made(drawn):
    with Image.open(drawn[0] / "one" / "a-red-apple-1.png") as image:
        text = image.text
    expected = {
        "Software": f"mindsigma {__version__}",
        "prompt": "a red apple",
        "negative_prompt": "dark",
        "model": "sigma-mini",
        "seed": "1",  # of the option file
        "steps": "2",  # of the flag, which wins
        "guidance_scale": "3.0",
        "size": "256x256",
    }
    assert {name: text.get(name) for name in expected} == expected


def test_same_command_same_bytes(drawn):
    np.testing.assert_array_equal(*(pixels(drawn[0] / name / "a-red-apple-1.png") for name in ("one", "again")))


def test_image_of_a_seed_does_not_depend_on_its_batch(drawn):
    folder = drawn[0]
    alone = pixels(folder / "one" / "a-red-apple-1.png")
    first, second = (pixels(folder / "batch" / f"a-red-apple-{seed}.png") for seed in (0, 1))
    assert abs(second - alone).max() <= 1
    assert abs(first - alone).max() > 20


def test_grid_holds_the_images_in_order(drawn):
    folder, runs = drawn
    printed = [line for line in lines(runs["batch"].stdout) if line.endswith(".png")]
    assert printed == ["batch/a-red-apple-0.png", "batch/a-red-apple-1.png", "batch/grid.png"]
    first, second = (pixels(folder / path) for path in printed[:2])
    np.testing.assert_array_equal(pixels(folder / "batch" / "grid.png"), np.concatenate((first, second), 1))


def test_verbose_prints_the_phases(drawn):
    _, runs = drawn
    printed = lines(runs["one"].stdout)
    start = next(i for i, line in enumerate(printed) if line.startswith("phase"))
    assert printed[start].split() == ["phase", "seconds", "graphs", "peak", "GB"]
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in printed[start + 1 :]}
    assert list(rows) == ["load", "text", "denoise", "decode"]
    for seconds, graphs, peak in rows.values():
        assert 0 <= seconds < 60
        assert graphs == int(graphs)
        assert peak > 0.1
    assert "phase" not in runs["batch"].stdout


def test_tiles_if_asked_for(tmp_path):
    """Of a picture that is larger than a tile."""
    size = ("--height", 576, "--width", 528, "--no-resolution-binning")
    for flag in ("--vae-tiling", "--no-vae-tiling"):
        run = start(tmp_path, "a red apple", "--steps", 1, *size, flag, "--out", f"{flag[2:]}.png")
        assert run.returncode == 0, run.stderr
    tiled, whole = pixels(tmp_path / "vae-tiling.png"), pixels(tmp_path / "no-vae-tiling.png")
    difference = abs(tiled - whole)
    assert 0 < difference.mean() < 8  # the norms of a tile see the tile alone
    with Image.open(tmp_path / "vae-tiling.png") as image:
        assert image.text["vae_tiling"] == "True"


def test_long_prompt_is_cut_with_a_warning(tmp_path):
    run = start(tmp_path, LONG_PROMPT, "--steps", 2, "--max-sequence-length", 5, "--out", "cut.png")
    assert run.returncode == 0
    assert pixels(tmp_path / "cut.png").shape == (256, 256, 3)
    (warning,) = [line for line in lines(run.stderr) if "limit is 5" in line]
    assert warning.startswith("warning: the prompt has ")
    assert "wooden table beside a blue cup" in warning  # what is lost
    assert "Traceback" not in run.stderr


# what the user can mend


@pytest.fixture(scope="module")
def generate():
    return load_tool("generate")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of things that are wrong."""
    folder = tmp_path_factory.mktemp("wrong")
    shutil.copytree(MINI, folder / "truncated")
    weights = folder / "truncated" / "dit" / "model.safetensors"
    weights.chmod(0o600)
    os.truncate(weights, weights.stat().st_size // 2)
    shutil.copytree(MINI, folder / "no_vae", ignore=shutil.ignore_patterns("vae"))
    (folder / "empty.txt").write_text("\n  \n")
    (folder / "plain").write_text("a regular file")
    (folder / "unknown_key.yaml").write_text("stepz: 3\n")
    (folder / "wrong_kind.yaml").write_text("steps: true\n")
    (folder / "no_model.yaml").write_text("steps: 2\n")
    Image.new("RGB", (8, 8)).save(folder / "plain.png")
    shutil.copytree(MINI / "dit", folder / "alone")
    checkpoint = folder / "run" / "checkpoints" / "step_00000200"
    shutil.copytree(MINI / "dit", checkpoint / "ema")
    (folder / "run" / "options.json").write_text('{"model": "sigma-mini", "components": null}')
    return folder


DRAW = ("a red apple", "--steps", "2")
WRONG = {
    "missing folder": ((*DRAW, "--model", "{}/absent"), "{}/absent: no such file or folder"),
    "no such preset": ((*DRAW, "--model", "PixArt-Sigma-XL-2-3K-MS"), "PixArt-Sigma-XL-2-3K-MS: no such file"),
    "truncated weights": (
        (*DRAW, "--model", "{}/truncated"),
        "dit/model.safetensors: damaged safetensors file: truncated",
    ),
    "no VAE": ((*DRAW, "--model", "{}/no_vae"), "{}/no_vae"),
    "weights alone": ((*DRAW, "--model", f"{MINI}/dit/model.safetensors"), "--components"),
    "not weights": ((*DRAW, "--model", "{}/plain", "--components", str(MINI)), "{}/plain: neither"),
    "steps -1": (("a red apple", "--steps", "-1"), "--steps must be at least 1, not -1"),
    "steps 0": (("a red apple", "--steps", "0"), "--steps must be at least 1, not 0"),
    "too many steps": (("a red apple", "--steps", "1000"), "whole number of 1 ... 999, not 1000"),
    "batch size 0": ((*DRAW, "--batch-size", "0"), "--batch-size must be at least 1, not 0"),
    "no images": ((*DRAW, "--num-images", "0"), "--num-images must be at least 1, not 0"),
    "no tokens": ((*DRAW, "--max-sequence-length", "0"), "--max-sequence-length must be at least 1, not 0"),
    "seed -1": ((*DRAW, "--seed", "-1"), "--seed must be at least 0, not -1"),
    "odd height": ((*DRAW, "--height", "100", "--no-resolution-binning"), "height 100 is not a multiple of 16"),
    "no height": ((*DRAW, "--height", "0"), "height must be a whole number of 16 ... 8192 pixels, not 0"),
    "compression": ((*DRAW, "--kv-compression", "nonsense"), "kv_compression 'nonsense': expected SAMPLING"),
    "compressed layers": ((*DRAW, "--kv-compression", "uniform:2:7-8"), "layers (7, 8) exceed depth 8"),
    "bf16 on the CPU": ((*DRAW, "--dtype", "bf16", "--device", "CPU"), "dtype bf16"),
    "no prompt": (("--steps", "2"), "nothing to draw; give a prompt"),
    "no prompt in the file": (("--prompts-file", "{}/empty.txt"), "{}/empty.txt: holds no prompt"),
    "no file of prompts": (("--prompts-file", "{}/absent.txt"), "{}/absent.txt: no such file"),
    "unknown key": ((*DRAW, "--config", "{}/unknown_key.yaml"), "unknown_key.yaml: unknown key 'stepz'; known:"),
    "value of the wrong kind": (("a red apple", "--config", "{}/wrong_kind.yaml"), "steps has a value of the wrong"),
    "no option file": ((*DRAW, "--config", "{}/absent.yaml"), "{}/absent.yaml: no such file"),
    "no model in the option file": (
        (*DRAW, "--config", "{}/no_model.yaml"),
        "no_model.yaml: names no model; add",
    ),
    "not a picture of ours": (("--like", "{}/plain.png"), "plain.png: does not tell how it was drawn"),
    "no picture": (("--like", "{}/plain"), "{}/plain: is no PNG"),
    "unknown field of a name": ((*DRAW, "--name-template", "{{x}}"), "unknown field {{x}}; known: prompt, model"),
    "DiT alone": ((*DRAW, "--model", "{}/alone"), "{}/alone: holds the DiT alone; give the folder or hub id with vae/"),
    "a checkpoint of a run": (
        (*DRAW, "--model", "{}/run/checkpoints/step_00000200"),
        "holds the DiT alone; give the folder or hub id with vae/, text_encoder/ and tokenizer/ and --components sigma",
    ),
    "a run": (
        (*DRAW, "--model", "{}/run"),
        "it is the folder of a run: give {}/run/checkpoints/step_00000200/ema and --components sigma-mini",
    ),
    "whole weights as an adapter": (
        (*DRAW, "--lora", f"{MINI}/dit/model.safetensors"),
        "dit/model.safetensors: a whole DiT, no adapter; give it as the model (--model), not as --lora",
    ),
    "a whole checkpoint as an adapter": (
        (*DRAW, "--lora", "{}/run/checkpoints/step_00000200"),
        "step_00000200: holds a whole DiT, no adapter; give it as the model",
    ),
    "no picture to draw from": ((*DRAW, "--image", "{}/absent.png"), "{}/absent.png: no such file"),
    "one file for two images": (("a", "b", "--out", "x.png"), "--out x.png: one file for 2 images"),
    "out below a file": ((*DRAW, "--out", "{}/plain/sub"), "{}/plain/sub"),
    "out is a file": ((*DRAW, "--out", "{}/plain"), "{}/plain"),
    "image below a file": ((*DRAW, "--out", "{}/plain/x.png"), "{}/plain/x.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistake_ends_in_one_line(generate, files, tmp_path, monkeypatch, capsys, case):
    flags, words = WRONG[case]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *(flag.format(files) for flag in flags)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the tool sets
    monkeypatch.setenv("GLOG_v", "3")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command_line.run(generate.main)
    (line,) = lines(capsys.readouterr().err)
    assert caught.value.code == 2
    assert line.startswith("error: ")
    assert words.format(files) in line
    assert list(tmp_path.iterdir()) == []


def assert_one_error(run, *words):
    """The process must have ended by itself, with one line beside warnings."""
    assert run.returncode == 2, run.stderr
    (line,) = [line for line in lines(run.stderr) if not line.startswith("warning: ")]
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_a_model_that_the_hub_does_not_give(tmp_path):
    assert_one_error(start(tmp_path, *DRAW, "--model", "nobody/absent"), "nobody/absent: no such path here", "hub")


def test_a_device_that_is_not_there(tmp_path):
    run = start(tmp_path, *DRAW, "--device", "Ascend", ASCEND_HOME_PATH="")
    if run.returncode == 0:
        pytest.skip("this machine has an NPU")
    assert_one_error(run, "device 'Ascend' is not available")


class Touch:
    """An object whose unpickling runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_weight_file_runs_no_code(tmp_path):
    marker, file = tmp_path / "marker", tmp_path / "weights.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"state_dict": Touch(marker)}, protocol=2))
        archive.writestr("archive/version", "3\n")
    run = start(tmp_path, *DRAW, "--model", file, "--components", MINI)
    assert_one_error(run, f"system in {file}")
    assert not marker.exists()


def test_argparse_speaks_in_one_line(tmp_path):
    run = start(tmp_path, "a red apple", "--solver-order", 4)
    assert run.returncode == 2
    assert lines(run.stderr)[0].startswith("error: argument --solver-order: invalid choice: 4")
    assert len(lines(run.stderr)) == 1


def test_interrupt_ends_in_one_word(tmp_path):
    """Ctrl-C while drawing: no traceback, no crash of MindSpore's exit hooks, nothing left behind."""
    command = [sys.executable, str(TOOL), "a cat", "--steps", "500", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    while not re.search(r"[1-9]\d*/500 ", seen):  # the bar does not show every step
        letter = process.stderr.read(1)
        assert letter, seen
        seen += letter
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "interrupted" and "Traceback" not in errors
    assert list((tmp_path / "out").iterdir()) == []

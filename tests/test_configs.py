"""The YAML files of configs/infer: one for each preset, of options that tools/generate.py takes."""

from pathlib import Path

import pytest
import yaml
from conftest import load_tool

from mindsigma.config_file import parse_with_config
from mindsigma.models.dit.config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs" / "infer").glob("*.yaml"))
RELEASED = ("256x256", "512-MS", "1024-MS", "2K-MS")
PREFIX = "PixArt-Sigma-XL-2-"


@pytest.fixture(scope="module")
def generate():
    return load_tool("generate")


def test_one_file_for_each_preset():
    assert {file.name for file in FILES} == {f"{name.removeprefix(PREFIX)}.yaml" for name in PRESETS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_sets_what_its_preset_needs(generate, file):
    name = file.stem if file.stem in PRESETS else PREFIX + file.stem
    args = parse_with_config(generate.build_parser(), ["a red apple", "--config", str(file)])
    side = 8 * PRESETS[name].input_size
    assert (args.height, args.width) == (side, side)
    assert (args.steps, args.guidance_scale) == (20, 4.5)
    assert args.dtype is None  # the device's own
    generate.check(args, count=1)
    keys = yaml.safe_load(file.read_text())
    if file.stem in RELEASED:
        assert keys["model"] == f"PixArt-alpha/PixArt-Sigma/{name}.pth"
    elif name == "sigma-mini":
        assert keys["model"] == name
    else:
        assert "model" not in keys  # never released
    assert ("components" in keys) == (name != "sigma-mini")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_opens_with_its_own_command(file):
    comments = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert comments[0].startswith(f'# python tools/generate.py "a red apple" --config configs/infer/{file.name}')
    assert "Not run on an NPU here." in " ".join(comments)
    assert ("--model" in comments[0]) == ("model" not in yaml.safe_load(file.read_text()))

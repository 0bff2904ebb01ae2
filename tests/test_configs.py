"""The YAML files of configs/: options that the tools take, one file for each preset and each stage of training."""

from pathlib import Path

import pytest
import yaml
from conftest import load_tool

from mindsigma.config_file import parse_with_config
from mindsigma.models.dit_config import PRESETS

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


TRAINING = sorted((ROOT / "configs" / "train").glob("*.yaml")) + sorted((ROOT / "configs" / "miniature").glob("*.yaml"))


@pytest.fixture(scope="module")
def train_parser():
    """A function from a file to the arguments of the tool that takes it."""
    from mindsigma.training import distill_options, run_options

    def parse(file):
        arguments = ["--config", str(file), "--data", "features", "--output", "runs/x"]
        if file.name.startswith("distill-"):
            return distill_options.complete(parse_with_config(distill_options.build_parser(), arguments))
        return parse_with_config(run_options.build_parser(), arguments)

    return parse


@pytest.mark.parametrize("file", TRAINING, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_training_file_is_of_options_that_fit_together(train_parser, file):
    from mindsigma.data import Resolution
    from mindsigma.models.dit import KVCompression
    from mindsigma.training.optimizers import OptimizerConfig
    from mindsigma.training.run_options import check

    args = train_parser(file)
    check(args)
    OptimizerConfig(args.optimizer, args.betas, args.eps, args.weight_decay)
    Resolution(args.resolution, args.multi_scale, args.table)
    KVCompression.parse(args.kv_compression)
    assert f"--config configs/{file.parent.name}/{file.name}" in file.read_text()
    assert (
        file.parent.name == "miniature" or args.model == "sigma-mini" or "Not run on an NPU here." in file.read_text()
    )


EVALUATION = sorted((ROOT / "configs" / "evaluate").glob("*.yaml"))


@pytest.mark.parametrize("file", EVALUATION, ids=lambda file: file.stem)
def test_evaluation_file_opens_with_its_own_command(file):
    from mindsigma.commands.evaluate_options import build_parser, check
    from mindsigma.commands.generate_options import judged

    args = parse_with_config(build_parser("textatlas"), ["--config", str(file), "--data", "d", "--output", "o"])
    check(args)
    judged(args)
    assert f"--config configs/evaluate/{file.name}" in file.read_text()
    assert args.model is None or "Not run on an NPU here." in file.read_text()


def test_words_serve_the_trainer_too():
    from mindsigma.training.text_evaluation import build_parser

    args = parse_with_config(build_parser(), ["--config", str(ROOT / "configs" / "evaluate" / "words.yaml")])
    assert (args.data, args.limit, args.steps) == ("words", 20, 20)


@pytest.mark.parametrize("name", ["256", "512-MS", "1024-MS", "1024-MS-KV", "2K-MS-KV", "4K-MS-KV"])
def test_stages_have_the_numbers_of_the_official_configs(train_parser, name):
    args = train_parser(ROOT / "configs" / "train" / f"{name}.yaml")
    assert (args.optimizer, args.auto_lr, args.max_norm, args.weight_decay) == ("came", "sqrt", 0.01, 0.0)
    assert (args.real_prompt_ratio, args.caption_dropout, args.max_length) == (0.5, 0.1, 300)
    assert args.fp32_attention and args.recompute and args.dtype == "fp16"
    side = {"256": 256, "512-MS": 512, "1024-MS": 1024, "1024-MS-KV": 1024, "2K-MS-KV": 2048, "4K-MS-KV": 4096}[name]
    assert args.resolution == side and args.multi_scale == (name != "256")
    # Later stages begin from weights that compress already.
    assert args.kv_compression == ("conv:2:14-27" if name == "1024-MS-KV" else None)
    assert args.grow_to == (None if name in ("256", "1024-MS-KV") else side)


def test_a_recipe_is_planned_as_it_is_trained():
    """Every field that a plan takes of a recipe is one of the step that it plans."""
    from mindsigma.inspect.parts import Request
    from mindsigma.inspect.recipe import of_recipe

    found = Request(**of_recipe(str(ROOT / "configs" / "train" / "1024-MS-KV.yaml")))
    assert found == Request(
        "PixArt-Sigma-XL-2-1024-MS", "train", 1024, 1024, 16, "fp16", 300, kv_compression="conv:2:14-27",
        optimizer="came", recompute=True, ema=True, fp32_attention=True,
    )  # fmt: skip
    found = Request(**of_recipe(str(ROOT / "configs" / "train" / "controlnet-canny.yaml")))
    assert found == Request(
        "PixArt-Sigma-XL-2-1024-MS", "train", 1024, 1024, 4, "fp16", 300, optimizer="adamw", recompute=True,
        fp32_attention=True, control_layers=13, accumulation=4,
    )  # fmt: skip

"""What a distilled checkpoint tells of its sampling, and that it is then drawn so: by the tools, the call, the page."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import load_tool
from PIL import Image
from test_distill_runs import data, distil  # noqa: F401, `data` is a fixture
from training_runs import checkpoint

from mindsigma import PixArtSigmaPipeline
from mindsigma.commands.generate_options import build_parser, judged
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.options import SamplingOptions, with_own
from mindsigma.weights.adapters.adapter_file import read_adapter, write_adapter
from mindsigma.weights.own_sampling import own_sampling
from mindsigma.weights.sampling_header import KEY, told_by

ONCE = {"sampler": "one-step", "num_inference_steps": 1, "guidance_scale": 1.0, "timesteps": (650,)}
FOUR = {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def students(data, tmp_path_factory):  # noqa: F811
    """dict name -> folder of a checkpoint: a whole student of one step, an LCM-LoRA of three, one of four."""
    folder, few = tmp_path_factory.mktemp("students"), {"steps": 1}
    distil(data, folder / "dmd", "dmd", dmd_time=650, **few)
    distil(data, folder / "three", "lcm-lora", sample_steps=3, **few)
    distil(data, folder / "four", "lcm-lora", sample_sampler="dpm", sample_steps=20, **few)
    return {name: checkpoint(folder / name, 1) for name in ("dmd", "three", "four")}


def options_of(*arguments):
    """SamplingOptions of a command line of tools/generate.py."""
    return judged(build_parser().parse_args(["a cat", *map(str, arguments)]))


def test_what_is_written(students):
    """Of the student and its average; of the fake score nothing. The card tells it in words."""
    assert own_sampling(students["dmd"] / "dit") == ONCE
    assert own_sampling(students["dmd"] / "fake") == {"sampler": "dpm"}
    for name in ("adapter.safetensors", "adapter_ema.safetensors"):
        assert own_sampling("sigma-mini", [students["three"] / name]) == {**FOUR, "num_inference_steps": 3}
        assert own_sampling("sigma-mini", [students["four"] / name]) == FOUR
    card = (students["dmd"] / "README.md").read_text()
    assert "| made for sampler | `one-step`, 1 step, at timestep 650, no guidance; taken by default |" in card
    assert "| made for sampler | `lcm`, 3 steps, no guidance" in (students["three"] / "README.md").read_text()


def test_options_of_the_tools(students):
    """Flags win; with another sampler nothing of the record counts; the last adapter that tells something decides."""
    model = ("--model", students["dmd"] / "dit", "--components", "sigma-mini")
    found = options_of(*model)
    assert (found.sampler, found.num_inference_steps, found.guidance_scale, found.timesteps) == tuple(ONCE.values())
    assert options_of(*model, "--timesteps", 500).timesteps == (500,)
    other = options_of(*model, "--sampler", "dpm")
    assert (other.num_inference_steps, other.guidance_scale, other.timesteps) == (20, 4.5, None)
    lora = [flag for name in ("three", "four") for flag in ("--lora", f"{students[name]}:0.5")]
    assert options_of(*lora).num_inference_steps == 4 and options_of(*lora[:2]).num_inference_steps == 3
    assert options_of(*lora, "--steps", 2).num_inference_steps == 2
    assert options_of(*lora, "--timesteps", 999, 499, "--steps", 2).timesteps == (999, 499)
    assert options_of(*lora).sampler == options_of(*model, *lora).sampler == "lcm"


def test_drawn_so_and_told(students, tmp_path, monkeypatch):
    """By the command without a word about the sampler: the PNG tells, and is what the call draws."""
    model = str(students["dmd"] / "dit")
    flags = ["--model", model, "--components", "sigma-mini", "--out", str(tmp_path / "a.png"), "--device", "CPU"]
    flags.append("--no-resolution-binning")
    monkeypatch.setattr("sys.argv", ["generate.py", "a cat", *flags])
    assert load_tool("generate").main() == 0
    with Image.open(tmp_path / "a.png") as image:
        told, pixels = image.text, np.asarray(image)
    assert {name: told[name] for name in ("sampler", "steps", "guidance_scale", "timesteps")} == {
        "sampler": "one-step", "steps": "1", "guidance_scale": "1.0", "timesteps": "650.0",
    }  # fmt: skip
    assert json.loads(told["mindsigma"])["options"]["timesteps"] == [650]
    pipeline = PixArtSigmaPipeline.from_pretrained(model, components="sigma-mini", device="CPU")
    same, other = (
        pipeline("a cat", seed=0, progress=False, use_resolution_binning=False, **options).images[0]
        for options in ({}, {"timesteps": [400]})
    )
    np.testing.assert_array_equal(np.asarray(same), pixels)
    assert (np.asarray(other) != pixels).any()


def test_the_call_follows_the_adapter(students):
    """An adapter that is put in brings its sampling, and takes it along."""
    pipeline = PixArtSigmaPipeline.from_pretrained(
        str(students["dmd"] / "dit"), components="sigma-mini", device="CPU", lora=[students["three"]]
    )
    assert pipeline.sampling_options() == SamplingOptions("lcm", 3)
    pipeline.use(pipeline.with_lora([(students["four"] / "adapter_ema.safetensors", 0.5)]))
    assert pipeline.sampling_options() == SamplingOptions("lcm", 4)
    pipeline.use(pipeline.with_lora([]))
    assert pipeline.sampling_options(height=64) == SamplingOptions(**ONCE, height=64)
    assert pipeline.sampling_options(sampler="dpm") == SamplingOptions()


def test_translated(students, data, tmp_path, monkeypatch):  # noqa: F811
    """Our format keeps it, also of an adapter that is merged; a run of another method does not take it over."""

    def convert(*arguments):
        monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments), "--to", "mindspore"])
        assert load_tool("convert").main() == 0

    convert(students["dmd"] / "dit", tmp_path / "half", "--dtype", "fp16")
    assert own_sampling(tmp_path / "half") == ONCE
    convert(data[0], tmp_path / "merged", "--lora", students["three"])
    assert own_sampling(tmp_path / "merged")["num_inference_steps"] == 3
    convert(students["four"], tmp_path / "adapter.safetensors")
    assert own_sampling(None, [tmp_path / "adapter.safetensors"]) == FOUR


def test_a_record_that_is_none(students, tmp_path):
    """Named with its file; a file that is there anew is read anew."""
    adapter, path = read_adapter(students["three"] / "adapter.safetensors"), tmp_path / "adapter.safetensors"
    for sampling in ({"sampler": "dpn"}, {"sampler": "lcm", "command": "x"}, {"num_inference_steps": 3}, ["lcm"]):
        adapter.sampling = sampling
        write_adapter(path, adapter)
        for read in (lambda: read_adapter(path), lambda: options_of("--lora", path)):
            with pytest.raises(
                MindSigmaError, match="adapter.safetensors: its header tells how it is sampled"
            ) as found:
                read()
            assert "\n" not in str(found.value)
    adapter.sampling = {"sampler": "euler"}
    write_adapter(path, adapter)
    assert options_of("--lora", path).sampler == "euler"
    assert told_by(SimpleNamespace(metadata={"format": "pt", KEY: "dense"})) == {}


def test_own_and_given():
    own = {"sampler": "lcm", "num_inference_steps": 4}
    assert with_own(own, {"seed": 1}) == {**own, "seed": 1}
    assert with_own(own, {"sampler": "dpm"}) == {"sampler": "dpm"}
    assert with_own(own, {"timesteps": (999,)}) == {"sampler": "lcm", "timesteps": (999,)}
    assert own_sampling("PixArt-LCM-XL-2-1024-MS") == {"sampler": "lcm"} and own_sampling() == {"sampler": "dpm"}

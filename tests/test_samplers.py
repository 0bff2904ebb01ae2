"""The seam for samplers: the call, the command line, warm-up, shortcuts and export take one file and one name."""

import sys

import mindspore as ms
import numpy as np
import pytest
import walk
from conftest import GRAPH_IS_SLOW, load_tool, relative_error
from mindspore import Tensor, nn
from PIL import Image

from mindsigma import MindSigmaError
from mindsigma.inspect.parts import Request, export_part
from mindsigma.inspect.report import report_of
from mindsigma.inspect.report_text import text_of
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.pipeline.warm_up import Shape, warm_up
from mindsigma.sampling import SAMPLERS, sampler_class
from mindsigma.sampling.denoising import DenoisingGraphs, guide, scalars, scale_of_channels
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.options import SamplingOptions
from mindsigma.sampling.sampler import PredictorCorrector

SIDE, STEPS = 64, 4
DRAW = {
    "sampler": "walk", "num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "use_resolution_binning": False,
}  # fmt: skip
CALL = {**DRAW, "progress": False, "output_type": "latent"}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The sampler as if its file lay in mindsigma/sampling/ and its name in the table there."""
    monkeypatch.setitem(sys.modules, "mindsigma.sampling.walk", walk)
    monkeypatch.setitem(SAMPLERS, "walk", ("walk", "Walk"))


def expected(pipeline, seeds, order=2, steps=STEPS):
    """Latents that a walk ends at, and their shape."""
    start = pipeline.start_noise(seeds, SIDE, SIDE)
    fresh = [pipeline.fresh_noise(seeds, i, start.shape) for i in range(steps)]
    return walk.walked(start.astype(np.float64), fresh, order)


@GRAPH_IS_SLOW
def test_a_sampler_draws_from_each_image_s_own_seed(either_mini):
    together = either_mini(["a red apple", "a cat"], seed=5, **CALL).images
    assert relative_error(together, expected(either_mini, [5, 6])) < 1e-6
    alone = either_mini("a cat", seed=6, solver_order=3, **CALL).images
    assert relative_error(alone, expected(either_mini, [6], order=3)) < 1e-6


def test_fresh_noise_is_new_at_every_draw_and_in_every_image(mini):
    shape = (3, 4, 8, 8)
    seeds = [0, 1, 2**32]
    noise = np.stack([mini.start_noise(seeds, 64, 64), *(mini.fresh_noise(seeds, i, shape) for i in range(4))])
    assert noise.dtype == np.float32 and noise.shape == (5, *shape)
    rows = noise.reshape(15, -1).astype(np.float64)
    assert np.abs(np.corrcoef(rows) - np.eye(15)).max() < 0.25  # 256 numbers each
    assert abs(rows.mean()) < 0.05 and abs(rows.std() - 1) < 0.05


@pytest.mark.parametrize(
    "shortcuts",
    [{"guidance_halves": True}, {"guidance_interval": (0.0, 0.5)}, {"text_reuse": 0.5}, {"block_reuse": 2}],
    ids=lambda options: next(iter(options)),
)
def test_shortcuts_take_the_sampler(mini, shortcuts):
    latents = mini("a cat", seed=6, **CALL, **shortcuts).images
    assert relative_error(latents, expected(mini, [6])) < 1e-6


def test_own_loop_has_to_bring_noise(mini):
    caption = mini.encode_prompts(["a cat"])
    noise = mini.start_noise([1], SIDE, SIDE)
    options = SamplingOptions(**{**DRAW, "guidance_scale": 1.0})
    _, *steps = mini.denoise(noise, caption, None, options, lambda i, shape: np.full(shape, float(i)))
    end = walk.walked(noise.astype(np.float64), [np.full(noise.shape, float(i)) for i in range(STEPS)], 2)
    assert relative_error(steps[-1].latents.asnumpy(), end) < 1e-6
    with pytest.raises(MindSigmaError, match="Walk draws noise at every step"):
        next(mini.denoise(noise, caption, None, options))


def test_command_line(mini, tmp_path, monkeypatch):
    tool, out = load_tool("generate"), tmp_path / "apple.png"
    options = ["--sampler", "walk", "--steps", str(STEPS), "--seed", "7", "--out", str(out)]
    options += ["--height", str(SIDE), "--width", str(SIDE), "--no-resolution-binning"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "a red apple", *options])
    assert tool.main() == 0
    picture = mini("a red apple", seed=7, **{**CALL, "output_type": "pil"}).images[0]
    with Image.open(out) as image:
        assert image.text["sampler"] == "walk" and image.text["steps"] == str(STEPS)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(picture).astype(int)).max() <= 1


def test_warm_up(plain_mini, monkeypatch, graph_mode):
    monkeypatch.setattr(plain_mini, "_steps", None)
    options = SamplingOptions(**DRAW)
    assert warm_up(plain_mini, Shape(SIDE, SIDE, 1, 16), options) >= 3
    caption = plain_mini.encode_prompts(["a red apple", ""])
    states, mask = caption.states.asnumpy(), caption.mask.asnumpy()
    given = {"prompt_embeds": states[:1], "prompt_mask": mask[:1]}
    given.update(negative_prompt_embeds=states[1:], negative_prompt_mask=mask[1:])
    before = compiled_graphs()
    plain_mini(**given, seed=1, **{**CALL, "output_type": "np"})
    assert compiled_graphs() == before


def test_export():
    request = Request("sigma-mini", "step", SIDE, SIDE, tokens=16, depth=1, weights=False)
    plain, other = (export_part(Request(**{**vars(request), "sampler": name}))[0].inputs for name in ("dpm", "walk"))
    assert len(other) - walk.Walk.kept == len(plain) - DPMSolver.kept + 1  # the noise


def test_unknown_names():
    with pytest.raises(MindSigmaError, match="sampler must be one of dpm, .*, walk, not 'heun'"):
        sampler_class("heun")
    with pytest.raises(MindSigmaError, match="sampler must be one of"):
        SamplingOptions(sampler="heun")


class Alone(nn.Cell):
    """A sampler's step without the network."""

    def __init__(self, sampler):
        super().__init__()
        self.sampler = sampler

    def construct(self, latents, history, numbers, noise, variance, fresh):
        return self.sampler(latents, history, scalars(numbers), noise, variance, fresh)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "walk"])
def test_step_in_a_graph(name, graph_mode):
    """As NumPy computes it from the same numbers."""
    sampler = SamplingOptions(sampler=name).solver("diffusers")
    row = sampler.table(sampler.steps)[sampler.steps // 2]
    rng = np.random.default_rng(0)
    latents, noise, variance, fresh, *history = rng.standard_normal((4 + sampler.kept, 2, 4, 3, 5)).astype(np.float32)
    numbers = Tensor(np.array(row.numbers, np.float32))
    before = ms.mutable(tuple(map(Tensor, history))) if history else ()
    made, kept = Alone(sampler)(Tensor(latents), before, numbers, *map(Tensor, (noise, variance, fresh)))
    assert len(kept) == sampler.kept
    x0 = (latents - row.sigma * noise) / row.alpha
    if name == "iddpm":
        _, _, keep, weight, low, high, noisy = row.numbers
        std = np.exp(0.5 * (low + (0.5 + 0.5 * variance) * (high - low)))
        expected = keep * latents + weight * x0 + noisy * std * fresh
    elif isinstance(sampler, PredictorCorrector):
        predictions, count = [x0, *history[1:]], sampler.kept
        a, b, *numbers = row.numbers[2:]
        start = a * latents + b * history[0] + sum(w * x for w, x in zip(numbers, predictions))
        keep, std, *numbers = numbers[count:]
        expected = keep * start + sampler.draws * std * fresh + sum(w * x for w, x in zip(numbers, predictions))
    else:
        keep, *weights = row.numbers[2:]
        parts = [x0, *history, fresh]
        expected = keep * latents + sum(weight * part for weight, part in zip(weights, parts))
    assert relative_error(made.asnumpy(), expected) < 1e-5


def test_samplers_of_one_step_share_its_graph(mini):
    graphs = DenoisingGraphs(mini.dit)
    shape = (1, 4, 8, 8)
    steps = {
        name: graphs.step(SamplingOptions(sampler=name).solver("diffusers"), True, shape)
        for name in SAMPLERS
        if name != "walk"
    }
    assert steps["ddim"] is steps["euler"] is steps["one-step"] and steps["lcm"] is steps["euler-ancestral"]
    assert len({id(steps[name]) for name in ("ddim", "lcm", "dpm", "iddpm", "sa")}) == 5
    sampler = SamplingOptions(sampler="ddim").solver("diffusers")
    assert graphs.step(sampler, True, shape, rescale=0.5) is not steps["ddim"]


@pytest.mark.parametrize(("name", "noise"), [("iddpm", "drawn ahead by the host"), ("euler", "none")])
def test_report_of_an_exported_step(name, noise):
    request = Request("sigma-mini", "step", SIDE, SIDE, tokens=16, depth=1, weights=False, sampler=name)
    report = report_of(*export_part(request))
    assert report["host"] == [] and report["violations"] == []
    line = next(line for line in text_of(report).split("\n") if line.startswith("sampler"))
    assert name in line and f"noise: {noise}" in line


def test_injected_noise(mini):
    """It stands for the images' own; the draws that a step does not use are not asked for."""
    asked = []

    def own(draw, shape):
        asked.append(draw)
        return mini.fresh_noise([6], draw, shape)

    call = {**CALL, "sampler": "ddim", "eta": 1.0, "seed": 6}
    assert (mini("a cat", **call, step_noise=own).images == mini("a cat", **call).images).all()
    assert asked == [0, 1, 2]
    for options, function, message in (
        ({"sampler": "ddim"}, own, "step_noise must be a function, for a sampler that draws noise, not for ddim"),
        ({"sampler": "lcm"}, 3, "step_noise must be a function"),
        ({"sampler": "lcm"}, lambda *_: np.zeros(3), r"step_noise: draw 0 of shape \(3,\), expected"),
        ({"sampler": "lcm"}, lambda _, shape: np.full(shape, np.nan), "step_noise: draw 0 hold NaN"),
        ({"sampler": "lcm"}, lambda _, shape: "x", "step_noise: draw 0 must be an array"),
    ):
        with pytest.raises(MindSigmaError, match=message):
            mini("a cat", **{**CALL, **options}, step_noise=function)


@pytest.mark.parametrize("name", ["sa", "iddpm", "euler-ancestral"])
def test_an_image_does_not_depend_on_its_batch(mini, name):
    call = {**CALL, "sampler": name, "num_inference_steps": 3}
    together = mini(["a red apple", "a cat"], seed=5, **call).images
    alone = mini("a cat", seed=6, **call).images
    assert relative_error(together[1:], alone) < 1e-4  # few steps at an odd size enlarge what was rounded
    assert relative_error(mini("a cat", seed=7, **call).images, alone) > 0.1


def test_guidance_of_some_channels_and_rescaled():
    rng = np.random.default_rng(1)
    prediction = rng.standard_normal((4, 8, 6, 6)).astype(np.float32)
    unconditional, conditional = prediction[:2, :4].astype(np.float64), prediction[2:, :4].astype(np.float64)
    guided = unconditional + 4.5 * (conditional - unconditional)
    some = guide(Tensor(prediction), scale_of_channels(4.5, 3, 4), True, 4).asnumpy()
    assert relative_error(some[:, :3], guided[:, :3]) < 1e-6 and relative_error(some[:, 3], conditional[:, 3]) < 1e-6
    ratio = [c.std(ddof=1) / g.std(ddof=1) for c, g in zip(conditional, guided)]
    expected = 0.7 * guided * np.array(ratio).reshape(2, 1, 1, 1) + 0.3 * guided
    rescaled = guide(Tensor(prediction), scale_of_channels(4.5, None, 4), True, 4, 0.7).asnumpy()
    assert relative_error(rescaled, expected) < 1e-6


def test_guidance_rescale_draws_another_picture(mini):
    call = {**CALL, "sampler": "euler", "seed": 6}
    plain, rescaled = (mini("a cat", **call, guidance_rescale=value).images for value in (0.0, 0.7))
    assert relative_error(rescaled, plain) > 0.05 and rescaled.std() < plain.std()

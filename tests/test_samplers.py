"""The seam for samplers: the call, the command line, warm-up, shortcuts and export take one file and one name."""

import sys

import numpy as np
import pytest
import walk
from conftest import load_tool, relative_error
from PIL import Image

from mindsigma import MindSigmaError
from mindsigma.inspect.parts import Request, export_part
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.pipeline.warm_up import Shape, warm_up
from mindsigma.sampling import SAMPLERS, sampler_class
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.options import SamplingOptions

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
    with pytest.raises(MindSigmaError, match="sampler must be one of dpm, walk, not 'euler'"):
        sampler_class("euler")
    with pytest.raises(MindSigmaError, match="sampler must be one of"):
        SamplingOptions(sampler="euler")

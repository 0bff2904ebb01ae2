"""Approximate speed-ups: off they change no bit, on they do the work that their table says and stay near the exact."""

import mindspore as ms
import numpy as np
import pytest
from conftest import load_tool, relative_error
from mindspore import Tensor, ops

from mindsigma import MindSigmaError
from mindsigma.backends.ascend import align_heads
from mindsigma.models.dit import DiT, DiTBlock, DiTConfig
from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.reuse import ReusingDiT
from mindsigma.sampling.shortcuts import (
    KEEP_BLOCKS,
    KEEP_TEXT,
    PLAIN,
    TAKE_BLOCKS,
    TAKE_TEXT,
    Shortcuts,
    cost,
    repeated_blocks,
)

STEPS = 6
PROMPTS = ["a red apple", "a cat"]


def draw(pipeline, **options):
    """Latents of two prompts."""
    options = {"num_inference_steps": STEPS, "seed": 3, **options}
    return pipeline(PROMPTS, output_type="latent", progress=False, **options).images


def small_trajectory(shortcuts, aligned=False, halves=False):
    """Latents after four steps of a small network with random weights, some layers compressed."""
    config = DiTConfig(
        input_size=8, hidden_size=64, depth=4, num_heads=4, caption_channels=32, kv_compression="conv:2:2-3"
    )
    dit = DiT(config)
    rng = np.random.default_rng(0)
    for parameter in dit.get_parameters():
        parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.2))
    if aligned:
        align_heads(dit)
    states = Tensor(rng.standard_normal((2, 2, 5, 32)).astype(np.float32))
    mask = Tensor(np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32))
    trajectory = denoising_steps(
        DenoisingGraphs(dit),
        Tensor(rng.standard_normal((2, 4, 8, 8)).astype(np.float32)),
        DPMSolver(),
        4,
        (states[0], mask),
        4.5,
        (states[1], mask),
        halves=halves,
        shortcuts=shortcuts,
    )
    next(trajectory)
    return [step.latents.asnumpy() for step in trajectory][-1]


def kinds(shortcuts, steps, guided=True):
    """The plan in short."""
    return [(step.guided, step.kind) for step in shortcuts.plan(steps, guided)]


def test_plans_are_what_their_rules_say():
    assert kinds(Shortcuts(), 3) == [(True, PLAIN)] * 3
    assert kinds(Shortcuts(), 3, guided=False) == [(False, PLAIN)] * 3
    assert kinds(Shortcuts((0.25, 0.75)), 4) == [(False, PLAIN), (True, PLAIN), (True, PLAIN), (False, PLAIN)]
    text = [(True, PLAIN), (True, KEEP_TEXT), (True, TAKE_TEXT), (True, TAKE_TEXT)]
    assert kinds(Shortcuts(text_reuse=0.5), 4) == text
    gated = [(True, PLAIN), (True, KEEP_TEXT), (False, TAKE_TEXT), (False, TAKE_TEXT)]
    assert kinds(Shortcuts((0.0, 0.5), text_reuse=0.5), 4) == gated
    blocks = [(True, KEEP_BLOCKS), (True, TAKE_BLOCKS), (True, TAKE_BLOCKS), (True, KEEP_BLOCKS), (True, TAKE_BLOCKS)]
    assert kinds(Shortcuts(block_reuse=3), 5) == blocks
    # What one half kept does not do for two.
    late = [(False, PLAIN), (True, KEEP_BLOCKS), (True, TAKE_BLOCKS), (False, TAKE_BLOCKS)]
    assert kinds(Shortcuts((0.25, 0.75), block_reuse=4), 4) == late


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_what_is_taken_was_kept_before(steps):
    """No plan takes from a step that kept too little, and none keeps for nobody."""
    for shortcuts in [
        Shortcuts((a, b), text, blocks)
        for a, b in ((0, 1), (0, 0.6), (0.3, 1), (0.2, 0.9))
        for text, blocks in ((1, 1), (0.4, 1), (0.01, 1), (1, 2), (1, 3), (1, 50))
    ]:
        if not any(a <= (i + 0.5) / steps <= b for i in range(steps) for a, b in [shortcuts.guidance_interval]):
            continue
        plan, kept = shortcuts.plan(steps, True), None
        for i, step in enumerate(plan):
            if step.kind in (TAKE_TEXT, TAKE_BLOCKS):
                assert kept is not None and (kept or not step.guided)
                kept = step.guided
            else:
                kept = step.guided if step.kind != PLAIN else None
                assert step.kind == PLAIN or plan[i + 1].kind in (TAKE_TEXT, TAKE_BLOCKS)


def test_cost_in_closed_form():
    depth, steps = 28, 20
    assert cost(Shortcuts().plan(steps, True), depth) == 2 * depth * steps
    assert cost(Shortcuts((0.0, 0.5)).plan(steps, True), depth) == depth * (2 * 10 + 10)
    assert repeated_blocks(28) == (7, 21) and repeated_blocks(8) == (2, 6) and repeated_blocks(3) == (1, 2)
    assert cost(Shortcuts(block_reuse=2).plan(steps, True), depth) == 2 * (10 * 28 + 10 * 14)
    assert cost(Shortcuts((0.0, 0.5), block_reuse=2).plan(steps, True), depth) == 15 * (28 + 14)


@pytest.mark.parametrize(
    "bad",
    [
        {"guidance_interval": (0.5, 0.5)}, {"guidance_interval": (-0.1, 1)}, {"guidance_interval": (0, 1.1)},
        {"guidance_interval": (0, float("nan"))}, {"guidance_interval": (0,)}, {"guidance_interval": "01"},
        {"guidance_interval": (0.51, 0.52)}, {"guidance_interval": (0, 0.5), "guidance_scale": 1.0},
        {"text_reuse": 0}, {"text_reuse": 1.5}, {"text_reuse": "half"}, {"block_reuse": 0}, {"block_reuse": 1.5},
        {"block_reuse": True}, {"text_reuse": 0.5, "block_reuse": 2},
    ],
)  # fmt: skip
def test_bad_values_are_refused(mini, bad):
    with pytest.raises(MindSigmaError, match="guidance_interval|text_reuse|block_reuse"):
        draw(mini, **bad)


def test_off_changes_no_bit_and_on_stays_near(mini):
    """Relative errors measured at six steps are 0.30, 0.39 and 0.34."""
    exact = draw(mini)
    assert (draw(mini, guidance_interval=(0.0, 1.0), text_reuse=1.0, block_reuse=1) == exact).all()
    for options, limit in (
        ({"guidance_interval": (0.0, 0.5)}, 0.45),
        ({"text_reuse": 0.5}, 0.55),
        ({"block_reuse": 2}, 0.5),
    ):
        assert 0 < relative_error(draw(mini, **options), exact) < limit, options


@pytest.mark.parametrize("options", [{}, {"guidance_interval": (0.0, 0.5)}, {"text_reuse": 0.5}, {"block_reuse": 2}])
def test_blocks_run_are_those_of_the_plan(options, monkeypatch):
    construct, count = DiTBlock.construct, []
    monkeypatch.setattr(DiTBlock, "construct", lambda self, x, *rest: count.append(len(x)) or construct(self, x, *rest))
    shortcuts = Shortcuts(**options)
    small_trajectory(shortcuts)
    assert sum(count) == 2 * cost(shortcuts.plan(4, True), 4)


@pytest.mark.parametrize("keep,take,limit", [(KEEP_TEXT, TAKE_TEXT, 0.01), (KEEP_BLOCKS, TAKE_BLOCKS, 0.033)])
def test_what_was_kept_at_the_same_timestep_is_exact(mini, keep, take, limit):
    """Nearby it is closer than the prediction kept as a whole would be (error 0.033)."""
    caption = mini.encode_prompts(["", "a red apple"])
    text_kv = mini.dit.text_kv(caption.states, caption.mask)
    latents = Tensor(np.random.default_rng(0).standard_normal((2, 4, 32, 32)).astype(np.float32))
    position = mini.dit.position(latents.shape)
    here, before = (ops.concat(mini.dit.modulations(Tensor(np.array([t], np.float32))), 1) for t in (300, 320))
    exact = mini.dit.denoise(latents, here, text_kv, position).asnumpy()
    keeping, taking = ReusingDiT(mini.dit, keep), ReusingDiT(mini.dit, take)
    prediction, kept = keeping(latents, here, text_kv, position)
    assert (prediction.asnumpy() == exact).all()
    assert relative_error(taking(latents, here, text_kv, position, kept)[0].asnumpy(), exact) < 1e-6
    _, kept = keeping(latents, before, text_kv, position)
    error = relative_error(taking(latents, here, text_kv, position, kept)[0].asnumpy(), exact)
    assert 1e-5 < error < limit


SMALL = [Shortcuts((0.0, 0.5)), Shortcuts((0.0, 0.7), text_reuse=0.5), Shortcuts((0.2, 0.7), block_reuse=2)]


@pytest.mark.parametrize("shortcuts", SMALL)
def test_aligned_heads_and_halves_compute_the_same(shortcuts):
    eager = small_trajectory(shortcuts)
    assert relative_error(eager, small_trajectory(Shortcuts())) > 1e-4  # it is not the exact one
    assert relative_error(small_trajectory(shortcuts, halves=True), eager) < 1e-5
    assert relative_error(small_trajectory(shortcuts, aligned=True), eager) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("shortcuts", SMALL)
def test_a_graph_computes_the_same(shortcuts):
    eager = small_trajectory(shortcuts)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        assert relative_error(small_trajectory(shortcuts), eager) < 1e-5
        if shortcuts.text_reuse < 1:
            assert relative_error(small_trajectory(shortcuts, aligned=True, halves=True), eager) < 1e-5
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_options_reach_the_picture(tmp_path, monkeypatch):
    from PIL import Image

    generate = load_tool("generate")
    out = tmp_path / "apple.png"
    options = ["--guidance-interval", "0", "0.6", "--block-reuse", "2", "--steps", "3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["generate.py", "a red apple", *options])
    assert generate.main() == 0
    told = Image.open(out).text
    assert told["guidance_interval"] == "0.0 0.6" and told["block_reuse"] == "2" and "text_reuse" not in told
    (tmp_path / "bad.yaml").write_text("guidance-interval: 0.5\n")
    monkeypatch.setattr("sys.argv", ["generate.py", "x", "--config", str(tmp_path / "bad.yaml")])
    with pytest.raises(MindSigmaError, match="guidance-interval must be a list of 2"):
        generate.main()

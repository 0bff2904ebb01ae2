"""Perturbed-attention guidance: diffusers' latents, the identity map in closed form, only the work that it needs."""

import json
import zlib

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, psnr, relative_error
from mindspore import Parameter, Tensor, ops

from mindsigma import MindSigmaError
from mindsigma.backends.ascend import align_heads
from mindsigma.backends.cpu import accelerate, is_accelerated
from mindsigma.backends.cpu.library import library
from mindsigma.models.dit import DiT, DiTBlock, DiTConfig, KVCompression
from mindsigma.models.linear import LowRank
from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps, guide
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.perturbed import PerturbedAttention, PerturbedDiT, chosen_layers, perturbed_text_kv
from mindsigma.sampling.shortcuts import Shortcuts, cost

REFERENCE = np.load(GOLDEN / "sampler_pag.npz")
CONFIG = json.loads(str(REFERENCE["config"]))


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def noise_of(seed, tag, shape):
    """The draw of a reference case."""
    return np.random.default_rng([seed, zlib.crc32(tag.encode()), 0]).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", ["latents", "latents_no_cfg", "latents_two_layers", "latents_adaptive"])
def test_latents_are_diffusers(mini, name):
    case = CONFIG[name]
    latents = mini(
        [str(prompt) for prompt in REFERENCE["prompts"]],
        latents=noise_of(CONFIG["seed"], "z", REFERENCE[name].shape),
        num_inference_steps=case["steps"],
        guidance_scale=case["guidance"],
        pag_scale=case["scale"],
        pag_layers=[int(layer.removeprefix("blocks.")) for layer in case["layers"]],
        pag_adaptive_scale=case.get("adaptive", 0.0),
        output_type="latent",
        progress=False,
    ).images
    assert relative_error(latents, REFERENCE[name]) < 5e-5
    if name == "latents":
        image = mini.decode(latents[:1])[0]
        assert psnr(image * 255, REFERENCE["image"][0], 255) > 55  # its rounding to bytes is 59


KINDS = {
    "plain": {},
    "low rank": {},
    "conv and q/k norm": {"qk_norm": True, "kv_compression": KVCompression("conv", 2, (1,))},
    "uniform_every": {"kv_compression": KVCompression("uniform_every", 3, (1,))},
}


def small_dit(kind, seed=0):
    """A small network of random weights, of 3 blocks."""
    dit = DiT(DiTConfig(input_size=8, hidden_size=72, depth=3, num_heads=3, caption_channels=16, **KINDS[kind]))
    for i, parameter in enumerate(dit.get_parameters()):
        scale = np.float32(max(parameter.shape[-1], 8) ** -0.5)
        parameter.set_data(Tensor(drawn(seed + i, *parameter.shape) * scale))
    if kind == "low rank":
        linear = dit.blocks[1].attn.qkv
        shapes = (4, 72), (72, 4), (72,)
        tensors = [Parameter(Tensor(drawn(90 + i, *shape)), name=f"low{i}") for i, shape in enumerate(shapes)]
        linear.change([LowRank(*tensors, 2, 3, 0.3)])
    return dit.set_train(False)


def attend(attention, x, perturbed):
    return attention(Tensor(x), 4, 4, None, perturbed).asnumpy()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_attends_to_itself_alone(kind):
    """out = proj(v), with v at full length in a layer that compresses it; the other images are not touched."""
    attention = small_dit(kind).blocks[1].attn
    x = drawn(7, 3, 16, 72)
    weight, bias = attention.qkv.merged_weight().asnumpy(), attention.qkv.bias.asnumpy()
    proj, proj_bias = attention.proj.weight.asnumpy(), attention.proj.bias.asnumpy()
    v = x[2:].astype(np.float64) @ weight[144:].T.astype(np.float64) + bias[144:]
    expected = v @ proj.T.astype(np.float64) + proj_bias
    plain, perturbed = attend(attention, x, 0), attend(attention, x, 1)
    assert relative_error(perturbed[2:], expected) < 1e-6
    assert relative_error(perturbed[:2], plain[:2]) < 1e-6 < 1e-2 < relative_error(plain[2:], expected)


def predict(dit, layers, guided=True):
    """Both results of a PerturbedDiT for four images, of which two are conditional if guided."""
    latents, caption = Tensor(drawn(1, 4, 4, 8, 8)), Tensor(drawn(2, 4, 5, 16))
    mask = np.ones((4, 5), np.int32)
    mask[2, 3:] = 0
    count = 2 if guided else 4
    text_kv = perturbed_text_kv(dit.text_kv(caption, Tensor(mask)), layers[0], count)
    modulation = ops.concat(dit.modulations(Tensor(np.array([321.0], np.float32))), 1)
    network = PerturbedDiT(dit, layers, guided)
    return [part.asnumpy() for part in network(latents, modulation, text_kv, dit.position(latents.shape))]


def blocks_by_hand(dit, layers):
    """What `predict` returns, of six images through all blocks and an attention map that is the identity."""
    latents, caption = drawn(1, 4, 4, 8, 8), drawn(2, 4, 5, 16)
    latents, caption = (np.concatenate((array, array[2:])) for array in (latents, caption))
    mask = np.ones((6, 5), np.int32)
    mask[[2, 4], 3:] = 0
    position = dit.position(latents.shape)
    rows = dit.modulations(Tensor(np.array([321.0], np.float32)))
    text_kv = dit.text_kv(Tensor(caption), Tensor(mask))
    x = dit.x_embedder(Tensor(latents), position)
    for i, block in enumerate(dit.blocks):
        x = block(x, rows[i], *text_kv[i], 4, 4, None, None, 2 if i in layers else 0)[0]
    prediction = dit.final_layer(x, rows[3], 4, 4).asnumpy()
    return prediction[:4], prediction[4:]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shared_until_the_first_layer_is_exact(kind):
    dit = small_dit(kind)
    for layers in ((1,), (1, 2), (0,)):
        for found, expected in zip(predict(dit, layers), blocks_by_hand(dit, layers)):
            assert relative_error(found, expected) < 1e-6
    apart = predict(dit, (1,))
    assert relative_error(apart[1], apart[0][2:]) > 1e-2
    assert relative_error(predict(dit, (1,), guided=False)[1][2:], apart[1]) < 1e-6


@pytest.mark.skipif(library() is None, reason="no C++ compiler, or MINDSIGMA_NATIVE=0")
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_compute_the_same(kind):
    plain, fast = small_dit(kind), accelerate(small_dit(kind))
    assert is_accelerated(fast)
    for layers in ((1,), (0, 2)):
        for found, expected in zip(predict(fast, layers), predict(plain, layers)):
            assert relative_error(found, expected) < 2e-6
    modulations = [Tensor(drawn(5, 4, 6, 72)) for _ in range(2)]  # of each image its own
    for dit, modulation in zip((plain, fast), modulations):
        kv = dit.text_kv(Tensor(drawn(2, 4, 5, 16)), None)[1]
        dit.result = dit.blocks[1](Tensor(drawn(6, 4, 16, 72)), modulation, *kv, 4, 4, None, None, 3)[0].asnumpy()
    assert relative_error(fast.result, plain.result) < 2e-6
    with pytest.raises(NotImplementedError, match="perturbed attention is for sampling"):
        fast.set_train().blocks[1](Tensor(drawn(6, 4, 16, 72)), modulation, *kv, 4, 4, None, None, 3)


def trajectory(graphs, pag, guidance_scale=4.5, steps=4, sampler=None, **options):
    """Latents after some steps of two images."""
    states, mask = Tensor(drawn(3, 2, 2, 5, 16)), Tensor(np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32))
    unconditional = (states[1], mask) if guidance_scale > 1 else None
    run = denoising_steps(
        graphs, Tensor(drawn(4, 2, 4, 8, 8)), sampler or DPMSolver(), steps, (states[0], mask), guidance_scale,
        unconditional, pag=pag, **options,
    )  # fmt: skip
    next(run)
    return [step.latents.asnumpy() for step in run][-1]


FALLS = PerturbedAttention((1,), 3.0, 0.006)  # scale 2.99 at 999, 1.49 at 749, 0 at 500 and 250


def test_graph_aligned_heads_and_halves_compute_the_same():
    graphs = DenoisingGraphs(small_dit("conv and q/k norm"))
    eager = trajectory(graphs, FALLS)
    assert relative_error(eager, trajectory(graphs, None)) > 1e-2
    assert relative_error(trajectory(graphs, FALLS, halves=True), eager) < 1e-5
    wide = DenoisingGraphs(align_heads(small_dit("conv and q/k norm")))
    assert relative_error(trajectory(wide, FALLS), eager) < 1e-5
    steady = PerturbedAttention((1,), 3.0)  # one graph a step
    eager = trajectory(wide, steady, steps=2)
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        assert relative_error(trajectory(wide, steady, steps=2), eager) < 1e-5
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_aligned_heads_without_compression():
    dit, x = small_dit("plain"), drawn(7, 3, 16, 72)
    narrow = attend(dit.blocks[1].attn, x, 1)
    assert relative_error(attend(align_heads(dit).blocks[1].attn, x, 1), narrow) < 1e-6


def test_blocks_run_are_those_that_it_needs(monkeypatch):
    """For each image two of guidance, and a third one from the first layer on while the scale is above 0."""
    construct, count = DiTBlock.construct, []
    monkeypatch.setattr(DiTBlock, "construct", lambda self, x, *rest: count.append(len(x)) or construct(self, x, *rest))
    graphs = DenoisingGraphs(small_dit("plain"))

    def images(*arguments, **options):
        count.clear()
        trajectory(graphs, *arguments, **options)
        return sum(count) // 2  # of two images

    assert images(PerturbedAttention((1,), 3.0)) == 4 * (2 + 3 + 3)
    assert images(PerturbedAttention((0, 2), 3.0)) == 4 * (3 + 3 + 3)
    assert images(PerturbedAttention((2,), 3.0), 1.0) == 4 * (1 + 1 + 2)
    assert images(FALLS) == 2 * (2 + 3 + 3) + 2 * (2 + 2 + 2)
    interval = Shortcuts((0.0, 0.5))
    assert images(PerturbedAttention((1,), 3.0), shortcuts=interval) == 2 * (2 + 3 + 3) + 2 * 3
    assert images(PerturbedAttention((1,), 3.0), halves=True) == 4 * (2 + 3 + 3)
    assert cost(Shortcuts().plan(4, True, 0, True), 28, 14) == 4 * (28 + 28 + 14)


def test_scale_and_layers():
    assert [FALLS.scale_at(t) for t in (1000, 500, 0)] == [3.0, 0.0, 0.0]
    assert chosen_layers(None, 28) == (14,) and chosen_layers((5, 3, 5), 8) == (3, 5)
    with pytest.raises(MindSigmaError, match="28: the model has the blocks 0 ... 27"):
        chosen_layers((3, 28), 28)


def test_guidance_in_closed_form():
    prediction, perturbed = drawn(1, 4, 8, 3, 3), drawn(2, 2, 8, 3, 3)
    u, c, p = prediction[:2, :4], prediction[2:, :4], perturbed[:, :4]
    scales = Tensor(4.5, ms.float32), Tensor(3.0, ms.float32)
    expected = u + 4.5 * (c - u) + 3.0 * (c - p)
    found = guide(Tensor(prediction), scales, True, 4, 0.0, Tensor(perturbed)).asnumpy()
    assert relative_error(found, expected) < 1e-6
    factor = 0.7 * c.std((1, 2, 3)) / expected.std((1, 2, 3)) + 0.3
    found = guide(Tensor(prediction), scales, True, 4, 0.7, Tensor(perturbed)).asnumpy()
    assert relative_error(found, expected * factor.reshape(-1, 1, 1, 1)) < 1e-6
    alone = guide(Tensor(prediction[2:]), scales, False, 4, 0.0, Tensor(perturbed)).asnumpy()
    assert relative_error(alone, c + 3.0 * (c - p)) < 1e-6


@pytest.mark.parametrize(
    "bad, text",
    [
        ({"pag_scale": -1}, "pag_scale must be at least 0"),
        ({"pag_scale": "3"}, "pag_scale must be a finite number"),
        ({"pag_scale": 3, "pag_layers": "8"}, "8: the model has the blocks 0 ... 7"),
        ({"pag_scale": 3, "pag_layers": "blocks.1"}, "pag_layers must be numbers of blocks"),
        ({"pag_scale": 3, "pag_layers": [1.5]}, "pag_layers must be numbers of blocks"),
        ({"pag_scale": 3, "pag_layers": True}, "pag_layers must be numbers of blocks"),
        ({"pag_scale": 3, "pag_layers": ()}, "pag_layers must be numbers of blocks"),
        ({"pag_scale": 3, "pag_layers": "3-99999999999"}, "pag_layers must be numbers of blocks"),
        ({"pag_scale": 3, "pag_layers": -1}, "pag_layers must be numbers of blocks"),
        ({"pag_layers": 4}, "need a pag_scale above 0"),
        ({"pag_adaptive_scale": 0.01}, "need a pag_scale above 0"),
        ({"pag_scale": 3, "text_reuse": 0.5}, "exclude pag_scale"),
        ({"pag_scale": 3, "block_reuse": 2}, "exclude pag_scale"),
    ],
)
def test_bad_values_are_refused(mini, bad, text):
    with pytest.raises(MindSigmaError, match=text):
        mini("a cat", num_inference_steps=2, progress=False, **bad)

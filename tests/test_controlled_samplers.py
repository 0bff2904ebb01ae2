"""ControlNets with every sampler, under a mask, beside adapters: as a loop by hand; a fresh one changes nothing."""

from dataclasses import replace

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from control_cases import control, small
from mindspore import Tensor
from test_perturbed import drawn, small_dit, trajectory
from training_runs import write_network

from mindsigma import MindSigmaError, PixArtSigmaPipeline, load_dit
from mindsigma.models.controlnet import ControlledDiT, ControlNet
from mindsigma.models.dit import DiT
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.pipeline.warm_up import Shape, warm_up
from mindsigma.sampling import SAMPLERS
from mindsigma.sampling.denoising import DenoisingGraphs
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.options import SamplingOptions
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, write_adapter
from mindsigma.weights.loading import open_controlnet, open_dit
from mindsigma.weights.saving import save_network


def fresh_noise(draw, shape):
    """Of a sampler that draws."""
    return drawn(700 + draw, *shape)


def solver(name, convention="diffusers"):
    """(Sampler, steps, guidance scale) of a test of it."""
    sampler = SamplingOptions(sampler=name).solver(convention)
    return sampler, 1 if name == "one-step" else 2, sampler.guidance


def by_hand(controlled, one, sampler, steps, guidance_scale, conditions=()):
    """Latents after a trajectory, each half of guidance by one call of a ControlledDiT, the rest by NumPy.

    Inputs are those of `trajectory`. `one`: Control of scale 1. The sampler's own step has goldens of its own.
    """
    states, mask = drawn(3, 2, 2, 5, 16), np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    table, start = sampler.table(steps), drawn(4, 2, 4, 8, 8)
    latents, history = Tensor(start * np.float32(sampler.start_scale(table))), sampler.start_history(start.shape)
    condition, mask = Tensor(np.broadcast_to(one.condition, start.shape).copy()), Tensor(mask)
    for i, row in enumerate(table):
        timestep = Tensor(np.full(2, row.timestep, np.float32))
        halves = [
            controlled(latents, condition, timestep, Tensor(states[k]), mask, *conditions).asnumpy()
            for k in ((1, 0) if guidance_scale > 1 else (0,))
        ]
        noise, variance = halves[-1][:, :4], halves[-1][:, 4:]
        if guidance_scale > 1:
            noise = noise.copy()
            channels = slice(sampler.guided_channels)
            plain = halves[0][:, :4][:, channels]
            noise[:, channels] = plain + np.float32(guidance_scale) * (noise[:, channels] - plain)
        fresh = None
        if sampler.draws:
            fresh = fresh_noise(sampler.first_draw + i, start.shape) if row.draws else np.zeros_like(start)
            fresh = Tensor(fresh)
        variance = Tensor(variance) if sampler.learned_variance else None
        latents, history = sampler(latents, history, row.numbers, Tensor(noise), variance, fresh)
    return latents.asnumpy()


@pytest.fixture(scope="module")
def networks():
    """DenoisingGraphs of a small DiT, a ControlNet with drawn maps, one without training."""
    graphs, controlnet = small()
    return graphs, controlnet, ControlNet.from_dit(graphs.dit, 2)


def compare(networks, sampler, steps, scale, conditions=None):
    """A fresh ControlNet against none, another one against the loop by hand."""
    graphs, controlnet, fresh = networks
    how = {"sampler": sampler, "steps": steps, "guidance_scale": scale, "fresh_noise": fresh_noise}
    how["conditions"] = conditions
    base = trajectory(graphs, None, **how)
    assert relative_error(trajectory(graphs, None, controls=[control(fresh)], **how), base) < 1e-6
    found = trajectory(graphs, None, controls=[control(controlnet)], **how)
    assert relative_error(found, base) > 1e-3
    each = tuple(Tensor(np.repeat(one.asnumpy(), 2, 0)) for one in conditions or ())
    expected = by_hand(ControlledDiT(graphs.dit, controlnet), control(controlnet), sampler, steps, scale, each)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_every_sampler(networks, name):
    compare(networks, *solver(name))


@pytest.mark.parametrize("name", ["iddpm", "sa"])
def test_as_the_official_code_samples(networks, name):
    """Where only three channels are guided, and where the first draw is left out."""
    compare(networks, *solver(name, "official"))


@pytest.mark.parametrize("name", ["dpm", "euler-ancestral"])
def test_under_a_mask(networks, name):
    sampler, steps, scale = solver(name)
    mask = (np.arange(64).reshape(1, 1, 8, 8) % 3 > 0).astype(np.float32)
    compare(networks, Inpainting(sampler, drawn(80, 1, 4, 8, 8), drawn(4, 2, 4, 8, 8), mask), steps, scale)


def test_with_micro_conditions():
    """Size and aspect ratio, which reach the copies by the timestep's embedding, as in α's model of 1024 px."""
    config = replace(small_dit("plain").config, micro_condition=True)
    dit = DiT(config).set_train(False)
    for i, parameter in enumerate(dit.get_parameters()):
        parameter.set_data(Tensor(drawn(i, *parameter.shape) * np.float32(max(parameter.shape[-1], 8) ** -0.5)))
    learnt, fresh = ControlNet.from_dit(dit, 2), ControlNet.from_dit(dit, 2)
    for linear in (learnt.before_proj, *learnt.after_proj):
        linear.weight.set_data(Tensor(0.1 * drawn(100, 72, 72)))
    size, ratio = Tensor(np.array([[64.0, 96.0]], np.float32)), Tensor(np.array([[0.667]], np.float32))
    compare((DenoisingGraphs(dit), learnt, fresh), *solver("dpm"), (size, ratio))


def entries(dora, seed):
    """Entries of an adapter for whole and fused layers of `small_dit`, with random numbers of a size that matters."""
    shapes = {
        "blocks.0.attn.qkv.q": (72, 72),
        "blocks.1.attn.qkv.v": (72, 72),
        "blocks.0.cross_attn.kv_linear.k": (72, 72),
        "blocks.2.attn.proj": (72, 72),
        "blocks.1.mlp.fc1": (288, 72),
        "final_layer.linear": (32, 72),
    }
    result = {}
    for k, (name, (rows, columns)) in enumerate(shapes.items()):
        a, b = 0.3 * drawn(seed + k, 3, columns), 0.3 * drawn(seed + 50 + k, rows, 3)
        magnitude = np.abs(drawn(seed + 90 + k, rows)) + np.float32(0.5) if dora else None
        result[name] = Entry(a, b, 6.0, 2.0, magnitude)
    return result


def changed(weights, adapter):
    """dict of weights with an adapter in them, by its definition: W + 2 B A, of DoRA each row of a magnitude."""
    weights = {name: value.copy() for name, value in weights.items()}
    for name, entry in adapter.items():
        layer, _, part = name.rpartition(".")
        whole, count, index = f"{name}.weight", 1, 0
        if part in ("q", "k", "v"):
            parts = "qkv" if layer.endswith("qkv") else "kv"
            whole, count, index = f"{layer}.weight", len(parts), parts.index(part)
        rows = len(weights[whole]) // count
        own = weights[whole][index * rows : (index + 1) * rows]
        new = own.astype(np.float64) + 2.0 * entry.b.astype(np.float64) @ entry.a
        if entry.magnitude is not None:
            new *= (entry.magnitude / np.linalg.norm(new, axis=1))[:, None]
        own[:] = new
    return weights


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_an_adapter_on_the_base(dora, tmp_path):
    """From files, as a pipeline opens them: the base has the adapter in it, the copies are the trained ones."""
    graphs, controlnet = small("plain")
    dit, plain = graphs.dit, tmp_path / "plain"
    for folder, network in ((plain, dit), (tmp_path / "learnt", controlnet), (tmp_path / "fresh", None)):
        save_network(network or ControlNet.from_dit(dit, 2), folder, "fp32")
    adapter = entries(dora, 300)
    write_adapter(tmp_path / "adapter.safetensors", Adapter(adapter))
    pending = open_dit(plain, "fp32", lora=[tmp_path / "adapter.safetensors"], sampling=True)
    learnt, fresh = (
        open_controlnet(tmp_path / name, "fp32", pending, sampling=True) for name in ("learnt", "fresh")
    )  # fmt: skip
    assert not [note for note in learnt.notes if "another model" in note]
    opened = DenoisingGraphs(pending.load()), learnt.load(), fresh.load()
    sampler, steps, scale = solver("dpm")
    base = trajectory(opened[0], None, steps=steps)
    assert relative_error(base, trajectory(graphs, None, steps=steps)) > 1e-2
    assert relative_error(trajectory(opened[0], None, steps=steps, controls=[control(opened[2])]), base) < 1e-6
    found = trajectory(opened[0], None, steps=steps, controls=[control(opened[1])])
    assert relative_error(found, base) > 1e-3
    weights = changed({name: value.asnumpy() for name, value in dit.parameters_and_names()}, adapter)
    merged = DiT(dit.config).set_train(False)
    for name, parameter in merged.parameters_and_names():
        parameter.set_data(Tensor(weights[name]))
    expected = by_hand(ControlledDiT(merged, controlnet), control(controlnet), sampler, steps, scale)
    assert relative_error(found, expected) < 1e-5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a network of three blocks and of a ControlNet beside it, a file of an adapter."""
    folder = tmp_path_factory.mktemp("tiny")
    network = write_network(folder / "network", depth=3, input_size=32, pe_interpolation=0.5)
    controlnet = ControlNet.from_dit(load_dit(network, "fp32"), 2)
    for k, linear in enumerate((controlnet.before_proj, *controlnet.after_proj)):
        linear.weight.set_data(Tensor(0.3 * drawn(k, 32, 32)))
    save_network(controlnet, folder / "controlnet", "fp32")
    entry = Entry(drawn(5, 2, 32), drawn(6, 128, 2), 2.0, 1.0)
    write_adapter(folder / "adapter.safetensors", Adapter({"blocks.0.mlp.fc1": entry}))
    return network, folder / "controlnet", folder / "adapter.safetensors"


def pipeline_of(tiny, **how):
    """A pipeline of the network and the ControlNet."""
    return PixArtSigmaPipeline.from_pretrained(tiny[0], components="sigma-mini", controlnet=tiny[1], **how)


def draw(pipeline, **how):
    """Latents of 64 x 64 pixels, 16 tokens of a caption."""
    states = drawn(9, 2, 16, 256)
    caption = {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}
    masks = dict.fromkeys(("prompt_mask", "negative_prompt_mask"), np.ones((1, 16), np.int32))
    edges = np.random.default_rng(1).integers(0, 2, (64, 64, 1), np.uint8).repeat(3, 2) * 255
    fixed = {"height": 64, "width": 64, "use_resolution_binning": False, "seed": 3, "progress": False}
    options = {"num_inference_steps": 2, "output_type": "latent", "control_image": edges, **fixed, **how}
    return pipeline(**caption, **masks, **options).images


def test_adapters_are_exchanged_beside_it(tiny):
    """As the web page does it: what is drawn is what a pipeline draws that was opened with them."""
    pipeline, other = pipeline_of(tiny), pipeline_of(tiny, lora=[tiny[2]])
    plain, wanted = draw(pipeline), draw(other)
    assert relative_error(wanted, plain) > 1e-2
    pipeline.use(pipeline.with_lora([tiny[2]]))
    np.testing.assert_array_equal(draw(pipeline), wanted)
    pipeline.use(pipeline.with_lora([]))
    np.testing.assert_array_equal(draw(pipeline), plain)


@pytest.mark.parametrize("how", [{"text_reuse": 0.5}, {"block_reuse": 2}], ids=str)
def test_what_cannot_be_is_one_line(tiny, how):
    with pytest.raises(MindSigmaError, match="text_reuse and block_reuse exclude a ControlNet") as error:
        draw(pipeline_of(tiny), **how)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"control_end": 0.5, "guidance_interval": (0.0, 0.5)}], ids=["whole", "parts"])
def test_a_warm_shape_compiles_nothing_more(tiny, graph_mode, how):
    pipeline = pipeline_of(tiny)
    ms.set_context(mode=ms.GRAPH_MODE)  # to open it was to choose PyNative, and its networks are not loaded yet
    options = SamplingOptions(num_inference_steps=2, use_resolution_binning=False, **how)
    assert warm_up(pipeline, Shape(64, 64, 1, 16), options) > 0
    before = compiled_graphs()
    draw(pipeline, output_type="np", **how)
    assert compiled_graphs() == before

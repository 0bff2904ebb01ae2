"""Drawing with ControlNets: the official latents, what shares a step, how long and how strongly one acts, mistakes."""

from dataclasses import replace
from functools import partial

import mindspore as ms
import numpy as np
import pytest
from conftest import load_tool, relative_error
from control_cases import FILE, control, mini_controlnet, mini_edges, small
from mindspore import Tensor, ops
from PIL import Image
from test_perturbed import drawn, trajectory

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.backends.ascend import align_heads
from mindsigma.pipeline.metadata import again, read
from mindsigma.pipeline.warm_up import Shape, warm_up
from mindsigma.sampling.controls import Control, ControlSum, controlled
from mindsigma.sampling.denoising import DenoisingGraphs
from mindsigma.sampling.options import SamplingOptions
from mindsigma.sampling.perturbed import PerturbedAttention, PerturbedDiT, perturbed_text_kv
from mindsigma.sampling.shortcuts import Shortcuts
from mindsigma.web.studio import UPLOADED, Ended, Order, Picture, Studio
from mindsigma.weights.saving import save_network

ONE_STEP = {"num_inference_steps": 1, "progress": False, "seed": 3}
SMALL = {  # a sixteenth of the tokens
    **ONE_STEP, "num_inference_steps": 2, "output_type": "latent",
    "height": 64, "width": 64, "use_resolution_binning": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The ControlNet of the golden case as a folder."""
    place = tmp_path_factory.mktemp("controlnet")
    save_network(mini_controlnet(), place, "fp32")
    return place


@pytest.fixture(scope="module")
def pipeline(folder):
    """sigma-mini with it."""
    return PixArtSigmaPipeline.from_pretrained("sigma-mini", controlnet=folder)


@pytest.fixture(scope="module")
def edges():
    """The golden case's picture."""
    return mini_edges()


def test_latents_are_the_official_codes(pipeline, edges, monkeypatch):
    """A picture of edges to latents, through the VAE, eight steps, guidance."""
    golden = {name: np.load(FILE)[f"mini/{name}"] for name in ("c", "z", "prompts", "latents", "latents_base")}
    condition = pipeline.encode(edges[None].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
    assert relative_error(condition, golden["c"]) < 1e-5
    monkeypatch.setattr(pipeline, "convention", "official")
    how = {"num_inference_steps": 8, "guidance_scale": 4.5, "use_resolution_binning": False}
    prompt = str(golden["prompts"][0])
    result = pipeline(
        prompt, latents=golden["z"], control_image=edges, output_type="latent", progress=False, **how
    ).images  # fmt: skip
    assert relative_error(result, golden["latents"]) < 3e-5
    assert relative_error(golden["latents_base"], golden["latents"]) > 0.1


def test_a_scale_of_zero_and_a_fresh_one_change_no_bit(pipeline, mini, edges):
    base = mini("a cat", **SMALL).images
    controlled = pipeline("a cat", control_image=edges, **SMALL).images
    assert relative_error(controlled, base) > 1e-3
    assert (pipeline("a cat", control_image=edges, control_scale=0, **SMALL).images == base).all()
    assert (pipeline("a cat", control_image=[None], **SMALL).images == base).all()


@pytest.fixture(scope="module")
def plain():
    """A pair of `small`, shared by tests that change nothing of it."""
    return small()


def test_all_ways_to_compute_a_step_agree(plain):
    graphs, controlnet = plain
    (fast, quick), (wide, aligned) = small(fast=True), small()
    align_heads(wide.dit), align_heads(aligned)
    for how in ({}, {"guess": True}):
        ones = [control(controlnet, **how)]
        eager = trajectory(graphs, None, controls=ones, steps=1)
        assert relative_error(eager, trajectory(graphs, None, steps=1)) > 1e-2
        assert relative_error(trajectory(graphs, None, controls=ones, halves=True, steps=1), eager) < 1e-5
        for others, network in ((fast, quick), (wide, aligned)):
            assert relative_error(trajectory(others, None, controls=[control(network, **how)], steps=1), eager) < 1e-5


@pytest.mark.slow
def test_in_graphs():
    """With what changes a step's graph: two ControlNets, guess mode, perturbed attention, heads of Ascend's width."""
    pag, graphs = PerturbedAttention((1,), 3.0), DenoisingGraphs(align_heads(small()[0].dit))
    networks = [align_heads(small()[1]), align_heads(small(layers=1, seed=7)[1])]
    ones = [control(networks[0], guess=True), control(networks[1], 51, 1, guess=True)]
    eager = trajectory(graphs, pag, controls=ones, steps=1)
    assert relative_error(trajectory(graphs, pag, controls=ones[:1], steps=1), eager) > 1e-3
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        assert relative_error(trajectory(graphs, pag, controls=ones, steps=1), eager) < 1e-5
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_several_add(plain):
    """What two add is the sum of what each adds: of no weight one is as if it was not there; halves make a whole."""
    graphs, controlnet = plain
    one, other = control(controlnet, scale=0.5), control(controlnet, 51, scale=0.7)
    both = trajectory(graphs, None, controls=[one, other], steps=1)
    assert relative_error(trajectory(graphs, None, controls=[other, one], steps=1), both) < 1e-6
    assert relative_error(trajectory(graphs, None, controls=[one], steps=1), both) > 1e-3
    whole = trajectory(graphs, None, controls=[control(controlnet)], steps=1)
    assert relative_error(trajectory(graphs, None, controls=[one, one], steps=1), whole) < 1e-6
    shorter = small(layers=1)[1]
    mixed = trajectory(graphs, None, controls=[one, control(shorter, 52)], steps=1)
    assert relative_error(trajectory(graphs, None, controls=[control(shorter, 52), one], steps=1), mixed) < 1e-6


def test_one_condition_for_all_and_one_for_each(plain):
    graphs, controlnet = plain
    alone = control(controlnet, rows=1)
    each = Control(controlnet, np.repeat(alone.condition, 2, 0))
    assert relative_error(
        trajectory(graphs, None, controls=[alone], steps=1), trajectory(graphs, None, controls=[each], steps=1)
    ) < 1e-6  # fmt: skip
    with pytest.raises(MindSigmaError, match="condition of shape"):
        trajectory(graphs, None, controls=[control(controlnet, rows=3)], steps=1)


def test_perturbed_images_are_controlled_as_the_conditional_ones():
    """Against six images through all blocks, two of which have what is added to the two before them."""
    (graphs, controlnet), (fast, quick) = small("plain"), small("plain", fast=True)
    x, hint, caption = Tensor(drawn(1, 4, 4, 8, 8)), Tensor(drawn(2, 1, 16, 72)), Tensor(drawn(3, 4, 5, 16))
    t = Tensor(np.array([321.0], np.float32))
    modulation = ops.concat(graphs.dit.modulations(t), 1)
    rows = ops.concat(controlnet.modulations(graphs.dit.embed_timestep(t)[1]), 1)
    for layers in ((0,), (1,)):
        found = {}
        for name, dit, network in (("plain", graphs.dit, controlnet), ("fast", fast.dit, quick)):
            given = hint, rows, network.text_kv(dit.embed_caption(caption)), Tensor(np.ones(2, np.float32))
            total = ControlSum((network,))
            control = partial(total, given=(given,), height=4, width=4)
            text_kv = perturbed_text_kv(dit.text_kv(caption), layers[0], 2)
            perturbed = PerturbedDiT(dit, layers, True)
            found[name] = perturbed(x, modulation, text_kv, dit.position(x.shape), control=control)
        dit, again = graphs.dit, [0, 1, 2, 3, 2, 3]
        tokens = dit.x_embedder(Tensor(x.asnumpy()[again]), dit.position(x.shape))
        modulations, text_kv = dit.modulations(t), dit.text_kv(Tensor(caption.asnumpy()[again]))
        added = ()
        for i, block in enumerate(dit.blocks):
            if i == 1:
                given = hint, rows, controlnet.text_kv(dit.embed_caption(caption)), Tensor(np.ones(2, np.float32))
                added = ControlSum((controlnet,))(tokens[:4], (given,), 4, 4)
            if i > 0:
                tokens = tokens + Tensor(added[i - 1].asnumpy()[again])
            tokens = block(tokens, modulations[i], *text_kv[i], 4, 4, None, None, 2 if i in layers else 0)[0]
        expected = dit.final_layer(tokens, modulations[3], 4, 4).asnumpy()
        for one in found.values():
            assert relative_error(one[0].asnumpy(), expected[:4]) < 2e-6
            assert relative_error(one[1].asnumpy(), expected[4:]) < 2e-6


def test_guess_mode_leaves_the_unconditional_half_alone(plain):
    """By the rule of guidance: unconditional plain, conditional with weights of 0.1 ... 1."""
    graphs, controlnet = plain
    one = control(controlnet, scale=2.0, guess=True)
    np.testing.assert_allclose(one.scales(), 2.0 * np.array([0.1, 1.0], np.float32))
    latents = trajectory(graphs, None, controls=[one], steps=1)
    plain_step = trajectory(graphs, None, guidance_scale=1.0, steps=1)
    controlled_step = trajectory(graphs, None, guidance_scale=1.0, steps=1, controls=[one])
    both = trajectory(graphs, None, steps=1)
    # A step is affine in the noise: both = s (u + 4.5 (c - u)), so u is known from `both` and the plain c.
    expected = both + 4.5 * (controlled_step - plain_step)
    assert relative_error(latents, expected) < 1e-5


def test_steps_that_are_controlled(plain):
    graphs, controlnet = plain
    plan = Shortcuts().plan(4, True)
    how = {"start": 0.25, "end": 0.75}
    assert [step.controls for step in controlled(plan, [control(controlnet, **how)])] == [(), (0,), (0,), ()]
    late = controlled(Shortcuts().plan(2, True, 2), [control(controlnet, **how)], 2)
    assert [step.controls for step in late] == [(0,), ()]
    two = controlled(plan, [control(controlnet, end=0.5), control(controlnet, scale=0.0), control(controlnet)])
    assert [step.controls for step in two] == [(0, 2), (0, 2), (2,), (2,)]
    with pytest.raises(MindSigmaError, match="0.9 1 hold none of 4 steps"):
        controlled(plan, [control(controlnet, start=0.9)])
    with pytest.raises(MindSigmaError, match="text_reuse and block_reuse exclude a ControlNet"):
        controlled(Shortcuts(text_reuse=0.5).plan(4, True), [control(controlnet)])
    interval = Shortcuts(guidance_interval=(0.0, 0.5))  # also where one half of guidance is left
    ones = [control(controlnet)]
    whole = trajectory(graphs, None, controls=ones, shortcuts=interval, steps=2)
    assert (
        relative_error(trajectory(graphs, None, controls=ones, shortcuts=interval, steps=2, halves=True), whole) < 1e-5
    )
    guess = [control(controlnet, guess=True)]
    whole = trajectory(graphs, None, controls=guess, shortcuts=interval, steps=2)
    assert (
        relative_error(trajectory(graphs, None, controls=guess, shortcuts=interval, steps=2, halves=True), whole) < 1e-5
    )


def wide(edges):
    """The picture in another shape than the model's base resolution, (192, 320, 3)."""
    return np.ascontiguousarray(edges[32:224].repeat(2, 1)[:, 96:416])


def test_the_picture_decides_the_size_and_lies_where_it_will_show(pipeline, edges):
    options = SamplingOptions()
    (given,) = pipeline.open_control_images(wide(edges), options)
    assert given.canvas == pipeline.size_of_ratio(192 / 320) and given.size is None
    image = pipeline("a cat", control_image=wide(edges), **ONE_STEP).images[0]
    assert image.size == given.canvas[::-1]
    # Asked for: what is drawn is cropped to it in the end, so the picture is not cropped before.
    options = SamplingOptions(height=192, width=320)
    (given,) = pipeline.open_control_images(wide(edges), options)
    assert given.placements[0].of_image == (0, 0, 320, 192) and given.size == (192, 320)
    (asked,) = pipeline.open_control_images(wide(edges), SamplingOptions(height=100))
    assert asked.size == (100, 167)
    image = pipeline("a cat", control_image=wide(edges), height=100, **ONE_STEP).images[0]
    assert image.size == (167, 100)
    # Of an image that is drawn from it takes the place.
    source = pipeline.open_images(np.zeros((300, 410, 3), np.uint8), None, SamplingOptions())
    (given,) = pipeline.open_control_images(wide(edges), SamplingOptions(), source)
    assert given.canvas == source.canvas == (208, 288)


def test_together_with_an_image_a_mask_and_other_samplers(pipeline, edges):
    image, mask = edges // 2 + 60, edges[..., 0] * 0
    mask[64:192, 64:192] = 255
    how = {**SMALL, "image": image, "mask": mask, "strength": 1.0}
    one, other = pipeline("a cat", control_image=edges, **how), pipeline("a cat", control_image=[None], **how)
    assert relative_error(one.images, other.images) > 1e-3
    for sampler in ("euler", "iddpm", "lcm", "sa"):
        drawn = {
            scale: pipeline("a cat", control_image=edges, control_scale=scale, sampler=sampler, **SMALL).images
            for scale in (0.0, 1.0)
        }
        assert relative_error(drawn[0.0], drawn[1.0]) > 1e-3, sampler


def test_pictures_of_a_batch(pipeline, edges):
    """One for each image that is drawn, and how many there may be."""
    both = pipeline(["a cat", "an owl"], control_image=[edges, edges // 2], **{**SMALL, "seed": [3, 3]}).images
    alone = pipeline("an owl", control_image=edges // 2, **SMALL).images
    # 1.3e-5 without AVX-512, where products of another height are summed in another order.
    assert relative_error(both[1:], alone) < 2e-5
    with pytest.raises(MindSigmaError, match="2 control images for 1 images; give one, or one for each"):
        pipeline("a cat", control_image=[edges, edges], **SMALL)


def test_several_controlnets_of_a_pipeline(pipeline, folder, edges):
    two = PixArtSigmaPipeline.from_pretrained("sigma-mini", controlnet=[folder, folder])
    whole = pipeline("a cat", control_image=edges, **SMALL).images
    halves = two("a cat", control_image=[edges, edges], control_scale=[0.25, 0.75], **SMALL).images
    assert relative_error(halves, whole) < 1e-5
    assert relative_error(two("a cat", control_image=[None, edges], **SMALL).images, whole) < 1e-6
    for call, text in (
        ({"control_image": edges}, "1 control images for 2 ControlNets"),
        ({"control_image": [edges] * 2, "control_scale": [1, 1, 1]}, "3 values of control_scale for 2 ControlNets"),
    ):
        with pytest.raises(MindSigmaError, match=text):
            two("a cat", **call, **SMALL)


@pytest.mark.parametrize(
    "call, text",
    [
        ({}, "control_image: give the picture that the ControlNet takes"),
        ({"control_image": "none.png"}, "none.png: no such file"),
        ({"control_image": __file__}, "test_controlled_drawing.py: not an image"),
        ({"control_image": np.zeros((4, 4, 7))}, "control_image must be an array"),
        ({"control_image": [None], "control_scale": "much"}, "control_scale must be a list of"),
        ({"control_image": [None], "control_scale": float("nan")}, "control_scale must be a list of"),
        ({"control_image": [None], "control_start": 0.5, "control_end": 0.5}, "0 <= start < end <= 1"),
        ({"control_image": [None], "control_end": 1.5}, "0 <= start < end <= 1"),
        ({"control_image": [None], "control_start": [0, 0.5], "control_end": [1, 1, 1]}, "2 values of control_start"),
        ({"control_image": [None], "control_scale": [1, 2]}, "2 values of control_scale for 1 ControlNets"),
        ({"control_image": [None], "guess_mode": "yes"}, "guess_mode must be True or False"),
        ({"control_image": np.zeros((64, 64, 3)), "control_start": 0.9}, "0.9 1 hold none of 2 steps"),
        ({"control_image": np.zeros((64, 64, 3)), "block_reuse": 2}, "text_reuse and block_reuse exclude a ControlNet"),
    ],
)
def test_mistakes_are_one_line(pipeline, call, text):
    with pytest.raises(MindSigmaError, match=text) as error:
        pipeline("a cat", **SMALL, **call)
    assert "\n" not in str(error.value)


def test_mistakes_without_a_controlnet(mini, edges):
    for call in ({"control_image": edges}, {"control_scale": 0.5}, {"guess_mode": True}):
        with pytest.raises(MindSigmaError, match="ControlNet: open the model with one .--controlnet"):
            mini("a cat", **SMALL, **call)


def run_tool(monkeypatch, *arguments):
    """tools/generate.py in this process."""
    monkeypatch.setattr("sys.argv", ["generate.py", *map(str, arguments)])
    return load_tool("generate").main()


def test_command_line(pipeline, folder, edges, tmp_path, monkeypatch, capsys):
    """A picture, what it tells, and the same picture again by what it tells; a table of prompts."""
    file, out = tmp_path / "edges.png", tmp_path / "cat.png"
    Image.fromarray(edges).save(file)
    how = ["--controlnet", folder, "--control-image", file, "--control-scale", "0.5", "--control-end", "0.5"]
    size = ["--height", "64", "--width", "64", "--no-resolution-binning"]
    assert run_tool(monkeypatch, "a cat", *how, *size, "--steps", "2", "--seed", "7", "--out", out, "--verbose") == 0
    assert "1 ControlNet in 1 of 2 steps: 1.19 times as many block evaluations" in capsys.readouterr().out
    with Image.open(out) as image:
        text, pixels = image.text, np.asarray(image)
    options = {**SMALL, "seed": 7, "output_type": "pil", "control_scale": 0.5, "control_end": 0.5}
    expected = pipeline("a cat", control_image=edges, **options).images[0]
    assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 1
    told = {"controlnet": str(folder), "control_image": str(file), "control_scale": "0.5", "control_end": "0.5"}
    assert {name: text.get(name) for name in told} == told
    assert {"controlnet 0", "control_image"} < {line.split(" ", 1)[1] for line in text["sha256"].splitlines()}
    assert run_tool(monkeypatch, "--like", out, "--out", tmp_path / "again.png") == 0
    with Image.open(tmp_path / "again.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
    table = tmp_path / "prompts.csv"
    table.write_text(f"prompt,control_image,control_scale\na cat,{file},0.5\nan owl,{file},\n")
    drawn = ["--controlnet", folder, "--control-end", "0.5", *size, "--steps", "2", "--seed", "7"]
    assert run_tool(monkeypatch, "--prompts-file", table, *drawn, "--out", tmp_path / "table") == 0
    with Image.open(tmp_path / "table" / "a-cat-7.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
    with Image.open(tmp_path / "table" / "an-owl-7.png") as image:
        assert image.text["control_scale"] == "1"
    table.write_text("prompt,control_image\na cat,\n")
    with pytest.raises(MindSigmaError, match="prompts.csv, line 2: --controlnet needs --control-image"):
        run_tool(monkeypatch, "--prompts-file", table, *drawn)


def test_a_picture_without_a_controlnet_tells_nothing_of_one():
    options = again(SamplingOptions(), "a cat", 3)
    assert not [name for name in options if "control" in name] and options["guess_mode"] is False
    assert again(SamplingOptions(control_scale=0.5), "a cat", 3)["control_scale"] == (0.5,)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--control-image", "x.png"], "--control-image needs --controlnet"),
        (["--control-scale", "0.5"], "--control-scale needs --controlnet"),
        (["--guess-mode"], "--guess-mode needs --controlnet"),
        (["--controlnet", "x"], "--controlnet needs --control-image, the picture that it takes"),
        (["--controlnet", "x", "--control-image", "a", "--control-image", "b"], "2 times for 1 ControlNets"),
        (["--controlnet", "x", "--control-image", "none.png"], "none.png: no such file"),
        (["--controlnet", "x", "--control-image", __file__, "--text-reuse", "0.5"], "exclude --controlnet"),
        (["--controlnet", "x", "--control-image", __file__, "--control-end", "2"], "0 <= start < end <= 1"),
        (["--controlnet", "no-such-folder", "--control-image", __file__], "no-such-folder: no such file or folder"),
        (["--controlnet", "sigma-mini", "--control-image", __file__], "sigma-mini: holds neither controlnet"),
    ],
)
def test_mistakes_of_the_command_line(arguments, text, monkeypatch):
    with pytest.raises(MindSigmaError, match=text):
        run_tool(monkeypatch, "a cat", *arguments)


def test_warm_up_compiles_what_is_drawn(pipeline):
    """Here in PyNative, where nothing is compiled: that a trajectory with grey pictures runs."""
    options = SamplingOptions(num_inference_steps=2, control_end=0.5, use_resolution_binning=False)
    warm_up(pipeline, Shape(64, 64, 1, 16), options)
    controls = pipeline.blank_controls(SamplingOptions(control_scale=0.3), (192, 320))
    assert [(one.condition.shape, one.scale) for one in controls] == [((1, 4, 24, 40), 0.3)]


def test_a_page_offers_controlnets(folder, edges):
    """The order of a user: with a picture, without, and what is refused."""

    def open_model(label):
        return PixArtSigmaPipeline.from_pretrained(label, controlnet=[folder])

    studio = Studio(open_model, ["sigma-mini"], preview_every=0, controls={"edges": folder})
    try:
        studio.open_first()
        options = {"num_inference_steps": 1, "control_scale": 0.8}
        order = Order("a cat", options=options, seed=3, control="edges", control_image=Image.fromarray(wide(edges)))
        picture = next(event for event in studio.submit(order).events() if isinstance(event, Picture))
        assert picture.image.size == (320, 192) and picture.told["controlnet"] == "edges"
        assert picture.told["control_scale"] == "0.8" and "controlnet: edges" in picture.told["sha256"]
        values, _ = read(picture.png)
        assert values["controlnet"] == ["edges"] and values["control_image"] == [UPLOADED]
        plain = next(event for event in studio.submit(Order("a cat", options={"num_inference_steps": 1})).events())
        assert not isinstance(plain, Ended)
        for changes, text in (
            ({"control": "faces"}, "ControlNet: 'faces' is none of this page's"),
            ({"control_image": None}, "ControlNet: give both it and the picture"),
            ({"control": ""}, "ControlNet: give both it and the picture"),
        ):
            with pytest.raises(MindSigmaError, match=text):
                studio.submit(replace(order, **changes))
    finally:
        studio.close()

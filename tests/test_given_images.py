"""Drawing from images and under masks: diffusers' latents, pixels that stay, sizes, kinds of pictures, mistakes."""

import json
import sys
import zlib

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, load_tool, psnr, relative_error
from mindspore import Tensor
from PIL import Image
from test_perturbed import small_dit, trajectory

from mindsigma import MindSigmaError
from mindsigma.pipeline.given_image import GivenImage, GivenImages, Placement, given_images, open_mask, open_picture
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.sampling.denoising import DenoisingGraphs
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.iddpm import IDDPM
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.options import SamplingOptions

IMAGE, MASKED = np.load(GOLDEN / "sampler_img2img.npz"), np.load(GOLDEN / "sampler_inpaint.npz")
QUICK = {"num_inference_steps": 4, "progress": False, "seed": 3}


def settings(reference):
    """Config, prompts and the noise of a reference case."""
    config = json.loads(str(reference["config"]))
    generator = np.random.default_rng([config["seed"], zlib.crc32(config["tag"].encode()), 0])
    noise = generator.standard_normal((2, 4, 32, 32)).astype(np.float32)
    return config, [str(prompt) for prompt in reference["prompts"]], noise


def draw(pipeline, reference, steps, strength, **options):
    config, prompts, noise = settings(reference)
    return pipeline(
        prompts, image=reference["init_image"], latents=noise, num_inference_steps=steps, strength=strength,
        guidance_scale=config["cfg"], output_type="latent", progress=False, **options,
    ).images  # fmt: skip


@pytest.mark.parametrize("name, sampler", [("dpm", {}), ("ddim", {"sampler": "ddim", "spacing": "trailing"})])
def test_latents_from_an_image_are_diffusers(mini, name, sampler):
    config, _, noise = settings(IMAGE)
    steps, strength = config["steps_strength"][name]
    options = SamplingOptions(num_inference_steps=steps, strength=strength, **sampler)
    solver = options.solver("diffusers")
    rows = solver.table(steps, options.first_step(solver, True, False))
    assert [row.timestep for row in rows] == config["timesteps"][name]
    given = mini.open_images(IMAGE["init_image"], None, options)
    clean = mini.encode_given(given, [0, 1], options)
    assert relative_error(clean, IMAGE["init_latents"]) < 1e-5
    assert relative_error(rows[0].alpha * clean + rows[0].sigma * noise, IMAGE[f"start_{name}"]) < 1e-5
    latents = draw(mini, IMAGE, steps, strength, **sampler)
    assert relative_error(latents, IMAGE[f"latents_{name}"]) < 5e-5
    if name == "dpm":
        assert psnr(mini.decode(latents[:1])[0] * 255, IMAGE["image"][0], 255) > 55  # its rounding to bytes is 59


@pytest.mark.parametrize("name", ["latents", "latents_strength"])
def test_latents_under_a_mask_are_diffusers(mini, name):
    steps, strength = settings(MASKED)[0]["steps_strength"][name]
    given = mini.open_images(MASKED["init_image"], MASKED["mask"], SamplingOptions())
    assert np.array_equal(given.latent_masks(8), MASKED["latent_mask"])
    latents = draw(mini, MASKED, steps, strength, mask=MASKED["mask"])
    assert relative_error(latents, MASKED[name]) < 5e-5
    kept = np.broadcast_to(MASKED["latent_mask"] == 0, latents.shape)
    clean = np.broadcast_to(MASKED["init_latents"], latents.shape)
    assert relative_error(latents[kept], clean[kept]) < 1e-5
    if name == "latents":
        assert psnr(mini.decode(latents[:1])[0] * 255, MASKED["image"][0], 255) > 55


def disc(height, width, colour=(200, 40, 40)):
    """A picture with a disc on a gradient."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 120)], -1)
    pixels[(y - height / 2) ** 2 + (x - width / 2) ** 2 < (min(height, width) / 4) ** 2] = colour
    return pixels.astype(np.uint8)


def middle(height, width):
    """A mask of the middle."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 255
    return mask


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pixels_outside_of_the_mask_stay(mini, fit):
    """In the image's own size, whatever is drawn; in a batch, from each one's own seed."""
    picture, mask = disc(300, 410), middle(300, 410)
    options = {"mask": mask, "image_fit": fit, **QUICK, "num_inference_steps": 2}
    first, second = (np.asarray(image) for image in mini(["a cat"] * 2, image=picture, **options).images)
    for image in (first, second):
        assert np.array_equal(image[mask == 0], picture[mask == 0])
    alone = np.asarray(mini("a cat", image=picture, **{**options, "seed": 4}).images[0])
    inside = mask > 0
    assert np.abs(alone[inside].astype(int) - second[inside]).max() <= 1
    assert np.abs(first[inside].astype(int) - second[inside]).mean() > 5
    assert np.abs(first[inside].astype(int) - picture[inside]).mean() > 5
    whole = mini("a cat", image=picture, paste=False, **options).images[0]
    assert whole.size == ((288, 208) if fit == "crop" else (284, 208))


def test_sizes_of_what_is_drawn(mini):
    picture = disc(300, 410)
    options = {"image": picture, "strength": 0.5, **QUICK, "num_inference_steps": 2}
    assert mini("a cat", **options).images[0].size == (288, 208)
    assert mini("a cat", height=256, width=256, **options).images[0].size == (256, 256)
    assert mini("a cat", width=205, **options).images[0].size == (205, 150)
    assert mini("a cat", use_resolution_binning=False, output_type="latent", **options).images.shape[2:] == (28, 38)
    # The smaller the strength, the nearer to the image.
    options.update(num_inference_steps=5, output_type="latent")
    near, far = (mini("a cat", **{**options, "strength": strength}).images for strength in (0.2, 0.9))
    clean = mini.encode_given(mini.open_images(picture, None, SamplingOptions()), [3], SamplingOptions())
    assert relative_error(near, clean) < 0.5 * relative_error(far, clean)


@pytest.mark.parametrize("size", [(300, 410), (224, 288), (512, 100), (57, 1000)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_what_is_laid_on_the_canvas_comes_back_to_its_place(size, fit):
    canvas = (224, 288) if size[0] < 400 else (256, 192)
    placement = Placement.of(size, canvas, fit)
    picture = Image.fromarray(disc(*size))
    laid = placement.lay(picture)
    assert laid.size == canvas[::-1]
    back = placement.put_back(laid, picture)
    assert back.size == picture.size
    assert np.abs(np.asarray(back).astype(int) - np.asarray(picture)).mean() < 4
    # A white image on black comes back to the very box.
    left, top, right, bottom = placement.of_image
    black = Image.new("L", picture.size)
    box = np.asarray(placement.put_back(Image.new("L", laid.size, 255), black)) > 0
    assert box[top:bottom, left:right].all() and box.sum() == (bottom - top) * (right - left)
    assert fit == "crop" or box.all()
    shape = (right - left) / (bottom - top) / (canvas[1] / canvas[0])
    assert fit == "pad" or abs(shape - 1) < 0.02
    told = placement.told()
    assert told is None if size == canvas else ("cropped" if fit == "crop" else "edges") in told


def test_kinds_of_pictures_are_one(tmp_path):
    """Path, PIL image and arrays; upright as EXIF says; transparency on white."""
    pixels = disc(40, 60)
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by a quarter
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        opened = [tmp_path / "turned.png", str(tmp_path / "turned.png"), turned]
        opened += [pixels, pixels / 255, Tensor(pixels), Image.fromarray(pixels)]
        for value in opened:
            assert np.array_equal(np.asarray(open_picture("image", value)), pixels), type(value)
    half = np.dstack([pixels, np.full((40, 60), 0, np.uint8)])
    assert np.asarray(open_picture("image", Image.fromarray(half))).min() == 255
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    for value in (grey, grey / 255, Image.fromarray(grey), grey >= 128, np.repeat(grey[..., None], 3, 2)):
        assert np.asarray(open_mask(value)).tolist() == [[0, 0, 255, 255]], type(value)
    several = given_images([pixels, pixels[:20]], [middle(40, 60), middle(20, 60)])
    assert [one.size for one in several] == [(40, 60), (20, 60)]
    assert len(given_images(np.stack([pixels] * 3), middle(40, 60))) == 3
    assert len(given_images(np.stack([pixels] * 2), np.stack([middle(40, 60)] * 2))) == 2


def test_several_images(mini):
    """One for each that is drawn, each with its own mask."""
    pictures = [disc(256, 256), disc(256, 256, (20, 200, 20))]
    masks = [middle(256, 256), 255 - middle(256, 256)]
    options = {**QUICK, "num_inference_steps": 2, "output_type": "np"}
    images = mini("a cat", num_images_per_prompt=2, image=pictures, mask=masks, **options).images
    for image, picture, mask in zip(images, pictures, masks):
        assert np.array_equal(np.round(image * 255)[mask == 0], picture[mask == 0])
    with pytest.raises(MindSigmaError, match="2 images to draw 3 from"):
        mini(["a cat"] * 3, image=pictures, **QUICK)


def test_posterior_is_sampled_from_each_image_s_own_seed(mini):
    options = SamplingOptions(image_latents="sample")
    given = mini.open_images(disc(256, 256), None, options)
    mode = mini.encode_given(given, [1, 2], SamplingOptions())
    both, alone = mini.encode_given(given, [1, 2], options), mini.encode_given(given, [2], options)
    assert both.shape == (2, 4, 32, 32) and mode.shape == (1, 4, 32, 32)
    assert relative_error(both[1:], alone) < 1e-6 and (both[0] != both[1]).mean() > 0.99
    assert 1e-4 < relative_error(alone, mode) < 0.3
    moments = mini.vae.encode(Tensor(given.pixels())).asnumpy()
    deviation = np.exp(0.5 * np.clip(moments[:, 4:], -30, 20)) * mini.vae.config.scaling_factor
    drawn = (both - mode) / deviation
    assert abs(drawn.mean()) < 0.06 and abs(drawn.std() - 1) < 0.05


def test_a_large_image_is_encoded_in_tiles(mini, monkeypatch):
    import mindsigma.pipeline.pipeline as module

    encode, called = module.encode_tiled, []
    monkeypatch.setattr(module, "encode_tiled", lambda vae, one: called.append(one.shape) or encode(vae, one, 128))
    pixels = GivenImage.open(disc(256, 256)).pixels(Placement.of((256, 256), (256, 256), "crop"))[None]
    whole = mini.encode(pixels)
    monkeypatch.setattr(module, "TILE_ABOVE", 32 * 32 - 1)
    assert relative_error(mini.encode(pixels), whole) < 0.35 and called == [(1, 3, 256, 256)]
    monkeypatch.setattr(mini, "vae_tiling", False)
    assert (mini.encode(pixels) == whole).all()


def test_the_callback_and_every_step_see_the_image(mini):
    """After each step what is kept is the image's latents, as noisy as the next row has them."""
    seen = []
    picture, mask = disc(256, 256), middle(256, 256)
    options = SamplingOptions(num_inference_steps=5, strength=0.8)
    mini(
        "a cat", image=picture, mask=mask, num_inference_steps=5, strength=0.8, seed=9, progress=False,
        output_type="latent", callback_on_step_end=lambda *a: seen.append((a[2], a[3]["latents"].asnumpy())),
    )  # fmt: skip
    rows = options.solver("diffusers").table(5, 1)
    clean = mini.encode_given(mini.open_images(picture, mask, options), [9], options)
    noise, kept = mini.start_noise([9], 256, 256), np.repeat(middle(256, 256)[None, None, ::8, ::8] == 0, 4, 1)
    assert [timestep for timestep, _ in seen] == [row.timestep for row in rows]
    scales = [(row.alpha, row.sigma) for row in rows[1:]] + [(1.0, 0.0)]
    for (alpha, sigma), (_, latents) in zip(scales, seen):
        assert relative_error(latents[kept], (alpha * clean + sigma * noise)[kept]) < 1e-6


def test_a_step_under_a_mask_is_one_graph():
    """Of a sampler that draws noise and takes the variance; image, noise and mask are inputs."""
    dit = small_dit("plain")
    masks = np.zeros((1, 1, 8, 8), np.float32), np.zeros((2, 1, 8, 8), np.float32)
    masks[0][..., :3], masks[1][0] = 1, 1

    def draw(graphs, number):
        clean, noise = (np.random.default_rng([number, i]).standard_normal((2, 4, 8, 8), np.float32) for i in range(2))
        sampler = Inpainting(IDDPM(), clean, noise, masks[number])
        latents = trajectory(
            graphs, None, sampler=sampler, steps=2, fresh_noise=lambda k, shape: np.full(shape, k - 0.5)
        )
        kept = np.broadcast_to(masks[number] == 0, latents.shape)
        assert (latents[kept] == clean[kept]).all() and relative_error(latents[~kept], clean[~kept]) > 0.1
        return latents

    eager = [draw(DenoisingGraphs(dit), number) for number in range(2)]
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        graphs = DenoisingGraphs(dit)
        assert relative_error(draw(graphs, 0), eager[0]) < 1e-5
        before = compiled_graphs()
        assert relative_error(draw(graphs, 1), eager[1]) < 1e-5
        assert compiled_graphs() == before >= 3
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)


def test_graphs_are_shared_by_samplers_of_one_graph(mini):
    given = np.zeros((1, 4, 8, 8), np.float32)
    graphs = DenoisingGraphs(mini.dit)
    steps = {graphs.step(Inpainting(DPMSolver(order), given, given, given), True, given.shape) for order in (1, 2, 3)}
    assert len(steps) == 1 and graphs.step(DPMSolver(2), True, given.shape) not in steps


def test_strength_leaves_the_last_steps():
    """int(steps * strength) as in diffusers: 50 * 0.58 is 28.999... and makes 28."""
    solver = DPMSolver()
    for steps, strength, run in ((20, 0.6, 12), (50, 0.58, 28), (14, 0.35, 4), (5, 0.2, 1), (10, 1.0, 10)):
        options = SamplingOptions(num_inference_steps=steps, strength=strength)
        assert options.first_step(solver, True, False) == steps - run
    options = SamplingOptions(num_inference_steps=10)
    assert options.first_step(solver, False, False) is None and options.first_step(solver, True, False) == 4
    assert options.first_step(solver, True, True) is None  # noise alone, as under a mask at strength 1


WHITE = np.full((64, 64), 255, np.uint8)


@pytest.mark.parametrize(
    "call, text",
    [
        ({"strength": 0.5}, "strength is of drawing from an image"),
        ({"mask": WHITE}, "mask needs an image"),
        ({"image": disc(64, 64), "strength": 0.2}, "strength 0.2 of 4 steps makes no step"),
        ({"image": disc(64, 64), "strength": 0}, "strength must be a number above 0 and at most 1, not 0"),
        ({"image": disc(64, 64), "strength": 1.01}, "strength must be a number above 0 and at most 1"),
        ({"image": disc(64, 64), "strength": float("nan")}, "strength must be a number above 0 and at most 1"),
        ({"image": disc(64, 64), "mask": WHITE[1:]}, "mask: 63 x 64 pixels .*but the image has 64 x 64"),
        ({"image": disc(64, 64), "mask": WHITE * 0}, "mask: all of it is black"),
        ({"image": disc(64, 64), "mask": (np.arange(4096) == 65).reshape(64, 64)}, "too small beside the latents"),
        ({"image": "no-such.png"}, "no-such.png: no such file"),
        ({"image": __file__}, "test_given_images.py: not an image"),
        ({"image": "/dev/zero"}, "/dev/zero: not a regular file"),
        ({"image": np.zeros((4, 4, 7))}, r"must be an array \(height, width, 3\)"),
        ({"image": np.full((4, 4, 3), 2.0)}, r"floats must lie in \[0, 1\]"),
        ({"image": np.full((4, 4, 3), 256)}, "must lie in 0 ... 255"),
        ({"image": []}, "image: give at least one"),
        ({"image": [disc(64, 64)] * 2, "mask": [WHITE] * 3}, "3 masks for 2 images"),
        ({"image": 7}, "image must be an array"),
        ({"image": disc(64, 64), "image_fit": "stretch"}, "image_fit must be one of crop, pad"),
        ({"image": disc(64, 64), "image_latents": "mean"}, "image_latents must be one of mode, sample"),
        ({"image": disc(64, 64), "paste": "no"}, "paste must be True or False"),
    ],
)
def test_mistakes_are_one_line(mini, call, text):
    with pytest.raises(MindSigmaError, match=text) as error:
        mini("a cat", **QUICK, **call)
    assert "\n" not in str(error.value)


def test_command_line(mini, tmp_path, monkeypatch, capsys):
    tool, out = load_tool("generate"), tmp_path / "cat.png"
    Image.fromarray(disc(300, 410)).save(tmp_path / "photo.png")
    Image.fromarray(middle(300, 410)).save(tmp_path / "mask.png")
    options = ["--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.5"]
    options += [
        "--pag-scale",
        "2",
        "--pag-layers",
        "3-4",
        "--steps",
        "4",
        "--seed",
        "7",
        "--out",
        str(out),
        "--verbose",
    ]
    options += ["--warm-up", "208x288:1:16"]
    monkeypatch.setattr(sys, "argv", ["generate.py", "a cat", *options])
    assert tool.main() == 0
    printed = capsys.readouterr().out.splitlines()
    told = "image: 300 x 410 (height x width), drawn at 208 x 288: cropped to 296 x 410, then resized"
    assert printed.count(told) == 1
    assert "strength 0.5: the last 2 of 4 steps" in printed
    assert "perturbed attention in block 3, 4 of 8: 1.31 times as many block evaluations" in printed
    with Image.open(out) as image:
        text, pixels = image.text, np.asarray(image)
    assert np.array_equal(pixels[middle(300, 410) == 0], disc(300, 410)[middle(300, 410) == 0])
    expected = {"strength": "0.5", "image_fit": "crop", "image_latents": "mode", "paste": "True", "pag_layers": "3 4"}
    expected.update(pag_scale="2.0", image=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"))
    expected.update(size="410x300", drawn_size="288x208")
    assert {name: text.get(name) for name in expected} == expected
    for wrong, fault in (
        (["--mask", "x.png"], "--mask needs --image"),
        (["--strength", "0.5"], "strength is of drawing from an image"),
        (["--image", str(tmp_path / "none.png")], "none.png: no such file"),
        (["--image", str(out), "--strength", "0.1", "--steps", "4"], "makes no step"),
    ):
        monkeypatch.setattr(sys, "argv", ["generate.py", "a cat", *wrong])
        with pytest.raises(MindSigmaError, match=fault):
            tool.main()


def test_white_that_is_not_drawn_is_told():
    picture, mask = disc(300, 410), np.zeros((300, 410), np.uint8)
    mask[:, :24] = 255  # of which 12 columns are cropped
    told = GivenImages([GivenImage.open(picture, mask)], (224, 288), "crop").told()
    assert told[1].startswith("mask: 50.0% of its white lies in what is cropped and stays as it is") and len(told) == 2
    assert len(GivenImages([GivenImage.open(picture, mask)], (224, 288), "pad").told()) == 1
    assert GivenImages([GivenImage.open(picture, mask)], (300, 410), "crop").told() == []


def test_finished_pictures_of_several_sizes():
    pictures = [GivenImage.open(disc(64, 80), middle(64, 80)), GivenImage.open(disc(32, 40), middle(32, 40))]
    given, drawn = GivenImages(pictures, (64, 64), "pad"), np.zeros((2, 64, 64, 3), np.float32)
    assert [image.size for image in given.finished(drawn, True, "pil")] == [(80, 64), (40, 32)]
    with pytest.raises(MindSigmaError, match="several sizes"):
        given.finished(drawn, True, "np")

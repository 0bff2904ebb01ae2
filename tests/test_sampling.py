"""Whole trajectories and images against the official code and diffusers, and what the pipeline promises its caller."""

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, GRAPH_IS_SLOW, official_checkpoint, psnr, relative_error
from mindspore import Tensor

from mindsigma import MindSigmaError, PixArtSigmaPipeline
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.sampling.options import SamplingOptions

QUICK = {"num_inference_steps": 2, "progress": False}


def draw(pipeline, reference, steps):
    """Latents and images for a reference's prompts and start noise."""
    prompts = [str(prompt) for prompt in reference["prompts"]]
    latents = pipeline(
        prompts,
        latents=reference["z"],
        num_inference_steps=steps,
        guidance_scale=4.5,
        use_resolution_binning=False,
        output_type="latent",
        progress=False,
    ).images
    return latents, pipeline.decode(Tensor(latents))


def check(pipeline, convention, steps):
    """Draw a reference and compare latents and images with it; returns the latents."""
    reference = np.load(GOLDEN / f"mini_{convention}_dpm_{steps}.npz")
    latents, images = draw(pipeline, reference, steps)
    assert relative_error(latents, reference["latents"]) < 2e-5
    expected = np.clip(reference["image"].astype(np.float32).transpose(0, 2, 3, 1) / 2 + 0.5, 0, 1)
    assert psnr(images, expected, 1.0) > 80
    return latents


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("convention", ["diffusers", "official"])
def test_trajectory_and_image_are_the_peers(mini, convention, steps, monkeypatch):
    monkeypatch.setattr(mini, "convention", convention)
    latents = check(mini, convention, steps)
    other = np.load(GOLDEN / f"mini_{'official' if convention == 'diffusers' else 'diffusers'}_dpm_{steps}.npz")
    assert relative_error(latents, other["latents"]) > 1e-2  # the conventions do differ


def test_graph_mode_with_aligned_heads_draws_the_peers(plain_mini, graph_mode):
    """What an NPU runs, one graph a step on weights of its kernel's width, but for the insides of the operators."""
    assert plain_mini.dit.blocks[0].attn.qkv.weight.shape[0] == 3 * 4 * 80
    before = compiled_graphs()
    check(plain_mini, "diffusers", 8)
    assert compiled_graphs() > before


def test_official_checkpoint_draws_the_same(mini):
    """The DiT from the official .pth, T5 and VAE from a folder."""
    from mindsigma.weights.locate import BUNDLED

    pipeline = PixArtSigmaPipeline.from_pretrained(official_checkpoint(), components=BUNDLED / "sigma-mini")
    a, b = (p("a red apple", seed=3, output_type="latent", **QUICK).images for p in (pipeline, mini))
    assert (a == b).all()


def test_graph_mode_compiles_once_for_all_images(plain_mini, mini, monkeypatch, graph_mode):
    """One graph for the captions, one for all timesteps and one a step, as on Ascend; a second image needs no more."""
    monkeypatch.setattr(plain_mini, "_steps", None)
    caption, negative = (plain_mini.encode_prompts([text]) for text in ("a red apple", ""))
    given = {"prompt_embeds": caption.states, "prompt_mask": caption.mask}
    given.update(negative_prompt_embeds=negative.states, negative_prompt_mask=negative.mask)
    before = compiled_graphs()
    latents = plain_mini(**given, seed=3, output_type="latent", **QUICK).images
    assert compiled_graphs() - before == 3
    plain_mini(**given, seed=4, output_type="latent", **QUICK)
    assert compiled_graphs() - before == 3
    ms.set_context(mode=ms.PYNATIVE_MODE)
    assert relative_error(latents, mini(**given, seed=3, output_type="latent", **QUICK).images) < 2e-5


@GRAPH_IS_SLOW
def test_guidance_in_halves_draws_the_same(either_mini):
    whole, halves = (
        either_mini(["a red apple", "a cat"], seed=3, output_type="latent", guidance_halves=halves, **QUICK).images
        for halves in (False, True)
    )
    assert relative_error(halves, whole) < 1e-5


def test_seed_fixes_the_image_whatever_the_batch(mini):
    together = mini(["a red apple", "a cat"], seed=5, output_type="latent", **QUICK)
    assert together.seeds == [5, 6]
    alone = mini("a cat", seed=6, output_type="latent", **QUICK).images
    assert relative_error(together.images[1], alone[0]) < 1e-5
    assert (mini("a cat", seed=6, output_type="latent", **QUICK).images == alone).all()
    random = mini("a cat", output_type="latent", **QUICK)
    assert (mini("a cat", seed=random.seeds, output_type="latent", **QUICK).images == random.images).all()


def test_images_of_one_prompt_follow_each_other(mini):
    result = mini(["a cat", "an owl"], seed=1, num_images_per_prompt=2, output_type="latent", **QUICK)
    assert result.seeds == [1, 2, 3, 4]
    assert relative_error(mini("an owl", seed=3, output_type="latent", **QUICK).images[0], result.images[2]) < 1e-5


def test_embeddings_stand_for_prompts(mini):
    texts = mini("a cat", negative_prompt="red", seed=1, output_type="latent", **QUICK).images
    caption, negative = mini.encode_prompts(["a cat"]), mini.encode_prompts(["red"], min_length=100)
    given = mini(
        prompt_embeds=caption.states.asnumpy(),
        prompt_mask=caption.mask.asnumpy(),
        negative_prompt_embeds=negative.states,
        negative_prompt_mask=negative.mask,
        seed=1,
        output_type="latent",
        **QUICK,
    ).images
    assert relative_error(given, texts) < 1e-5
    embedded = {"prompt_embeds": caption.states, "prompt_mask": caption.mask}
    mixed = mini(**embedded, negative_prompt="red", seed=1, output_type="latent", **QUICK).images
    assert relative_error(mixed, texts) < 1e-5


def test_negative_prompt_and_guidance_matter(mini):
    plain = mini("a cat", seed=1, output_type="latent", **QUICK).images
    assert relative_error(mini("a cat", "cat", seed=1, output_type="latent", **QUICK).images, plain) > 1e-2
    single = mini("a cat", seed=1, guidance_scale=1.0, output_type="latent", **QUICK).images
    assert relative_error(single, plain) > 1e-2
    near = mini("a cat", seed=1, guidance_scale=1.0001, output_type="latent", **QUICK).images
    assert relative_error(near, single) < 1e-3  # guidance of 1 is the conditional prediction


def test_callback_sees_and_changes_the_latents(mini):
    seen = []

    def replace(at):
        def callback(pipeline, index, timestep, arguments):
            seen.append((index, timestep))
            return {"latents": arguments["latents"] * 0} if index == at else None

        return callback

    plain = mini("a cat", seed=1, output_type="latent", **QUICK).images
    last = mini("a cat", seed=1, callback_on_step_end=replace(1), output_type="latent", **QUICK).images
    assert [index for index, _ in seen] == [0, 1] and seen[0][1] == 999
    assert (last == 0).all()
    first = mini("a cat", seed=1, callback_on_step_end=replace(0), output_type="latent", **QUICK).images
    assert relative_error(first, plain) > 1e-2  # the next step went on from the replaced latents

    def as_array(pipeline, index, timestep, arguments):
        return {"latents": arguments["latents"].asnumpy()}

    same = mini("a cat", seed=1, callback_on_step_end=as_array, output_type="latent", **QUICK).images
    assert relative_error(same, plain) < 1e-6
    with pytest.raises(MindSigmaError, match="callback"):
        mini("a cat", callback_on_step_end=lambda *_: {"latents": np.zeros(3)}, **QUICK)


@pytest.mark.parametrize("sampler", ["dpm", "ddim", "sa", "iddpm"])
def test_callback_sees_the_clean_picture(mini, sampler):
    """Noisy latents are alpha * clean + sigma * noise, of which `clean` is part; the last of them are all of it."""
    seen = []
    call = {**QUICK, "num_inference_steps": 4, "sampler": sampler, "seed": 1, "output_type": "latent"}
    mini("a cat", callback_on_step_end=lambda *a: seen.append((a[3]["latents"].asnumpy(), a[3]["clean"]())), **call)
    assert all(clean.shape == latents.shape and clean.dtype == np.float32 for latents, clean in seen)
    assert relative_error(seen[-1][1], seen[-1][0]) < 0.2 and relative_error(seen[0][1], seen[0][0]) > 0.5
    if sampler in ("dpm", "ddim"):  # they end at the clean latents
        assert relative_error(seen[-1][1], seen[-1][0]) < 1e-5


def test_output_types_and_sizes(mini):
    image = mini("a cat", seed=1, height=200, width=300, **QUICK).images[0]
    assert image.size == (300, 200) and image.mode == "RGB"  # drawn at the nearest bin, then resized and cropped
    array = mini("a cat", seed=1, height=224, width=288, use_resolution_binning=False, output_type="np", **QUICK).images
    assert array.shape == (1, 224, 288, 3) and array.dtype == np.float32 and array.min() >= 0 and array.max() <= 1
    assert mini.image_size(256, 1024) == (128, 512) and mini.image_size() == (256, 256)


def test_own_loop_over_the_steps(mini):
    caption, negative = mini.encode_prompts(["a cat"]), mini.encode_prompts([""], min_length=100)
    noise = mini.start_noise([1], 256, 256)
    text_kv, *steps = mini.denoise(noise, caption, negative, SamplingOptions(num_inference_steps=2))
    assert len(text_kv) == 8 and [step.index for step in steps] == [0, 1]
    reference = mini("a cat", seed=1, output_type="latent", **QUICK).images
    assert relative_error(steps[-1].latents.asnumpy(), reference) < 1e-5
    with pytest.raises(MindSigmaError, match="negative caption"):
        mini.denoise(noise, caption)


def test_official_convention_wants_all_states_of_the_negative(mini, monkeypatch):
    monkeypatch.setattr(mini, "convention", "official")
    short, long = mini.encode_prompts(["red"]), mini.encode_prompts(["a cat"], min_length=100)
    with pytest.raises(MindSigmaError, match="min_length"):
        mini.denoise(mini.start_noise([1], 256, 256), long, short)


@pytest.mark.parametrize(
    ("size", "tiled"), [((128, 128), False), ((144, 112), False), ((64, 256), False), ((160, 112), True)]
)
def test_only_beyond_1024_px_is_decoded_in_tiles(mini, monkeypatch, size, tiled):
    from mindsigma.pipeline import pipeline as module

    used = []
    monkeypatch.setattr(module, "decode_tiled", lambda vae, latents, apply: used.append(1) or np.zeros((1, 3, 8, 8)))
    monkeypatch.setitem(mini.components.loaded, "vae", lambda latents: Tensor(np.zeros((1, 3, 8, 8), np.float32)))
    mini.decode(Tensor(np.zeros((1, 4, *size), np.float32)))
    assert bool(used) == tiled


def test_text_encoder_can_be_released(mini):
    mini.encode_prompts(["a cat"])
    assert "t5" in mini.components.loaded
    mini.release_text_encoder()
    assert "t5" not in mini.components.loaded
    mini.encode_prompts(["a cat"])


def test_vae_moments_and_tiles(mini):
    from mindsigma.models.vae import sample_posterior
    from mindsigma.models.vae_tiling import decode_tiled, encode_tiled

    reference = np.load(GOLDEN / "mini_vae.npz")
    images = reference["image"].astype(np.float32)
    moments = mini.vae.encode(Tensor(images))
    assert relative_error(moments.asnumpy(), reference["moments"]) < 5e-6
    latents = sample_posterior(moments, None, mini.vae.config)
    assert psnr(mini.vae(latents).asnumpy(), images, 2.0) > 35
    tiles = decode_tiled(mini.vae, latents, tile=16, overlap=0.5)
    assert psnr(tiles, mini.vae(latents).asnumpy(), 2.0) > 33  # a tile's norms see the tile alone
    hard = decode_tiled(mini.vae, latents, tile=16, overlap=0.0)
    assert psnr(hard, mini.vae(latents).asnumpy(), 2.0) < psnr(tiles, mini.vae(latents).asnumpy(), 2.0)
    tiled_moments = encode_tiled(mini.vae, images, tile=128, overlap=0.5)
    mean = moments.asnumpy()[:, :4]
    assert relative_error(tiled_moments[:, :4], mean) < 0.06
    noise = Tensor(np.ones(mean.shape, np.float32))
    std = np.exp(0.5 * np.clip(reference["moments"][:, 4:], -30, 20))
    expected = (reference["moments"][:, :4] + std) * mini.vae.config.scaling_factor
    assert relative_error(sample_posterior(moments, noise, mini.vae.config).asnumpy(), expected) < 5e-6


def test_sdxl_vae_has_the_published_shapes():
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.models.vae import VAE
    from mindsigma.models.vae_config import VAEConfig

    with no_init_parameters():
        vae = VAE(VAEConfig())
    shapes = {parameter.name: tuple(parameter.shape) for parameter in vae.get_parameters()}
    assert len(shapes) == 248 and sum(int(np.prod(shape)) for shape in shapes.values()) == 83_653_863
    assert shapes["decoder.up_blocks.2.resnets.0.conv_shortcut.weight"] == (256, 512, 1, 1)
    assert shapes["encoder.mid_block.attentions.0.to_q.weight"] == (512, 512)


def test_vae_in_both_modes(either_mini):
    reference = np.load(GOLDEN / "mini_diffusers_dpm_8.npz")
    image = either_mini.vae(Tensor(reference["latents"][:1])).asnumpy()
    assert psnr(image, reference["image"][:1].astype(np.float32), 2.0) > 75


def test_fp16_draws_the_same_picture(mini):
    half = PixArtSigmaPipeline.from_pretrained("sigma-mini", dtype="fp16")
    reference = mini("a red apple", seed=1, output_type="np", **QUICK).images
    image = half("a red apple", seed=1, output_type="np", **QUICK).images
    assert image.dtype == np.float32 and psnr(image, reference, 1.0) > 30


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [3]}, "prompt"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"height": 100, "use_resolution_binning": False}, "height 100 .* use 96"),
        ({"height": 8}, "height"),
        ({"width": 100.5}, "width"),
        ({"seed": -1}, "seed"),
        ({"seed": [1, 2]}, "seeds"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"latents": np.zeros((2, 4, 32, 32))}, "latents"),
        ({"negative_prompt": ["a", "b"]}, "negative"),
        ({"prompt_embeds": np.zeros((1, 16, 256), np.float32)}, "prompt_mask"),
        ({"solver_order": 5}, "solver_order"),
        ({"height": 20000}, "height"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"latents": np.zeros((1, 4, 32, 32)), "height": 512}, "latents are of 256 x 256"),
        (
            {"prompt": None, "prompt_embeds": np.zeros((1, 16, 7), np.float16), "prompt_mask": np.ones((1, 16))},
            "prompt_embeds of shape",
        ),
    ],
)
def test_bad_arguments_are_named(mini, arguments, word):
    with pytest.raises(MindSigmaError, match=word):
        mini(**{"prompt": "a cat", "progress": False, **arguments})

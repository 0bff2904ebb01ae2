"""Prompts in, images out."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, List, Optional, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.arguments import array, flag, one_of, path_like, seeds_for, texts_of, whole
from mindsigma.backends.cpu import accelerates
from mindsigma.backends.cpu.sampler import accelerate_graphs, accelerate_sampler
from mindsigma.data.aspect_ratio import INPUT_SIZES, bin_base, closest_bin, inference_bins
from mindsigma.errors import MindSigmaError
from mindsigma.models.vae import sample_posterior
from mindsigma.models.vae_tiling import decode_tiled, encode_tiled
from mindsigma.ops.operators import narrow
from mindsigma.pipeline.compiling import compiling
from mindsigma.pipeline.components import Components, controlnet_name
from mindsigma.pipeline.given_image import GivenImages, control_images, given_images
from mindsigma.pipeline.pictures import cover_and_crop, to_pil, to_unit_range
from mindsigma.pipeline.text_cleaning import clean_caption as clean_text
from mindsigma.pipeline.text_cleaning import plain_caption
from mindsigma.progress import bar
from mindsigma.runtime import DTYPES, set_device
from mindsigma.sampling import CONVENTIONS
from mindsigma.sampling.captions import caption_pair, each, given_caption, pad, repeat_rows
from mindsigma.sampling.controls import REUSE, Control
from mindsigma.sampling.denoising import NO_SHORTCUTS, DenoisingGraphs, denoising_steps
from mindsigma.sampling.finite_latents import FiniteLatents, require_finite
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.options import SamplingOptions, with_own
from mindsigma.sampling.parallel import NOT_GUESSED, NOT_HALVED, ParallelGraphs, ParallelSampling, bytes_sent
from mindsigma.weights.loading import kinds_in_file, open_controlnet, open_dit, open_t5, open_vae
from mindsigma.weights.locate import components_beside, locate
from mindsigma.weights.released import default_sampler, release_named, release_of
from mindsigma.weights.saving import save_pipeline
from mindsigma.weights.tokenizer import Tokenizer

OUTPUT_TYPES = ("pil", "np", "latent")

# Latent pixels above which the decoder works in tiles, unless told otherwise: the 1024 px bins decode whole.
TILE_ABOVE = 128 * 128

# Number of the draw that samples an image's latents: one that no sampler comes to.
ENCODING = 1 << 16

# Sides beyond this are refused: 4K is the largest the family was made for, and its longest bin has 8192 pixels.
LARGEST_SIDE = 8192

# What to do where NaN or infinity comes out of a network.
HALF_OVERFLOWS = "half precision overflows beyond 65504: use fp32 or bf16 (dtype, --dtype)"
WEIGHTS_OR_GUIDANCE = "lower guidance_scale, leave out adapters or lower their weight, or check the weights"


@dataclass
class PipelineOutput:
    """What was drawn.

    Attributes:
        images: PIL images, float32 (N, H, W, 3) in [0, 1], or latents (N, c, h, w).
        seeds: one for each image.
        drawn_size: (height, width) in pixels that the model worked at; images may be resized or cropped from that.
    """

    images: Any
    seeds: List[int]
    drawn_size: Optional[Tuple[int, int]] = None


class PixArtSigmaPipeline:
    """PixArt-Σ text to image. Build it with `from_pretrained`.

    Args:
        dit, vae, t5: Pending networks (weights/loading.py); each is loaded when first used.
        tokenizer: Tokenizer.
        convention: "diffusers" or "official": time grid and end of the solver, and which mask the unconditional half
            uses (models/README.md, "Sampling").
        parallel: ParallelSampling, if several processes draw together, all calling the same with the same arguments.
        sampler: that of calls that name none, where the DiT's file tells none; a released distilled model's own.
        controlnets: list of Pending ControlNets.
    """

    def __init__(self, dit, vae, t5, tokenizer, convention="diffusers", parallel=None, sampler="dpm", controlnets=()):
        for what, name, value, other, width in (
            ("T5", "d_model", t5.config.d_model, "caption_channels", dit.config.caption_channels),
            ("VAE", "latent_channels", vae.config.latent_channels, "in_channels", dit.config.in_channels),
        ):
            if value != width:
                raise MindSigmaError(
                    f"{dit.tensors.path}: the DiT's {other} {width} do not fit the {what}'s {name} {value}; "
                    "give the model and the components that belong together (--model, --components)"
                )
        self.components = Components(dit, vae, t5, tokenizer, controlnets)
        self.controlnets = [controlnet_name(number) for number in range(len(controlnets))]
        self._steps = None
        self.convention = one_of("convention", convention, CONVENTIONS)
        self.parallel, self.sampler = parallel, sampler
        self.vae_tiling = None  # None: above TILE_ABOVE; True or False: always or never
        self.origin = self._reopen = None  # where VAE, T5 and tokenizer are from; how to open the DiT with adapters

    @classmethod
    def from_pretrained(
        cls,
        name_or_path,
        dtype=None,
        device=None,
        components=None,
        convention="diffusers",
        lora=(),
        parallel=None,
        text_encoder_memory="whole",
        controlnet=(),
        **config,
    ):
        """Open a model; its weights are checked now and read when first used.

        Args:
            name_or_path: bundled or released name, folder of a diffusers pipeline or of this project, hub id, or the
                weight file of a DiT (.pth, .ckpt, .safetensors), which then needs `components`; of them, a file that
                holds VAE and T5 as well needs tokenizer/ alone, here or beside itself.
            dtype: "fp32", "fp16" or "bf16"; default fp32 on the CPU, fp16 on Ascend.
            device: "CPU" or "Ascend"; default what MindSpore finds.
            components: folder, or hub id, with vae/, text_encoder/ and tokenizer/, if not in `name_or_path`; a released
                name has its own.
            convention: see the class.
            lora: LoRA or DoRA adapters to merge into the DiT, each `FILE[:WEIGHT]` or (path, weight).
            parallel: "sequence", "cfg" or "both", in each of the processes that msrun started (ParallelSampling).
            text_encoder_memory: "whole", "layers" or "int8"; see open_t5.
            controlnet: folder or file of a ControlNet, or a list of them; each takes a picture (`control_image`).
            config: DiTConfig fields that override what the files tell.

        Raises:
            MindSigmaError: a file is missing, damaged or does not fit.
        """
        path_like("name_or_path", name_or_path)
        if components is not None:
            path_like("components", components)
        set_device(device)
        parallel = None if parallel is None else ParallelSampling(parallel)
        release = release_named(name_or_path)
        if components is None and release is not None and not release.whole:
            components = release.components
        path = locate(name_or_path, None if components is None else ("dit", "transformer"))
        held = kinds_in_file(path)  # a file of ComfyUI's kind holds VAE and T5, too
        if path.is_file() and components is None:
            known = release_of(path)
            if known is not None:
                components = known.components
            elif not {"vae", "t5"} <= held or not (path.parent / "tokenizer").is_dir():
                raise MindSigmaError(
                    f"{path}: a weight file holds no tokenizer, and most hold no VAE and no T5; name the folder with "
                    "tokenizer/, vae/ and text_encoder/ as components (--components)"
                )
            else:
                components = path.parent
        elif components is None:
            components = components_beside(path)
        rest = path if components is None else locate(components, ("vae", "text_encoder", "tokenizer"))
        vae = path if "vae" in held and not (rest / "vae").is_dir() else rest
        t5 = path if "t5" in held and not (rest / "text_encoder").is_dir() else rest
        reopen = partial(open_dit, path, dtype, sampling=True, **config)
        dit = reopen(lora=lora)
        controlnet = controlnet if isinstance(controlnet, (list, tuple)) else [controlnet]
        made = cls(
            dit,
            open_vae(vae, dtype),
            open_t5(t5, dtype, memory=text_encoder_memory),
            Tokenizer(rest / "tokenizer"),
            convention,
            parallel,
            default_sampler(name_or_path if release is not None else path),
            [open_controlnet(one, dtype, dit, sampling=True) for one in controlnet],
        )
        made.origin, made._reopen = str(name_or_path if components is None else components), reopen
        return made

    @property
    def files(self):
        """dict part -> path of the files that "dit", "vae", "t5" and the ControlNets are read from."""
        parts = ("dit", "vae", "t5", *self.controlnets)
        return {name: self.components.opened(name).tensors.path for name in parts}

    @property
    def dtype_name(self):
        """ "fp32", "fp16" or "bf16": what the DiT computes in."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.components.opened("dit").dtype)

    def sampling_options(self, **given):
        """SamplingOptions of keyword arguments, beside which count those that the DiT or its adapter was made for."""
        own = getattr(self.components.opened("dit"), "sampling", None) or {"sampler": self.sampler}
        return SamplingOptions.of_call(with_own(own, given))

    def with_lora(self, lora):
        """The DiT with these adapters merged (as for `from_pretrained`) for `use`, its weights checked but not read."""
        return self._reopen(lora=lora)

    def use(self, dit):
        """Draw with another DiT, of `with_lora`, from now on."""
        if self.components.exchange("dit", dit):
            self._steps = None

    @property
    def dit(self):
        """The DiT."""
        return self.components.dit

    @property
    def vae(self):
        """The VAE."""
        return self.components.vae

    @property
    def text_encoder(self):
        """The TextEncoder."""
        return self.components.text_encoder

    @property
    def tokenizer(self):
        """The Tokenizer."""
        return self.components.tokenizer

    @property
    def notes(self):
        """list[str]: what was assumed about the weights, or left out of an adapter."""
        return self.components.notes

    def _config(self, name):
        return self.components.opened(name).config

    @property
    def default_size(self):
        """Side of a square image at the model's base resolution, in pixels."""
        return self._config("dit").input_size * self._config("vae").downsampling

    def release_text_encoder(self):
        """Free T5's memory; it is read again if another prompt comes."""
        self.components.release("t5")

    def encode_prompts(self, prompts, max_sequence_length=300, clean_caption=False, min_length=1):
        """Caption (states (N, L, d), mask (N, L)) of a list of prompts, prepared as the convention has it."""
        prompts, max_sequence_length = texts_of("prompts", prompts), whole("max_sequence_length", max_sequence_length)
        if clean_caption:
            texts = [clean_text(prompt) for prompt in prompts]
        else:
            texts = [plain_caption(prompt, self.convention == "diffusers") for prompt in prompts]
        if self.parallel is not None:
            caption = self.parallel.caption(lambda: self.text_encoder(texts, max_sequence_length, min_length))
        else:
            caption = self.text_encoder(texts, max_sequence_length, min_length)
        require_finite("T5's states of the prompts", caption.states, HALF_OVERFLOWS)
        return caption

    def image_size(self, height=None, width=None, use_resolution_binning=True):
        """Return (height, width) to denoise at, in pixels, for what is asked; None is the base resolution."""
        height = self.default_size if height is None else height
        width = self.default_size if width is None else width
        unit = self._config("vae").downsampling * self._config("dit").patch_size
        height = whole("height", height, unit, LARGEST_SIDE, " pixels")
        width = whole("width", width, unit, LARGEST_SIDE, " pixels")
        if use_resolution_binning:
            if self._config("dit").input_size not in INPUT_SIZES:
                raise MindSigmaError(
                    f"there are no trained sizes for a base of {self.default_size} px; draw at exact sizes with "
                    "use_resolution_binning=False (--no-resolution-binning)"
                )
            return closest_bin(height, width, self._bins())[1]
        for name, side in (("height", height), ("width", width)):
            if side % unit:
                near = max(unit, round(side / unit) * unit)
                raise MindSigmaError(
                    f"{name} {side} is not a multiple of {unit}, which this model needs without resolution binning; "
                    f"use {near}"
                )
        return height, width

    def size_of_ratio(self, ratio, use_resolution_binning=True):
        """Return (height, width) in pixels for a ratio height / width: the nearest trained one, else of equal area."""
        if use_resolution_binning:
            self.image_size()  # there may be no trained sizes
            return closest_bin(ratio, 1, self._bins())[1]
        unit = self._config("vae").downsampling * self._config("dit").patch_size
        root = min(max(ratio, 1 / 16), 16) ** 0.5
        sides = (max(1, round(self.default_size * part / unit)) * unit for part in (root, 1 / root))
        return self.image_size(*sides, use_resolution_binning=False)

    def _bins(self):
        return inference_bins(bin_base(self._config("dit").input_size))

    def bytes_sent(self, height, width, images=1, guided=True, learned_variance=False, perturbed=(), guess=False):
        """Bytes that each of several processes sends a step (parallel.bytes_sent), for images of height x width pixels.

        With ControlNets those of a step in which all of them act.

        `perturbed`: layers of perturbed attention; `guess`: guess mode. Raises:
            MindSigmaError: the processes cannot share such images.
        """
        config = self._config("dit")
        unit = self._config("vae").downsampling * config.patch_size
        part = self.parallel.part(config, guided, height // unit, width // unit)
        dtype = self.components.opened("dit").dtype
        controls = [self._config(name) for name in self.controlnets]
        how = learned_variance, perturbed, controls, guided, guess, not accelerates(dtype)
        return bytes_sent(config, part, images, 4 if dtype == ms.float32 else 2, *how)

    def start_noise(self, seeds, height, width):
        """Standard normal latents (N, c, h, w) fp32 for images of height x width pixels; each from its own seed."""
        config = self._config("vae")
        shape = config.latent_channels, height // config.downsampling, width // config.downsampling
        return np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])

    def fresh_noise(self, seeds, draw, shape):
        """Standard normal noise (N, c, h, w) fp32, the `draw`-th (from 0) of a sampler that draws; as `start_noise`."""
        sequences = [np.random.SeedSequence(seed, spawn_key=(draw,)) for seed in seeds]
        return np.stack([np.random.default_rng(one).standard_normal(shape[1:], np.float32) for one in sequences])

    def denoise(
        self, latents, caption, negative=None, options=None, fresh_noise=None, clean=None, mask=None, controls=()
    ):  # fmt: skip
        """Generator over the denoising of latents (N, c, h, w): first the caption's keys and values, then a Step each.

        Args:
            latents: standard normal noise.
            caption: Caption of N images.
            negative: Caption of 1 or N images; needed if guidance_scale > 1.
            options: SamplingOptions.
            fresh_noise: see denoising_steps.
            clean: latents of images to draw from, (1 or N, c, h, w), see `encode`; of the steps those are run that the
                options' strength leaves.
            mask: (1 or N, 1, h, w), 1 where the latents are drawn anew, 0 where they become the image's.
            controls: list of Control, of `controls`.
        """
        options = options or self.sampling_options()
        if options.guided and negative is None:
            raise MindSigmaError("guidance needs a negative caption, as from encode_prompts(['']), or guidance_scale=1")
        batch, _, h, w = latents.shape
        unconditional = None
        if options.guided:
            length = max(caption.states.shape[1], negative.states.shape[1])
            if self.convention == "official" and negative.states.shape[1] < length:
                raise MindSigmaError(
                    f"convention official attends to the negative caption wherever the prompt has tokens: give states "
                    f"for {length} tokens, not {negative.states.shape[1]} (encode_prompts(..., min_length={length}))"
                )
            caption, negative = pad(caption, length), pad(negative, length)
            tokens = caption.mask if self.convention == "official" else repeat_rows(negative.mask, batch)
            unconditional = (repeat_rows(negative.states, batch), tokens)
        if mask is not None and clean is None:
            raise MindSigmaError("a mask needs the clean latents of the image that it belongs to")
        sampler = accelerate_sampler(options.solver(self.convention), self.dit)
        begin, noise = options.first_step(sampler, clean is not None, mask is not None), latents
        if begin is not None:
            row = sampler.table(options.num_inference_steps, begin)[0]
            latents = row.alpha * clean + row.sigma * noise
        if mask is not None:
            sampler = Inpainting(sampler, clean, noise, mask)
        if self._steps is None:
            alone = self.parallel is None
            graphs = DenoisingGraphs(self.dit) if alone else ParallelGraphs(self.dit, self.parallel)
            self._steps = accelerate_graphs(graphs)
        return denoising_steps(
            self._steps,
            Tensor(np.asarray(latents, np.float32)),
            sampler,
            options.num_inference_steps,
            (caption.states, caption.mask),
            options.guidance_scale,
            unconditional,
            self._conditions(h, w),
            options.guidance_halves,
            options.shortcuts,
            fresh_noise,
            options.guidance_rescale,
            begin,
            options.pag(self._config("dit").depth),
            controls,
        )

    def _conditions(self, h, w):
        """Micro conditions of a model that has them: (image size (1, 2), aspect ratio (1, 1)) of all images."""
        if not self._config("dit").micro_condition:
            return None
        scale = self._config("vae").downsampling
        size = np.array([[h * scale, w * scale]], np.float32)
        side = self._config("dit").input_size
        ratio = closest_bin(h * scale, w * scale, self._bins())[0] if side in INPUT_SIZES else h / w
        return Tensor(size), Tensor(np.array([[ratio]], np.float32))

    def open_images(self, image, mask, options):
        """GivenImages of the call's image and mask, laid out for what is drawn; None without an image."""
        if image is None:
            if mask is not None:
                raise MindSigmaError("mask needs an image: give the picture that it belongs to, too (--image)")
            return None
        given = given_images(image, mask)
        return self._laid(given, *self._canvas(given[0].size, options), options.image_fit)

    def _canvas(self, size, options):
        """The size (height, width) in pixels that is asked for, or None, and that of what is drawn.

        `size`: of the picture by which what the options leave open is decided.
        """
        height, width, binning = options.height, options.width, options.use_resolution_binning
        if height is None and width is None:
            return None, self.size_of_ratio(size[0] / size[1], binning)
        height = max(1, round(width * size[0] / size[1])) if height is None else height
        width = max(1, round(height * size[1] / size[0])) if width is None else width
        return (height, width), self.image_size(height, width, binning)

    @staticmethod
    def _laid(given, asked, canvas, fit):
        return GivenImages(given if asked is None else [one.resized(*asked) for one in given], canvas, fit, asked)

    def open_control_images(self, control_image, options, source=None):
        """The call's control_image laid out for what is drawn: a list of GivenImages, or None, for each ControlNet.

        `source`: GivenImages of an image that is drawn from, which the pictures then lie like. Else what is drawn is
        cropped to the size that was asked for, and they lie where that will show them.
        """
        if not self.controlnets:
            if control_image is not None:
                raise MindSigmaError("control_image is for a ControlNet: open the model with one (--controlnet)")
            return []
        given = control_images(control_image, len(self.controlnets))
        first = next((pictures[0] for pictures in given if pictures is not None), None)
        if first is None:
            return [None] * len(given)
        if source is not None:
            asked, canvas, fit = source.size, source.canvas, options.image_fit
        else:
            asked, canvas = self._canvas(first.size, options)
            fit = options.image_fit if asked is None else "pad"
        return [None if pictures is None else self._laid(pictures, asked, canvas, fit) for pictures in given]

    def blank_controls(self, options, size):
        """list of Control of grey pictures of a size (height, width), one for each ControlNet."""
        grey = np.full((*size, 3), 127, np.uint8)
        fixed = replace(options, height=size[0], width=size[1], use_resolution_binning=False)
        given = [grey] * len(self.controlnets) if self.controlnets else None
        return self.controls(self.open_control_images(given, fixed), options, 1)

    def controls(self, pictures, options, count):
        """list of Control, of `open_control_images`; for `count` images that are drawn."""
        result, several = [], options.of_controls(len(self.controlnets))
        for name, given, (scale, start, end) in zip(self.controlnets, pictures, several):
            if given is None:
                continue
            if len(given) not in (1, count):
                raise MindSigmaError(f"{len(given)} control images for {count} images; give one, or one for each")
            latents, network = self.encode(given.pixels()), self.components.network(name)
            result.append(Control(network, latents, scale, start, end, options.guess_mode))
        return result

    def encode_given(self, source, seeds, options):
        """Latents (1 or N, c, h, w), float32, of GivenImages for N images that are drawn from these seeds."""
        if len(source) not in (1, len(seeds)):
            raise MindSigmaError(f"{len(source)} images to draw {len(seeds)} from; give one, or one for each")
        pixels, noise = source.pixels(), None
        if options.image_latents == "sample":
            factor, channels = self._config("vae").downsampling, self._config("vae").latent_channels
            shape = len(seeds), channels, pixels.shape[2] // factor, pixels.shape[3] // factor
            noise = self.fresh_noise(seeds, ENCODING, shape)
        return self.encode(pixels, noise)

    def encode(self, images, noise=None):
        """Scaled latents (N, c, h, w), float32, of images (1 or N, 3, H, W) in [-1, 1]; one after the other.

        `noise`: standard normal (N, c, h, w), for samples of the posterior; None for its mode.
        """
        encoded, factor = [], self._config("vae").downsampling
        tiled = self._in_tiles(images.shape[2] // factor, images.shape[3] // factor)
        for i in range(len(images)):
            one = images[i : i + 1]
            moments = Tensor(encode_tiled(self.vae, one)) if tiled else self.vae.encode(Tensor(one)).astype(ms.float32)
            encoded.append(moments.asnumpy())
        moments = require_finite("the encoded images", np.concatenate(encoded), HALF_OVERFLOWS)
        noise = None if noise is None else Tensor(noise)
        return sample_posterior(Tensor(moments), noise, self._config("vae")).asnumpy()

    def _in_tiles(self, h, w):
        """Whether the VAE works in tiles on latents of this size."""
        return h * w > TILE_ABOVE if self.vae_tiling is None else self.vae_tiling

    def decode(self, latents):
        """Images (N, H, W, 3), float32 in [0, 1], of scaled latents (N, c, h, w); one after the other."""
        if not isinstance(latents, Tensor) or latents.ndim != 4:
            latents = Tensor(array("latents", latents).astype(np.float32))
            if latents.ndim != 4:
                raise MindSigmaError(f"latents of shape {latents.shape}: expected (N, c, h, w)")
        tiled = self._in_tiles(*latents.shape[2:])
        apply = map if self.parallel is None else self.parallel.apply
        ones = [narrow(latents, 0, i, 1) for i in range(latents.shape[0])]
        if tiled:
            images = [decode_tiled(self.vae, one, apply=apply) for one in ones]
        else:
            with compiling(f"VAE's decoder, {latents.shape[2]} x {latents.shape[3]} latents"):
                images = list(apply(lambda one: self.vae(one).astype(ms.float32).asnumpy(), ones))
        images = require_finite("the decoded images", np.concatenate(images), HALF_OVERFLOWS)
        return to_unit_range(images)

    def __call__(
        self,
        prompt=None,
        negative_prompt="",
        *,
        num_images_per_prompt=1,
        seed=None,
        latents=None,
        prompt_embeds=None,
        prompt_mask=None,
        negative_prompt_embeds=None,
        negative_prompt_mask=None,
        output_type="pil",
        callback_on_step_end=None,
        progress=True,
        clock=None,
        step_noise=None,
        image=None,
        mask=None,
        control_image=None,
        **sampling,
    ):
        """Draw images.

        Args:
            prompt: a text or a list of texts; or prompt_embeds (N, L, d) with prompt_mask (N, L).
            negative_prompt: what guidance leads away from: a text or one for each prompt; or negative_prompt_embeds.
            seed: image i is drawn from seed + i; a list gives one for each image; None draws one at random.
            latents: start noise (N, c, h, w) instead of a seed.
            output_type: "pil", "np" (float32 (N, H, W, 3) in [0, 1]) or "latent" (scaled, (N, c, h, w)).
            callback_on_step_end: called as f(pipeline, step index, timestep, {"latents": ..., "clean": ...}), of which
                `clean` is that of Step; a dict that it returns replaces the latents.
            progress: show a progress bar.
            clock: PhaseClock that is told about the phases text, denoise and decode.
            step_noise: function (k, shape) of the k-th draw (N, c, h, w) of a sampler that draws, instead of each
                image's own from its seed; k counts from the sampler's first_draw.
            image: what to draw from instead of noise alone: a path, a PIL image, an array (H, W, 3) of bytes or of
                floats in [0, 1], or a list of one for each image that is drawn. Without height and width it decides
                the size.
            mask: of the image's size, white where to draw anew: the same kinds, also (H, W); with a list of images one
                for all or one for each.
            control_image: of a pipeline with a ControlNet, the picture that this takes, of the kinds of `image`; of
                several a list of one for each, None for one that is left out. Without an image, a height and a width
                the first one decides the size.
            sampling: the fields of SamplingOptions, such as height, width, num_inference_steps and guidance_scale.

        Returns:
            PipelineOutput with num_images_per_prompt images of the first prompt, then of the second, and so on.

        Raises:
            MindSigmaError: an argument of the wrong kind or out of range, or a step that leaves NaN or infinity.
        """
        one_of("output_type", output_type, OUTPUT_TYPES)
        num_images_per_prompt = whole("num_images_per_prompt", num_images_per_prompt)
        progress = flag("progress", progress)
        options = self.sampling_options(**sampling)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise MindSigmaError(
                f"callback_on_step_end must be a function, not a {type(callback_on_step_end).__name__}"
            )
        draws = options.solver(self.convention).draws
        if step_noise is not None and not (draws and callable(step_noise)):
            what = f"a {type(step_noise).__name__}" if draws else f"for {options.sampler} with these options"
            raise MindSigmaError(f"step_noise must be a function, for a sampler that draws noise, not {what}")
        if seed is not None and not isinstance(seed, (list, tuple, np.ndarray)):
            whole("seed", seed, 0)
        if self.parallel is not None and options.shortcuts != NO_SHORTCUTS:
            raise MindSigmaError("guidance_interval, text_reuse and block_reuse are for one process, not for several")
        if self.parallel is not None and self.parallel.half is not None and options.perturbed:
            raise MindSigmaError(NOT_HALVED)
        if self.controlnets and (options.text_reuse < 1 or options.block_reuse > 1):
            raise MindSigmaError(REUSE)
        if self.parallel is not None and self.parallel.half is not None and options.guess_mode:
            raise MindSigmaError(NOT_GUESSED)
        options.of_controls(len(self.controlnets))
        options.pag(self._config("dit").depth)
        begin = options.first_step(options.solver(self.convention), image is not None, mask is not None)
        source = self.open_images(image, mask, options)
        pictures = self.open_control_images(control_image, options, source)
        laid = next((given for given in (source, *pictures) if given is not None), None)
        height, width = options.height, options.width
        if laid is None:
            size = self.image_size(height, width, options.use_resolution_binning)
        else:
            size, (height, width) = laid.canvas, laid.size or (None, None)
        phase = clock.phase if clock is not None else lambda name: nullcontext()

        with phase("text"):
            given = given_caption("prompt", prompt_embeds, prompt_mask)
            given_negative = given_caption("negative_prompt", negative_prompt_embeds, negative_prompt_mask)
            caption, negative = caption_pair(
                lambda texts, length, shortest: self.encode_prompts(texts, length, options.clean_caption, shortest),
                self._config("dit").caption_channels,
                prompt,
                given,
                negative_prompt,
                given_negative,
                options.guided,
                options.max_sequence_length,
            )
            caption = each(caption, num_images_per_prompt)
            if negative is not None and negative.states.shape[0] > 1:
                negative = each(negative, num_images_per_prompt)
        count = caption.states.shape[0]
        drawn = latents is None or (draws and step_noise is None)
        if self.parallel is not None and seed is None and drawn:
            raise MindSigmaError("give a seed: processes that draw one image together must begin with the same noise")
        seeds = seeds_for(seed, count)
        if latents is None:
            noise = self.start_noise(seeds, *size)
        else:
            fixed = laid is not None or height is not None or width is not None
            noise = self._check_latents(latents, count, size if fixed else None)
        clean = latent_mask = None
        if source is not None:
            with phase("encode"):
                clean = self.encode_given(source, seeds, options)
                latent_mask = source.latent_masks(self._config("vae").downsampling)
        controls = []
        if any(given is not None for given in pictures):
            with phase("encode"):
                controls = self.controls(pictures, options, count)

        progress = progress and (self.parallel is None or self.parallel.first)
        with phase("denoise"):
            fresh_noise = partial(self.fresh_noise, seeds) if step_noise is None else partial(given_noise, step_noise)
            trajectory = self.denoise(noise, caption, negative, options, fresh_noise, clean, latent_mask, controls)
            steps = options.num_inference_steps - (begin or 0)
            latents = self._run(
                trajectory, steps, callback_on_step_end, progress, self._what(options, size, caption, len(controls))
            )
        drawn_size = tuple(side * self._config("vae").downsampling for side in noise.shape[2:])
        if output_type == "latent":
            return PipelineOutput(latents.asnumpy(), seeds, drawn_size)
        with phase("decode"):
            images = self.decode(latents)
            if source is not None:
                return PipelineOutput(source.finished(images, options.paste, output_type), seeds, drawn_size)
            if options.use_resolution_binning and (height is not None or width is not None):
                images = cover_and_crop(images, height or self.default_size, width or self.default_size)
        return PipelineOutput(to_pil(images) if output_type == "pil" else images, seeds, drawn_size)

    def _what(self, options, size, caption, controls):
        """Text that tells all that decides the graph of a step."""
        guidance = f"{'guided' if options.guided else 'unguided'}{', perturbed' if options.perturbed else ''}"
        guidance += f", {controls} ControlNets" if controls else ""
        texts, tokens = caption.states.shape[:2]
        return (
            f"step of {self._config('dit').depth} blocks, sampler {options.sampler}, {guidance}, "
            f"{size[0]} x {size[1]} px, {texts} x {tokens} tokens, {self.dtype_name}"
        )

    def _run(self, trajectory, steps, callback, progress, what="step"):
        watch = FiniteLatents(
            HALF_OVERFLOWS if self.components.opened("dit").dtype == ms.float16 else WEIGHTS_OR_GUIDANCE
        )
        next(trajectory)  # the caption's keys and values
        steps_done = bar(steps, "denoise", "step", disable=not progress)
        latents = replacement = None
        with steps_done:
            while True:
                try:
                    with compiling(what):
                        step = trajectory.send(replacement)
                except StopIteration:
                    watch.check()
                    return latents
                latents = step.latents
                replacement = None
                watch.note(latents, step)
                if callback is not None:
                    changed = callback(self, step.index, step.timestep, {"latents": latents, "clean": step.clean})
                    if changed is not None and not isinstance(changed, dict):
                        raise MindSigmaError(
                            f"callback_on_step_end must return a dict or None, not a {type(changed).__name__}"
                        )
                    if changed and "latents" in changed:
                        replacement = latents = _like(changed["latents"], latents)
                    watch.note(latents, step, by_caller=True)
                if progress:
                    latents.asnumpy()  # wait for the device, so that the bar tells the truth
                    if self.parallel is None:  # else all processes have to end at the same place
                        watch.check()
                steps_done.update()

    def _check_latents(self, latents, count, size):
        latents = require_finite("latents", array("latents", latents), "give other start noise, or a seed")
        channels = self._config("dit").in_channels
        if latents.ndim != 4 or latents.shape[:2] != (count, channels):
            raise MindSigmaError(f"latents of shape {latents.shape}: expected ({count}, {channels}, h, w)")
        scale = self._config("vae").downsampling
        drawn = latents.shape[2] * scale, latents.shape[3] * scale
        if size is not None and drawn != tuple(size):
            raise MindSigmaError(f"latents are of {drawn[0]} x {drawn[1]} pixels, but height and width ask for {size}")
        return latents

    def save_pretrained(self, folder, dtype="fp16"):
        """Write the model in this project's format: a folder each for dit, vae, text_encoder and tokenizer."""
        save_pipeline(self, Path(path_like("folder", folder)), dtype)


def given_noise(step_noise, draw, shape):
    """A draw of the caller's own function, if it is of this shape (N, c, h, w)."""
    noise = array(f"step_noise: draw {draw}", step_noise(draw, shape))
    if noise.shape != tuple(shape):
        raise MindSigmaError(f"step_noise: draw {draw} of shape {noise.shape}, expected {tuple(shape)}")
    return require_finite(f"step_noise: draw {draw}", noise, "return standard normal noise")


def _like(value, latents):
    """Latents that a callback brought, as a Tensor like those they replace."""
    if not isinstance(value, Tensor):
        value = Tensor(array("callback_on_step_end: latents", value).astype(np.float32))
    if value.shape != latents.shape:
        raise MindSigmaError(f"callback_on_step_end: latents of shape {value.shape}, expected {latents.shape}")
    return value.astype(ms.float32)

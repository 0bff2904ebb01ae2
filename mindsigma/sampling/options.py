"""How an image is drawn, as one value: what the call, the command line, warm-up, validation and the PNG all share."""

import argparse
from dataclasses import asdict, dataclass, fields
from operator import index
from typing import Optional, Tuple

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit_config import layer_numbers
from mindsigma.sampling import SAMPLER_OPTIONS, SAMPLERS, sampler_class

OWN = "the sampler's own"
CONTROL_NUMBERS = ("control_scale", "control_start", "control_end")
PAG_OPTIONS = ("pag_scale", "pag_layers", "pag_adaptive_scale")
FITS = ("crop", "pad")  # of an image to draw from

# Options of the command line that have another name than the field.
OPTION_NAMES = {"num_inference_steps": "steps", "use_resolution_binning": "resolution_binning"}


@dataclass(frozen=True)
class SamplingOptions:
    """The choices. Where the default is OWN or None it is the sampler's; sampling/README.md tells which takes what.

    Attributes:
        sampler: a name of sampling.SAMPLERS.
        num_inference_steps: steps of its table.
        guidance_scale: 1 or less draws without guidance, in half the time.
        guidance_rescale: 0 ... 1, how far guided noise is brought back to the conditional one's standard deviation.
        pag_scale: of perturbed-attention guidance, which goes with guidance or without; 0 is none.
        pag_adaptive_scale: by how much pag_scale falls with every timestep from 1000 down; 0 keeps it.
        pag_layers: numbers of the blocks whose self-attention is perturbed, from 0: a text such as "14" or "3,13-15", a
            number or several; None is the middle block.
        solver_order: 1, 2 or 3.
        eta: how much noise a stochastic sampler adds; 0 is none.
        spacing: of the timesteps: "leading", "trailing" or "linspace".
        karras: space the noise levels as Karras et al. do.
        timesteps: falling, one a step, instead of the sampler's own.
        sigmas: falling noise levels sigma / alpha, one a step and that of the end, instead of the sampler's own.
        guided_channels: guide only so many of the latents' channels.
        height, width: pixels; None is the model's base resolution.
        use_resolution_binning: draw at the nearest size that the model was trained at, then resize and crop.
        clean_caption: strip web debris (links, markup, file names) from the prompts, as diffusers does by default.
        max_sequence_length: prompts are cut there, with a warning.
        guidance_halves: compute guidance's two halves one after the other, in half the memory.
        guidance_interval: guide only in this part of the way from noise (0) to image (1); approximate.
        text_reuse: from this part of the way on repeat the outputs of cross-attention; approximate, 1 is never.
        block_reuse: run the middle half of the blocks at every n-th step only; approximate, 1 is every step.
        strength: of drawing from an image: above 0 and at most 1, the part of the steps that is run, the last ones; as
            in diffusers int(steps * strength) of them. None is 0.6, with a mask 1.
        image_fit: how an image meets the size that is drawn: "crop" or "pad".
        image_latents: what the VAE's encoder makes of an image: "mode", its mean, or "sample", with noise from the seed
            of what is drawn.
        paste: with a mask, leave every pixel of the image that the mask keeps as it is.
        control_scale: weight of what a ControlNet adds: a number for all of them, or one for each; 0 is none.
        control_start, control_end: the part of the way from noise (0) to image (1) in which it acts; likewise.
        guess_mode: control the conditional half of guidance alone, the first blocks weakly.

    Raises:
        MindSigmaError: a value that no model could take.
    """

    sampler: str = "dpm"
    num_inference_steps: int = OWN
    guidance_scale: float = OWN
    guidance_rescale: float = 0.0
    pag_scale: float = 0.0
    pag_adaptive_scale: float = 0.0
    pag_layers: Optional[Tuple[int, ...]] = None
    solver_order: Optional[int] = None
    eta: Optional[float] = None
    spacing: Optional[str] = None
    karras: Optional[bool] = None
    timesteps: Optional[Tuple[float, ...]] = None
    sigmas: Optional[Tuple[float, ...]] = None
    guided_channels: Optional[int] = None
    height: Optional[int] = None
    width: Optional[int] = None
    use_resolution_binning: bool = True
    clean_caption: bool = False
    max_sequence_length: int = 300
    guidance_halves: bool = False
    guidance_interval: Tuple[float, float] = (0.0, 1.0)
    text_reuse: float = 1.0
    block_reuse: int = 1
    strength: Optional[float] = None
    image_fit: str = "crop"
    image_latents: str = "mode"
    paste: bool = True
    control_scale: Tuple[float, ...] = (1.0,)
    control_start: Tuple[float, ...] = (0.0,)
    control_end: Tuple[float, ...] = (1.0,)
    guess_mode: bool = False

    def __post_init__(self):
        # Not above: a parser needs no NumPy.
        from mindsigma.arguments import flag, fraction, is_number, number, numbers, one_of, shown, whole

        def keep(name, value):
            object.__setattr__(self, name, value)

        for name in ("timesteps", "sigmas"):
            if getattr(self, name) is not None:
                keep(name, numbers(name, getattr(self, name)))
        if self.karras is not None:
            keep("karras", flag("karras", self.karras))
        sampler = self.solver("diffusers")
        if self.guidance_scale is OWN:
            keep("guidance_scale", sampler.guidance)
        if self.num_inference_steps is OWN:
            keep("num_inference_steps", sampler.steps)
        keep("guidance_scale", number("guidance_scale", self.guidance_scale))
        keep("guidance_rescale", fraction("guidance_rescale", self.guidance_rescale))
        self._check_pag(keep)
        if self.guidance_rescale and not self.guided and not self.perturbed:
            raise MindSigmaError("guidance_rescale needs guidance, a guidance_scale above 1")
        keep("num_inference_steps", whole("num_inference_steps", self.num_inference_steps))
        keep("max_sequence_length", whole("max_sequence_length", self.max_sequence_length))
        for name in ("use_resolution_binning", "clean_caption", "guidance_halves", "paste", "guess_mode"):
            keep(name, flag(name, getattr(self, name)))
        one_of("image_fit", self.image_fit, FITS)
        one_of("image_latents", self.image_latents, ("mode", "sample"))
        if self.strength is not None and not (is_number(self.strength) and 0 < self.strength <= 1):
            raise MindSigmaError(f"strength must be a number above 0 and at most 1, not {shown(self.strength)}")
        self._check_controls(keep)
        sampler.table(self.num_inference_steps)
        self.shortcuts.plan(self.num_inference_steps, self.guided, perturbed=self.perturbed)

    def _check_pag(self, keep):
        from mindsigma.arguments import number, shown

        for name in ("pag_scale", "pag_adaptive_scale"):
            keep(name, number(name, getattr(self, name)))
            if getattr(self, name) < 0:
                raise MindSigmaError(f"{name} must be at least 0, not {shown(getattr(self, name))}")
        layers = self.pag_layers
        if layers is not None:
            given = layers if isinstance(layers, (list, tuple, range)) else [layers]
            try:
                layers = layer_numbers(layers) if isinstance(layers, str) else tuple(map(index, given))
            except (TypeError, ValueError):
                layers = ()
            if not layers or min(layers) < 0 or any(isinstance(layer, bool) for layer in given):
                raise MindSigmaError(
                    f"pag_layers must be numbers of blocks, as in 14 or 3,13-15, not {shown(self.pag_layers)}"
                )
            keep("pag_layers", layers)
        if not self.perturbed and (layers is not None or self.pag_adaptive_scale):
            raise MindSigmaError("pag_layers and pag_adaptive_scale need a pag_scale above 0 (--pag-scale 3)")

    def _check_controls(self, keep):
        from mindsigma.arguments import is_number, numbers

        for name in CONTROL_NUMBERS:
            value = getattr(self, name)
            keep(name, numbers(name, (value,) if is_number(value) else value))
        starts, ends = self.control_start, self.control_end
        count = max(len(starts), len(ends))
        if min(len(starts), len(ends)) not in (1, count):
            raise MindSigmaError(f"{len(starts)} values of control_start and {len(ends)} of control_end")
        for start, end in zip(*(values * count if len(values) == 1 else values for values in (starts, ends))):
            if not 0 <= start < end <= 1:
                raise MindSigmaError(f"control_start and control_end must be 0 <= start < end <= 1, not {start} {end}")

    def of_controls(self, count):
        """list of (scale, start, end) for each of `count` ControlNets; raises MindSigmaError for another number."""
        columns = []
        for name in CONTROL_NUMBERS:
            values = getattr(self, name)
            if count == 0 and values != getattr(SamplingOptions, name):
                raise MindSigmaError(f"{name} is of a ControlNet: open the model with one (--controlnet)")
            if len(values) not in (1, count):
                raise MindSigmaError(
                    f"{len(values)} values of {name} for {count} ControlNets; give one, or one for each"
                )
            columns.append(values * count if len(values) == 1 else values)
        if count == 0 and self.guess_mode:
            raise MindSigmaError("guess_mode is of a ControlNet: open the model with one (--controlnet)")
        return list(zip(*columns))

    @property
    def guided(self):
        """Whether there is guidance by an unconditional half."""
        return self.guidance_scale > 1

    @property
    def perturbed(self):
        """Whether there is guidance by perturbed attention."""
        return self.pag_scale > 0

    def pag(self, depth):
        """PerturbedAttention for a DiT of `depth` blocks, or None. Raises MindSigmaError for blocks that it lacks."""
        if not self.perturbed:
            return None
        from mindsigma.sampling.perturbed import PerturbedAttention, chosen_layers

        return PerturbedAttention(chosen_layers(self.pag_layers, depth), self.pag_scale, self.pag_adaptive_scale)

    def first_step(self, sampler, image, mask):
        """Index of the first step that is run of a Sampler's table; None for a whole trajectory, from noise alone.

        Args:
            image, mask: whether something is drawn from an image, and under a mask.

        Raises:
            MindSigmaError: a strength without an image, or one that leaves no step, or none that is to be guided.
        """
        if not image:
            if self.strength is not None:
                raise MindSigmaError("strength is of drawing from an image: give an image, or no strength")
            return None
        steps = len(sampler.table(self.num_inference_steps))
        strength = self.strength_of(mask)
        run = min(int(steps * strength), steps)
        if run < 1:
            raise MindSigmaError(
                f"strength {strength:g} of {steps} steps makes no step; take more steps, or a strength of at least "
                f"{1 / steps:.3g}"
            )
        self.shortcuts.plan(run, self.guided, steps - run, self.perturbed)
        return None if mask and run == steps else steps - run

    def strength_of(self, mask):
        """The strength, or its default; mask: whether there is one."""
        return (1.0 if mask else 0.6) if self.strength is None else self.strength

    @property
    def shortcuts(self):
        """Shortcuts."""
        from mindsigma.sampling.shortcuts import Shortcuts

        interval = self.guidance_interval
        return Shortcuts(tuple(interval) if isinstance(interval, list) else interval, self.text_reuse, self.block_reuse)

    def solver(self, convention):
        """The Sampler, in a pipeline's convention."""
        return sampler_class(self.sampler).of_options(self, convention)

    @classmethod
    def of_call(cls, values):
        """From keyword arguments of a call; raises TypeError for one that is unknown, as Python does."""
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise TypeError(f"unknown argument {name!r}; sampling takes {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def of_arguments(cls, args, own=None, **changes):
        """From the namespace of a parser with `add_arguments`.

        Args:
            own: fields that the model tells of itself, beside which those of the namespace win; see with_own.
            changes: win over both.
        """
        names = {field.name: OPTION_NAMES.get(field.name, field.name) for field in fields(cls)}
        values = {name: getattr(args, option) for name, option in names.items() if hasattr(args, option)}
        values["guidance_interval"] = tuple(values["guidance_interval"])
        values = {name: value for name, value in values.items() if value is not None}
        return cls(**{**(with_own(own, values) if own else values), **changes})

    def as_arguments(self):
        """dict of keyword arguments that make the same."""
        return asdict(self)

    def image_metadata(self, mask):
        """dict for a picture that was drawn from an image; mask: whether there was one."""
        told = {"strength": self.strength_of(mask), "image_fit": self.image_fit, "image_latents": self.image_latents}
        return {**told, "paste": self.paste} if mask else told

    def control_metadata(self):
        """dict for a picture that a ControlNet had a part in."""
        told = {name: " ".join(f"{value:g}" for value in getattr(self, name)) for name in CONTROL_NUMBERS}
        return {**told, "guess_mode": self.guess_mode}

    def metadata(self):
        """dict of texts and numbers for a picture; of a sampler's own options and of speed-ups those that were set."""
        told = {
            "sampler": self.sampler,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            **{name: getattr(self, name) for name in PAG_OPTIONS if self.perturbed and getattr(self, name)},
            **{name: getattr(self, name) for name in SAMPLER_OPTIONS if getattr(self, name) is not None},
            "clean_caption": self.clean_caption,
            "max_sequence_length": self.max_sequence_length,
        }
        for name in ("guidance_rescale", "guidance_interval", "text_reuse", "block_reuse"):
            value = getattr(self, name)
            if value != getattr(SamplingOptions, name):
                told[name] = value
        return {name: " ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in told.items()}


def with_own(own, given):
    """Fields of SamplingOptions: those given, over a model's own where its sampler is asked for, or none is.

    Args:
        own: dict, of weights/own_sampling.py, with a "sampler". given: dict.
    """
    if given.get("sampler", own["sampler"]) != own["sampler"]:
        return given
    if given.get("timesteps") is not None:  # they tell the number of steps
        own = {name: value for name, value in own.items() if name != "num_inference_steps"}
    return {**own, **given}


def add_control_arguments(parser):
    """Add the options of ControlNets to a parser; each may be repeated, once for each --controlnet."""
    add = parser.add_argument
    add("--control-image", action="append", metavar="FILE", help="picture that --controlnet takes; repeatable")
    add("--control-scale", action="append", type=float, metavar="SCALE", help="weight of --controlnet; default 1")
    add(
        "--control-start",
        action="append",
        type=float,
        metavar="FRACTION",
        help="where on the way from noise (0) to image (1) it begins to act; default 0",
    )
    add("--control-end", action="append", type=float, metavar="FRACTION", help="where it ends to act; default 1")
    add(
        "--guess-mode",
        action=argparse.BooleanOptionalAction,
        default=SamplingOptions.guess_mode,
        help="control the conditional half of guidance alone, the first blocks weakly: for few words or none",
    )


def add_arguments(parser):
    """Add the options of SamplingOptions to a parser, each under its field's name."""
    add, default = parser.add_argument, SamplingOptions  # the class holds the defaults; an instance imports MindSpore
    flag = argparse.BooleanOptionalAction
    add("--height", type=int, help="pixels; default the model's base resolution")
    add("--width", type=int, help="pixels; default the model's base resolution")
    add(
        "--resolution-binning",
        action=flag,
        default=default.use_resolution_binning,
        help="draw at the nearest size that the model was trained at, then resize",
    )
    add("--sampler", choices=tuple(SAMPLERS), help="how to go from noise to the image; default dpm, or the model's own")
    add(
        "--steps",
        type=int,
        help="denoising steps; default the sampler's own",
    )
    add(
        "--guidance-scale",
        type=float,
        help="weight of the prompt; 1 draws without guidance; default the sampler's own",
    )
    add(
        "--guidance-rescale",
        type=float,
        default=default.guidance_rescale,
        metavar="FRACTION",
        help="bring guided noise back to the deviation of the unguided one; 0 leaves it as it is",
    )
    add("--pag-scale", type=float, default=default.pag_scale, help="weight of perturbed-attention guidance; 0 is none")
    add(
        "--pag-layers",
        type=str,  # said aloud, so that a number in a config file is one, too
        metavar="LAYERS",
        help="blocks whose self-attention it perturbs, from 0, as in 14 or 3,13-15; default the middle one",
    )
    add(
        "--pag-adaptive-scale",
        type=float,
        default=default.pag_adaptive_scale,
        metavar="FALL",
        help="by how much its weight falls with every timestep from 1000 down",
    )
    add(
        "--guidance-halves",
        action=flag,
        default=default.guidance_halves,
        help="compute guidance's two halves one after the other, in half the memory",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=list(default.guidance_interval),
        metavar=("BEGIN", "END"),
        help="guide only in this part of the way from noise (0) to image (1): approximate, half the work outside",
    )
    add(
        "--text-reuse",
        type=float,
        default=default.text_reuse,
        metavar="FRACTION",
        help="from there on repeat the outputs of cross-attention; approximate, 1 is never",
    )
    add(
        "--block-reuse",
        type=int,
        default=default.block_reuse,
        metavar="N",
        help="run the middle half of the blocks at every N-th step only; approximate, 1 is every step",
    )
    add("--solver-order", type=int, choices=(1, 2, 3), help="of sampler dpm; default 2")
    add("--eta", type=float, help="noise that samplers ddim and sa add at their steps; 0 is none")
    add("--spacing", choices=("leading", "trailing", "linspace"), help="of the timesteps")
    add("--karras", action=flag, help="space the noise levels as Karras et al. do")
    add("--timesteps", type=float, nargs="+", metavar="T", help="instead of the sampler's own; falling, one a step")
    add("--sigmas", type=float, nargs="+", metavar="S", help="noise levels instead; falling, the last is the end's")
    add("--guided-channels", type=int, metavar="N", help="guide only the first N channels of the latents")
    add(
        "--strength",
        type=float,
        help="part of the steps that is run when drawing from --image, the last ones; default 0.6, with --mask 1",
    )
    add(
        "--image-fit",
        choices=FITS,
        default=default.image_fit,
        help="cut off what of --image does not fit the size that is drawn, or fill up with its edges",
    )
    add(
        "--image-latents",
        choices=("mode", "sample"),
        default=default.image_latents,
        help="begin with the mean that the VAE gives of --image, or with a sample, from the seed",
    )
    add(
        "--paste",
        action=flag,
        default=default.paste,
        help="with --mask, leave the pixels that it keeps as they are; the picture then has the size of --image",
    )
    add("--clean-caption", action=flag, default=default.clean_caption, help="strip web debris from the prompts")
    add("--max-sequence-length", type=int, default=default.max_sequence_length, help="longest prompt, in tokens")

"""How an image is drawn, as one value: what the call, the command line, warm-up, validation and the PNG all share."""

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Optional, Tuple

from mindsigma.sampling import SAMPLERS, sampler_class

# Options of the command line that have another name than the field.
OPTION_NAMES = {"num_inference_steps": "steps", "use_resolution_binning": "resolution_binning"}


@dataclass(frozen=True)
class SamplingOptions:
    """The choices.

    Attributes:
        sampler: a name of sampling.SAMPLERS.
        num_inference_steps: steps of its table.
        guidance_scale: 1 or less draws without guidance, in half the time.
        solver_order: of sampler "dpm", 1, 2 or 3.
        height, width: pixels; None is the model's base resolution.
        use_resolution_binning: draw at the nearest size that the model was trained at, then resize and crop.
        clean_caption: strip web debris (links, markup, file names) from the prompts, as diffusers does by default.
        max_sequence_length: prompts are cut there, with a warning.
        guidance_halves: compute guidance's two halves one after the other, in half the memory.
        guidance_interval: guide only in this part of the way from noise (0) to image (1); approximate.
        text_reuse: from this part of the way on repeat the outputs of cross-attention; approximate, 1 is never.
        block_reuse: run the middle half of the blocks at every n-th step only; approximate, 1 is every step.

    Raises:
        MindSigmaError: a value that no model could take.
    """

    sampler: str = "dpm"
    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    solver_order: int = 2
    height: Optional[int] = None
    width: Optional[int] = None
    use_resolution_binning: bool = True
    clean_caption: bool = False
    max_sequence_length: int = 300
    guidance_halves: bool = False
    guidance_interval: Tuple[float, float] = (0.0, 1.0)
    text_reuse: float = 1.0
    block_reuse: int = 1

    def __post_init__(self):
        from mindsigma.arguments import flag, number, whole  # not above: a parser needs no NumPy

        def keep(name, value):
            object.__setattr__(self, name, value)

        keep("guidance_scale", number("guidance_scale", self.guidance_scale))
        keep("num_inference_steps", whole("num_inference_steps", self.num_inference_steps))
        keep("max_sequence_length", whole("max_sequence_length", self.max_sequence_length))
        for name in ("use_resolution_binning", "clean_caption", "guidance_halves"):
            keep(name, flag(name, getattr(self, name)))
        self.solver("diffusers").table(self.num_inference_steps)
        self.shortcuts.plan(self.num_inference_steps, self.guided)

    @property
    def guided(self):
        """Whether there is guidance."""
        return self.guidance_scale > 1

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
    def of_arguments(cls, args, **changes):
        """From the namespace of a parser with `add_arguments`; `changes` win."""
        values = {field.name: getattr(args, OPTION_NAMES.get(field.name, field.name)) for field in fields(cls)}
        values["guidance_interval"] = tuple(values["guidance_interval"])
        return cls(**{**values, **changes})

    def as_arguments(self):
        """dict of keyword arguments that make the same."""
        return asdict(self)

    def metadata(self):
        """dict of texts and numbers for a picture; approximate speed-ups where they are on."""
        told = {
            "sampler": self.sampler,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "solver_order": self.solver_order,
            "clean_caption": self.clean_caption,
            "max_sequence_length": self.max_sequence_length,
        }
        defaults = SamplingOptions()
        for name in ("guidance_interval", "text_reuse", "block_reuse"):
            value = getattr(self, name)
            if value != getattr(defaults, name):
                told[name] = " ".join(map(str, value)) if isinstance(value, tuple) else value
        return told


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
    add("--sampler", choices=tuple(SAMPLERS), default=default.sampler, help="how to go from noise to the image")
    add(
        "--steps",
        type=int,
        default=default.num_inference_steps,
        help="denoising steps",
    )
    add(
        "--guidance-scale",
        type=float,
        default=default.guidance_scale,
        help="weight of the prompt; 1 draws without guidance",
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
    add("--solver-order", type=int, choices=(1, 2, 3), default=default.solver_order, help="order of sampler dpm")
    add("--clean-caption", action=flag, default=default.clean_caption, help="strip web debris from the prompts")
    add("--max-sequence-length", type=int, default=default.max_sequence_length, help="longest prompt, in tokens")

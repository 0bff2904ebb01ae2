"""Compiling ahead of time: draws that are thrown away, of the shapes that will be asked for."""

import re
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.pipeline.text import bucket_length
from mindsigma.sampling.captions import Caption
from mindsigma.sampling.shortcuts import Shortcuts


@dataclass(frozen=True)
class Shape:
    """What decides which graphs a picture needs: height and width in pixels, images at once, tokens of the captions."""

    height: int
    width: int
    batch: int = 1
    tokens: int = 300

    @classmethod
    def parse(cls, text, tokens):
        """Build from HEIGHTxWIDTH[:BATCH[:TOKENS]]; `tokens` where the text tells none."""
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})(?::(\d{1,5})(?::(\d{1,5}))?)?", text)
        numbers = [] if match is None else [int(number) for number in match.groups() if number is not None]
        if not numbers or 0 in numbers:
            raise MindSigmaError(f"--warm-up {text!r}: expected HEIGHTxWIDTH[:BATCH[:TOKENS]], as in 1024x1024:1:64")
        return cls(*numbers) if len(numbers) == 4 else cls(*numbers, *(1,) * (3 - len(numbers)), tokens)


def warm_up(pipeline, shape, options=None, image=False, mask=False):
    """Compile the graphs of the DiT and of the VAE's decoder that drawing images of a Shape needs.

    Captions are padded to the bucket of the shape's tokens, as those of prompts are. T5 is not run: its graph follows
    from the prompts.

    Args:
        options: SamplingOptions, of which the size does not count.
        image, mask: whether images will be drawn from others, and under masks.

    Returns:
        number of graphs that were compiled.
    """
    options = options or pipeline.sampling_options()
    before = compiled_graphs()
    size = pipeline.image_size(shape.height, shape.width, options.use_resolution_binning)
    tokens = bucket_length(shape.tokens, options.max_sequence_length)
    states = np.zeros((shape.batch, tokens, pipeline.dit.config.caption_channels), np.float32)
    caption = Caption(Tensor(states), Tensor(np.ones((shape.batch, tokens), np.int32)))
    negative = Caption(caption.states[:1], caption.mask[:1]) if options.guided else None
    seeds = list(range(shape.batch))
    noise, fresh_noise = pipeline.start_noise(seeds, *size), partial(pipeline.fresh_noise, seeds)
    clean = pipeline.encode(np.zeros((1, 3, *size), np.float32)) if image else None
    latent_mask = np.ones((1, 1, *noise.shape[2:]), np.float32) if mask else None
    controls = pipeline.blank_controls(options, size)
    trajectory = pipeline.denoise(noise, caption, negative, options, fresh_noise, clean, latent_mask, controls)
    # The first step is like all, but for what acts in a part of them, which needs a whole trajectory.
    alike = options.shortcuts == Shortcuts() and options.pag_adaptive_scale == 0
    alike = alike and all((one.start, one.end) == (0, 1) for one in controls)
    steps = 1 if alike else options.num_inference_steps
    for step in islice(trajectory, 1, 1 + steps):  # the first item is the caption's keys and values
        latents = step.latents
    pipeline.decode(latents)
    return compiled_graphs() - before

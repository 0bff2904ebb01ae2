"""Compiling ahead of time: draws that are thrown away, of the shapes that will be asked for."""

import re
from dataclasses import dataclass

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.phases import compiled_graphs
from mindsigma.pipeline.text import bucket_length


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


def warm_up(pipeline, shape, max_sequence_length=300, **options):
    """Compile the graphs of the DiT and of the VAE's decoder that drawing images of a Shape needs.

    Captions are padded to the bucket of the shape's tokens, as those of prompts are. T5 is not run: its graph follows
    from the prompts.

    Args:
        options: of the pipeline's call that choose other graphs: guidance_scale, use_resolution_binning, solver_order.

    Returns:
        number of graphs that were compiled.
    """
    before = compiled_graphs()
    tokens = bucket_length(shape.tokens, max_sequence_length)
    states = np.zeros((shape.batch, tokens, pipeline.dit.config.caption_channels), np.float32)
    mask = np.ones((shape.batch, tokens), np.int32)
    negative = {}
    if options.get("guidance_scale", 4.5) > 1:
        negative = {"negative_prompt_embeds": states[:1], "negative_prompt_mask": mask[:1]}
    pipeline(
        prompt_embeds=states,
        prompt_mask=mask,
        **negative,
        height=shape.height,
        width=shape.width,
        num_inference_steps=1,
        seed=0,
        output_type="np",
        max_sequence_length=max_sequence_length,
        progress=False,
        **options,
    )
    return compiled_graphs() - before

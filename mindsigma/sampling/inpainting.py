"""Inpainting with a network that knows nothing of it: after every step what is to stay is set to the given image.

Every sampler can be told to (the method of RePaint, arXiv 2201.09865, without its repetitions, as diffusers has it).
"""

from dataclasses import replace

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.sampling.sampler import Sampler


class Inpainting(Sampler):
    """Another sampler, with what the mask keeps of its latents replaced after each step by the image's own.

    These are as noisy as the next row's latents, always with the same noise, and clean after the last step. The inner
    sampler's history is left alone. Image, noise and mask are the last of the history, so that a step is one graph.

    Args:
        sampler: Sampler.
        clean: latents of the image, scaled, (1 or N, c, h, w).
        noise: standard normal (N, c, h, w), that of the start.
        mask: (1 or N, 1, h, w), 1 where the image is drawn anew and 0 where it is kept.
    """

    def __init__(self, sampler, clean, noise, mask):
        super().__init__()
        self.sampler = sampler
        self.kept, self.draws, self.first_draw = sampler.kept + 3, sampler.draws, sampler.first_draw
        self.learned_variance, self.guided_channels = sampler.learned_variance, sampler.guided_channels
        self._given = tuple(np.broadcast_to(array, noise.shape).astype(np.float32) for array in (clean, noise, mask))

    @property
    def graph(self):
        """See Sampler."""
        return Inpainting, self.sampler.graph

    def start_scale(self, rows):
        """See Sampler."""
        return self.sampler.start_scale(rows)

    def table(self, num_steps, begin=0):
        """Rows of the sampler; after the numbers of each the scales of image and noise in the latents after it."""
        rows = self.sampler.table(num_steps, begin)
        after = [(row.alpha, row.sigma) for row in rows[1:]] + [(1.0, 0.0)]
        return [replace(row, numbers=(*row.numbers, *scales)) for row, scales in zip(rows, after)]

    def start_history(self, shape):
        """See Sampler."""
        return self.sampler.start_history(shape) + tuple(Tensor(array, ms.float32) for array in self._given)

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """One step, arguments and results of Sampler.construct."""
        given = history[-3:]
        latents, history = self.sampler(latents, history[:-3], numbers[:-2], noise, variance, fresh)
        clean, start, mask = given
        known = numbers[-2] * clean + numbers[-1] * start
        return (1.0 - mask) * known + mask * latents, history + given

    def clean(self, row, before, after, history, fresh=None):
        """See Sampler; what the mask keeps is the image."""
        image, _, mask = history[-3:]
        row = replace(row, numbers=row.numbers[:-2])
        return (1.0 - mask) * image + mask * self.sampler.clean(row, before, after, history[:-3], fresh)

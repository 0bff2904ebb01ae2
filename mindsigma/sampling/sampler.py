"""What a sampler is: a table made before sampling starts, and one step on the device that takes a row of it."""

from dataclasses import dataclass
from typing import Tuple

import mindspore as ms
from mindspore import nn, ops


@dataclass(frozen=True)
class Row:
    """One step of a table: what the model is told, in training steps (fractions are kept), and the step's numbers."""

    timestep: float
    numbers: Tuple[float, ...]


class Sampler(nn.Cell):
    """One step of a sampler, a part of the graph of a denoising step.

    Attributes:
        kept: latents that a step keeps for later ones, zero at the start.
        draws: whether a step takes fresh standard normal noise.
        learned_variance: whether a step takes what the network predicts besides the noise.
    """

    kept = 0
    draws = False
    learned_variance = False

    def __init__(self):
        super().__init__(auto_prefix=False)

    @classmethod
    def of_options(cls, options, convention):
        """From SamplingOptions, in a pipeline's convention. Raises MindSigmaError for options that it does not take."""
        raise NotImplementedError

    def table(self, num_steps):
        """List of `num_steps` Row, computed in float64. Raises MindSigmaError for steps that it cannot make."""
        raise NotImplementedError

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """Advance the latents by one step.

        Args:
            latents: (N, c, h, w) fp32.
            history: tuple of `kept` (N, c, h, w) fp32, the newest first.
            numbers: of the step's Row: an fp32 tensor in a graph, else the numbers themselves.
            noise: (N, c, h, w) fp32, predicted, after guidance.
            variance: what the network predicts besides, (N, c, h, w) in its dtype, if `learned_variance`, else None.
            fresh: standard normal (N, c, h, w) fp32, if the sampler `draws`.

        Returns:
            latents and history after the step.
        """
        raise NotImplementedError


class LinearMultistep(Sampler):
    """Samplers whose step is a linear combination of the latents and of predictions of the clean latents.

    x0 = (latents - sigma * noise) / alpha, then latents = keep * latents + sum(weights * x0 history) + std * fresh.
    The numbers are alpha, sigma, keep, the weights (one more than `kept`, the newest first) and, if it `draws`, std.
    """

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """One step, arguments and results of Sampler.construct; history: earlier predictions of the clean latents."""
        x0 = (latents - numbers[1] * noise) / numbers[0]
        latents = numbers[2] * latents + numbers[3] * x0
        for i in range(self.kept):
            latents = latents + numbers[4 + i] * history[i]
        if self.draws:
            latents = latents + numbers[4 + self.kept] * fresh
        return latents, ((x0,) + history)[: self.kept]


def no_history(sampler, shape):
    """History before the first step, for latents of a shape."""
    return tuple(ops.zeros(shape, ms.float32) for _ in range(sampler.kept))

"""A sampler that draws noise at every step and keeps its last latents, as an author writes one; its end is known."""

from mindsigma.sampling.sampler import Row, Sampler


class Walk(Sampler):
    """Latents plus half of those of the step before and fresh noise, times the order; the prediction counts nothing.

    So the end is known from the noise alone, `walked`, and every part of a step has to come to its place.
    """

    takes = ("solver_order",)
    kept = 1
    draws = True
    learned_variance = True

    def __init__(self, solver_order=2, convention="diffusers"):
        super().__init__()
        self.order = solver_order

    def table(self, num_steps, begin=0):
        numbers = (0.5, float(self.order), 0.0)
        return [Row(999.0 - 900.0 * i / num_steps, numbers, 0.6, 0.8) for i in range(begin, num_steps)]

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        change = numbers[0] * history[0] + numbers[1] * fresh + numbers[2] * (noise + variance.astype(noise.dtype))
        return latents + change, (latents,)


def walked(start, fresh, order):
    """The latents after as many steps as there are arrays of fresh noise."""
    before, latents = 0.0 * start, start
    for one in fresh:
        before, latents = latents, latents + 0.5 * before + order * one
    return latents

"""The official ancestral sampler: DDPM on fewer steps (arXiv 2102.09672), with the network's own variance."""

import mindspore as ms
import numpy as np
from mindspore import ops

from mindsigma.arguments import whole
from mindsigma.sampling.grids import checked_timesteps, spaced_officially
from mindsigma.sampling.sampler import Row, Sampler
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS, alphas_cumprod


class IDDPM(Sampler):
    """Improved DDPM.

    The numbers are alpha, sigma, the weights of latents and predicted clean latents in the posterior's mean, the bounds
    of its log variance, and 1, or 0 in the last step, for the noise.

    Args:
        timesteps: falling whole timesteps instead of the official respacing.
        guided_channels: default 3 in convention official, whose guidance leaves the fourth alone, else all.
        convention: the steps are the same in both.
    """

    takes = ("timesteps", "guided_channels")
    steps = 100
    draws = True
    learned_variance = True
    kept = 1  # the prediction of the clean latents; no step needs it

    def __init__(self, timesteps=None, guided_channels=None, convention="diffusers"):
        super().__init__(convention, timesteps=checked_timesteps(timesteps))
        self.guide_channels(guided_channels)

    def table(self, num_steps, begin=0):
        """See Sampler."""
        num_steps = whole("num_inference_steps of sampler iddpm", self.checked_steps(num_steps), 2, NUM_TRAIN_STEPS)
        timesteps = np.asarray(self.timesteps or spaced_officially(num_steps, "linspace")).astype(np.int64)[::-1]
        products = alphas_cumprod()[timesteps]  # rising time: the betas of the kept steps follow from them
        before = np.append(1.0, products[:-1])
        betas = 1.0 - products / before
        variances = betas * (1.0 - before) / (1.0 - products)
        lows = np.log(np.append(variances[1], variances[1:]))  # the first is 0
        keeps = (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - products)
        weights = betas * np.sqrt(before) / (1.0 - products)
        rows = []
        for i in range(num_steps - 1 - begin, -1, -1):
            alpha, sigma = np.sqrt(products[i]), np.sqrt(1.0 - products[i])
            numbers = alpha, sigma, keeps[i], weights[i], lows[i], np.log(betas[i]), i > 0
            rows.append(Row(float(timesteps[i]), tuple(map(float, numbers)), float(alpha), float(sigma), i > 0))
        return rows

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """One step, arguments and results of Sampler.construct."""
        alpha, sigma, keep, weight, low, high, noisy = numbers
        x0 = (latents - sigma * noise) / alpha
        place = 0.5 * variance.astype(ms.float32) + 0.5  # between the bounds, not clipped
        std = ops.exp(0.5 * (low + place * (high - low)))
        return keep * latents + weight * x0 + noisy * std * fresh, (x0,)

    def clean(self, row, before, after, history, fresh=None):
        """See Sampler."""
        return history[0]

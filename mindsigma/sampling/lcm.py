"""Sampling of latent consistency models (arXiv 2310.04378): to clean latents at every step, then back with noise."""

import numpy as np

from mindsigma.arguments import whole
from mindsigma.sampling.grids import at_timesteps, checked_timesteps
from mindsigma.sampling.sampler import LinearMultistep

TRAINED = 19 + 20 * np.arange(50)[::-1]  # the timesteps of its training: 999, 979, ..., 19
SIGMA_DATA = 0.5
TIME_SCALE = 10.0


class LCM(LinearMultistep):
    """Multistep consistency sampling.

    Args:
        timesteps: falling whole timesteps instead of the convention's choice from the 50 of training.
        convention: "diffusers": evenly spread over all 50; "official": every (50 // steps)-th.
    """

    takes = ("timesteps",)
    steps = 4
    guidance = 1.0  # it was distilled with guidance
    draws = True

    def __init__(self, timesteps=None, convention="diffusers"):
        super().__init__(convention, timesteps=checked_timesteps(timesteps))

    def table(self, num_steps, begin=0):
        """See Sampler; the last step adds no noise."""
        grid, rows = at_timesteps(self._timesteps(self.checked_steps(num_steps))), []
        for i in range(begin, num_steps):
            skip, out = boundary_scales(grid.timesteps[i])
            alpha, sigma = grid.alphas[i + 1], grid.sigmas[i + 1]
            row = alpha * skip, (alpha * out,), sigma
            rows.append(self.row(grid.timesteps[i], grid.alphas[i], grid.sigmas[i], *row))
        return rows

    def _timesteps(self, num_steps):
        if self.timesteps is not None:
            return self.timesteps
        whole("num_inference_steps of sampler lcm", num_steps, 1, len(TRAINED))
        if self.convention == "official":
            return TRAINED[:: len(TRAINED) // num_steps][:num_steps]
        return TRAINED[np.floor(np.linspace(0, len(TRAINED), num_steps, endpoint=False)).astype(np.int64)]


def boundary_scales(timestep):
    """Weights of the latents and of the predicted clean ones in the consistency function, which is exact at 0."""
    scaled = TIME_SCALE * float(timestep)
    total = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, scaled / np.sqrt(total)

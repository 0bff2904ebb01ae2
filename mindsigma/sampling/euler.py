"""Euler's method of Karras et al. (arXiv 2206.00364) on diffusers' grids.

They keep the latents as clean + level * noise. Here they are divided by sqrt(1 + level²), which the network wants to
see, and then a step of Euler is one of DDIM.
"""

from mindsigma.arguments import one_of
from mindsigma.sampling.ddim import FirstOrder
from mindsigma.sampling.grids import (
    SPACINGS,
    at_fractions,
    at_levels,
    checked_levels,
    checked_timesteps,
    karras_levels,
    linspace,
    spaced,
)


class Euler(FirstOrder):
    """Euler.

    Args:
        spacing: of the timesteps: "linspace" (default; fractions from 999 to 0), "trailing" or "leading".
        karras: space the noise levels as Karras et al. do.
        timesteps: falling timesteps instead, which may be fractions.
        sigmas: falling noise levels instead, and that of the end.
        convention: the sampler is the same in both.
    """

    takes = ("spacing", "karras", "timesteps", "sigmas")

    def __init__(self, spacing=None, karras=None, timesteps=None, sigmas=None, convention="diffusers"):
        timesteps, sigmas = checked_timesteps(timesteps, whole=False), checked_levels(sigmas)
        super().__init__(convention, spacing=spacing, karras=karras, timesteps=timesteps, sigmas=sigmas)
        self.spacing = "linspace" if spacing is None else one_of("spacing", spacing, SPACINGS)

    def grid(self, num_steps):
        """See FirstOrder."""
        if self.karras or self.sigmas is not None:
            return at_levels(karras_levels(num_steps) if self.karras else self.sigmas)
        if self.timesteps is not None:
            return at_fractions(self.timesteps)
        return at_fractions(linspace(num_steps) if self.spacing == "linspace" else spaced(num_steps, self.spacing))

    def start_scale(self, rows):
        """diffusers starts from noise times the first level, but for spacing leading, where it adds the signal's 1."""
        return 1.0 if self.spacing == "leading" else rows[0].sigma

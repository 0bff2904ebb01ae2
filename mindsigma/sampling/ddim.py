"""DDIM (arXiv 2010.02502): predict the clean latents and the noise, and mix them anew for the next level."""

import numpy as np

from mindsigma.arguments import fraction, one_of
from mindsigma.sampling.grids import SPACINGS, at_timesteps, checked_timesteps, spaced, spaced_officially
from mindsigma.sampling.sampler import LinearMultistep


class FirstOrder(LinearMultistep):
    """Samplers of DDIM's step on a grid of their own.

    Attributes:
        eta: 0: no fresh noise; 1: as much as the ancestral sampler of DDPM adds.
    """

    eta = 0.0

    def grid(self, num_steps):
        """Grid of so many steps."""
        raise NotImplementedError

    def table(self, num_steps, begin=0):
        """See Sampler."""
        grid = self.grid(self.checked_steps(num_steps))
        scales = list(zip(grid.alphas, grid.sigmas))
        return [
            self.row(grid.timesteps[i], *scales[i], *mixing(*scales[i], *scales[i + 1], self.eta))
            for i in range(begin, num_steps)
        ]


def mixing(alpha, sigma, next_alpha, next_sigma, eta=0.0):
    """keep, weights and std of a step between two levels: arXiv 2010.02502, equations 12 and 16."""
    std = eta * next_sigma / sigma * np.sqrt(max(0.0, 1.0 - (alpha / next_alpha) ** 2))
    keep = np.sqrt(max(0.0, next_sigma**2 - std**2)) / sigma
    return keep, (next_alpha - keep * alpha,), std


class DDIM(FirstOrder):
    """DDIM.

    Args:
        eta: 0 ... 1; default 0.
        spacing: of the timesteps. Convention diffusers: "trailing" (default), "leading", "linspace"; official:
            "linspace" (default), its respacing "N", and "leading", its "ddimN".
        timesteps: falling whole timesteps instead.
        guided_channels: default 3 in convention official, whose guidance leaves the fourth alone, else all.
        convention: "diffusers" or "official".
    """

    takes = ("eta", "spacing", "timesteps", "guided_channels")

    def __init__(self, eta=None, spacing=None, timesteps=None, guided_channels=None, convention="diffusers"):
        super().__init__(convention, spacing=spacing, timesteps=checked_timesteps(timesteps))
        self.eta = 0.0 if eta is None else fraction("eta", eta)
        self.draws = self.eta > 0
        self.guide_channels(guided_channels)
        known = SPACINGS if convention == "diffusers" else ("leading", "linspace")
        default = "trailing" if convention == "diffusers" else "linspace"
        what = f"spacing of sampler ddim in convention {convention}"
        self.spacing = default if spacing is None else one_of(what, spacing, known)

    def grid(self, num_steps):
        """See FirstOrder."""
        if self.timesteps is not None:
            return at_timesteps(self.timesteps)
        return at_timesteps((spaced if self.convention == "diffusers" else spaced_officially)(num_steps, self.spacing))

"""DPM-Solver++ (multistep, arXiv 2211.01095) as a table of numbers.

With the noise schedule fixed, every step of the solver is a linear combination of the latents and of the last few
predictions of the clean latents. The two conventions differ in the table alone: diffusers' time grid and end, or those
of the official code (models/README.md, "Sampling").
"""

import numpy as np

from mindsigma.arguments import whole
from mindsigma.sampling.grids import checked_levels, checked_timesteps, continuous, solver_grid
from mindsigma.sampling.sampler import LinearMultistep
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS

MAX_ORDER = 3


class DPMSolver(LinearMultistep):
    """DPM-Solver++.

    Args:
        solver_order: 1, 2 (default) or 3.
        karras: space the noise levels as Karras et al. do; in convention diffusers, as the next two.
        timesteps: falling whole timesteps instead.
        sigmas: falling noise levels instead, and that of the end.
        convention: "diffusers": integer timesteps, the last step goes to a clean image at first order; "official":
            times uniform in [1/1000, 1], the last step ends at 1/1000, the order falls towards the end.
    """

    takes = ("solver_order", "karras", "timesteps", "sigmas")
    kept = MAX_ORDER - 1  # whatever the order, so that all orders share what is compiled

    def __init__(self, solver_order=None, convention="diffusers", karras=None, timesteps=None, sigmas=None):
        timesteps, sigmas = checked_timesteps(timesteps), checked_levels(sigmas)
        super().__init__(convention, karras=karras, timesteps=timesteps, sigmas=sigmas)
        self.only_of_diffusers(karras=karras or None, timesteps=timesteps, sigmas=sigmas)
        self.order = 2 if solver_order is None else whole("solver_order", solver_order, 1, MAX_ORDER)

    def grid(self, num_steps):
        """Grid of so many steps."""
        if self.convention == "official":
            return continuous(num_steps)
        return solver_grid(num_steps, self.karras, self.timesteps, self.sigmas)

    def table(self, num_steps, begin=0):
        """See Sampler; the order starts at 1."""
        num_steps = self.checked_steps(num_steps, NUM_TRAIN_STEPS - 1)
        grid = self.grid(num_steps)
        alphas, sigmas = grid.alphas, grid.sigmas
        with np.errstate(divide="ignore"):
            lambdas = np.log(alphas) - np.log(sigmas)  # half log-SNR; infinite at a clean image
        rows = []
        for i in range(begin, num_steps):
            order = min(i - begin + 1, _step_order(num_steps - i, num_steps, self.order, self.convention))
            weights = _step_weights(alphas[i + 1], lambdas, i, order)
            rows.append(self.row(grid.timesteps[i], alphas[i], sigmas[i], sigmas[i + 1] / sigmas[i], weights))
        return rows


def _step_order(remaining, num_steps, order, convention):
    """Order of a step with so many remaining, this one counted: it falls at the end as the convention has it."""
    if convention == "official" or num_steps < 15:
        return min(order, remaining)
    return 1 if remaining == 1 else order


def _step_weights(alpha_next, lambdas, i, order):
    """Weights of the x0 predictions of steps i, i - 1, i - 2 in the step to i + 1."""
    h = lambdas[i + 1] - lambdas[i]
    phi_1 = np.expm1(-h)  # -1 for the step to a clean image
    if order == 1:
        return (float(-alpha_next * phi_1),)
    r0 = (lambdas[i] - lambdas[i - 1]) / h
    if order == 2:
        second = -0.5 * alpha_next * phi_1 / r0
        return float(-alpha_next * phi_1 + second), float(-second)
    r1 = (lambdas[i - 1] - lambdas[i - 2]) / h
    phi_2 = phi_1 / h + 1.0
    phi_3 = phi_2 / h - 0.5
    # First and second divided differences of x0 as combinations of (newest, previous, oldest).
    d1_new = np.array([1.0, -1.0, 0.0]) / r0
    d1_old = np.array([0.0, 1.0, -1.0]) / r1
    d1 = d1_new + r0 / (r0 + r1) * (d1_new - d1_old)
    d2 = (d1_new - d1_old) / (r0 + r1)
    weights = alpha_next * (-phi_1 * np.array([1.0, 0.0, 0.0]) + phi_2 * d1 - phi_3 * d2)
    return tuple(float(weight) for weight in weights)

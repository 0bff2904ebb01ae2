"""UniPC (arXiv 2302.04867) of order 2 in its form B2(h), as diffusers has it: one call of the network a step."""

import numpy as np

from mindsigma.sampling.grids import checked_levels, checked_timesteps, solver_grid
from mindsigma.sampling.sampler import PredictorCorrector
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS


class UniPC(PredictorCorrector):
    """UniPC with prediction of the clean latents.

    Args:
        karras: space the noise levels as Karras et al. do.
        timesteps: falling whole timesteps instead.
        sigmas: falling noise levels instead, and that of the end.
        convention: the sampler is the same in both.
    """

    takes = ("karras", "timesteps", "sigmas")
    kept = 3

    def __init__(self, karras=None, timesteps=None, sigmas=None, convention="diffusers"):
        timesteps, sigmas = checked_timesteps(timesteps), checked_levels(sigmas)
        super().__init__(convention, karras=karras, timesteps=timesteps, sigmas=sigmas)

    def table(self, num_steps, begin=0):
        """See Sampler; the first step and the last one are of order 1."""
        num_steps = self.checked_steps(num_steps, NUM_TRAIN_STEPS - 1)
        grid = solver_grid(num_steps, self.karras, self.timesteps, self.sigmas)
        with np.errstate(divide="ignore"):
            lambdas = np.log(grid.alphas) - np.log(grid.sigmas)  # infinite at a clean image
        rows, corrector = [], None
        for i in range(begin, num_steps):
            first = i == begin or i + 1 == num_steps
            weights = interval_weights(grid.alphas[i + 1], lambdas[i:], None if first else lambdas[i - 1])
            part = grid.sigmas[i + 1] / grid.sigmas[i], 0.0
            rows.append(self.row(grid.timesteps[i], grid.alphas[i], grid.sigmas[i], corrector, part, weights[0]))
            corrector = weights[1]
        return rows


def interval_weights(alpha, lambdas, before=None):
    """Weights of the predictor, at the begin and before it, and of the corrector, at the end, the begin and before it.

    Args:
        alpha: scale of the signal at the end.
        lambdas: half log-SNR of begin and end.
        before: that of the prediction before; None: there is none.
    """
    h = lambdas[1] - lambdas[0]
    phi_1 = -np.expm1(-h)
    if before is None:
        return (alpha * phi_1,), (0.5 * alpha * phi_1, 0.5 * alpha * phi_1)
    ratio = (before - lambdas[0]) / h  # where the earlier prediction lies, in lengths of the interval
    phi_2 = phi_1 / h - 1.0
    b = np.array([-phi_2, 2.0 * (phi_2 / h + 0.5)]) / phi_1
    old, new = np.linalg.solve([[1.0, 1.0], [ratio, 1.0]], b)
    old, predicted = old / ratio, 0.5 / ratio  # of differences to the prediction at the begin
    weights = [[1.0 - predicted, predicted], [new, 1.0 - new - old, old]]
    return tuple(tuple(alpha * phi_1 * np.array(one)) for one in weights)

"""SA-Solver (arXiv 2309.05019): a stochastic Adams predictor and corrector, one call of the network a step.

Predictor and corrector of an interval use the same noise. Their weights are integrals over the log-SNR l, counted from
the interval's end, of e^(k l) times the polynomial that is 1 at one prediction and 0 at the others; k = 1 + eta².
"""

import numpy as np

from mindsigma.arguments import is_number, shown
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.grids import at_timesteps, checked_timesteps, continuous, solver_timesteps
from mindsigma.sampling.sampler import PredictorCorrector
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS

LARGEST_ETA = 2.0
NOISY_TIMES = (0.2, 0.8)  # noise is added in this part of the time alone


class SASolver(PredictorCorrector):
    """SA-Solver with predictor and corrector of order 2 and prediction of the clean latents.

    Args:
        eta: of the noise; 0 solves the probability flow; default 1.
        timesteps: falling whole timesteps instead, in convention diffusers.
        convention: "diffusers": whole timesteps, noise in intervals that begin within NOISY_TIMES; "official":
            fractions, noise in those that end there. Both end at timestep 0.
    """

    takes = ("eta", "timesteps")
    steps = 25
    kept = 2

    def __init__(self, eta=None, timesteps=None, convention="diffusers"):
        super().__init__(convention, timesteps=checked_timesteps(timesteps))
        self.only_of_diffusers(timesteps=timesteps)
        if timesteps is not None and self.timesteps[-1] == 0:
            raise MindSigmaError("timesteps of sampler sa must end above 0, where its last step goes to")
        if eta is not None and not (is_number(eta) and 0 <= eta <= LARGEST_ETA):
            raise MindSigmaError(f"eta of sampler sa must be a number of 0 ... {LARGEST_ETA:g}, not {shown(eta)}")
        self.eta = 1.0 if eta is None else float(eta)
        self.draws = self.eta > 0
        self.first_draw = 1 if convention == "official" else 0  # the official code's first draw is not used

    def table(self, num_steps, begin=0):
        """See Sampler; the first step corrects nothing and predicts at order 1, and so does the last one."""
        num_steps = self.checked_steps(num_steps, NUM_TRAIN_STEPS - 1)
        if self.convention == "official":
            grid, times = continuous(num_steps), np.linspace(1.0, 1.0 / NUM_TRAIN_STEPS, num_steps + 1)[1:]
        else:
            grid = at_timesteps(self.timesteps or solver_timesteps(num_steps), ends_clean=False)
            times = grid.timesteps / NUM_TRAIN_STEPS
        noisy = (NOISY_TIMES[0] <= times) & (times <= NOISY_TIMES[1])
        lambdas = np.log(grid.alphas / grid.sigmas)
        rows, corrector = [], None
        for i in range(begin, num_steps):
            interval = Interval(lambdas[i], lambdas[i + 1], grid.alphas[i + 1], self.eta if noisy[i] else 0.0)
            first = i == begin or i + 1 == num_steps
            predictor = interval.predictor(None if first else lambdas[i - 1])
            part = interval.decay * grid.sigmas[i + 1] / grid.sigmas[i], interval.spread * grid.sigmas[i + 1]
            rows.append(self.row(grid.timesteps[i], grid.alphas[i], grid.sigmas[i], corrector, part, predictor))
            corrector = interval.corrector()
        return rows


class Interval:
    """Weights of one interval of log-SNR from `begin` to `end`, where `alpha` is the end's scale of the signal."""

    def __init__(self, begin, end, alpha, eta):
        self.begin, self.alpha = begin, alpha
        self.h, self.k = end - begin, 1.0 + eta**2
        self.decay = np.exp(-(eta**2) * self.h)
        self.spread = np.sqrt(-np.expm1(-2.0 * eta**2 * self.h))

    def predictor(self, before=None):
        """Weights of the predictions at the begin and at the log-SNR `before` it; None: there is none."""
        if before is None:
            return (self.alpha * -np.expm1(-self.k * self.h),)
        step = self.begin - before
        return self._weights(-self.h, -self.h - step, (self.h**2 / 2 - self._second()) / step)

    def corrector(self):
        """Weights of the predictions at the end and at the begin."""
        return self._weights(0.0, -self.h, self.h / 2 - self._second() / self.h)

    def _weights(self, new, old, few_steps):
        """Of predictions at two places, counted from the end; `few_steps`: the authors' term of third order."""
        k, h, factor = self.k, self.h, self.alpha * self.k
        area, slope = -np.expm1(-k * h) / k, (np.exp(-k * h) * (k * h + 1.0) - 1.0) / k**2  # integrals of 1 and of l
        first, second = (slope - old * area) / (new - old), (slope - new * area) / (old - new)
        return factor * (first + few_steps), factor * (second - few_steps)

    def _second(self):
        return (self.k * self.h - 1.0 + np.exp(-self.k * self.h)) / self.k**2

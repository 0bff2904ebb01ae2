"""DPM-Solver++ (multistep, arXiv 2211.01095) as a table of numbers.

With the noise schedule fixed, every step of the solver is a linear combination of the latents and of the last few
predictions of the clean latents. The two conventions differ in the table alone: diffusers' time grid and end, or those
of the official code (models/README.md, "Sampling").
"""

import numpy as np

from mindsigma.arguments import whole
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.sampler import LinearMultistep
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS, alphas_cumprod, log_alpha

CONVENTIONS = ("diffusers", "official")
MAX_ORDER = 3


class DPMSolver(LinearMultistep):
    """DPM-Solver++.

    Args:
        solver_order: 1, 2 or 3.
        convention: "diffusers": integer timesteps, the last step goes to a clean image at first order; "official":
            times uniform in [1/1000, 1], the last step ends at 1/1000, the order falls towards the end.
    """

    takes = ("solver_order",)
    kept = MAX_ORDER - 1  # whatever the order, so that all orders share what is compiled

    def __init__(self, solver_order=None, convention="diffusers"):
        super().__init__()
        solver_order = 2 if solver_order is None else whole("solver_order", solver_order, 1, MAX_ORDER)
        if convention not in CONVENTIONS:
            raise MindSigmaError(f"convention must be one of {', '.join(CONVENTIONS)}, not {convention!r}")
        self.order, self.convention = solver_order, convention

    def table(self, num_steps, begin=0):
        """See Sampler; the order starts at 1."""
        num_steps = whole("num_inference_steps", num_steps, 1, NUM_TRAIN_STEPS - 1)
        grid = _diffusers_grid if self.convention == "diffusers" else _official_grid
        timesteps, alphas, sigmas = grid(num_steps)
        with np.errstate(divide="ignore"):
            lambdas = np.log(alphas) - np.log(sigmas)  # half log-SNR; infinite at a clean image
        rows = []
        for i in range(begin, num_steps):
            order = min(i - begin + 1, _step_order(num_steps - i, num_steps, self.order, self.convention))
            weights = _step_weights(alphas[i + 1], lambdas, i, order)
            rows.append(self.row(timesteps[i], alphas[i], sigmas[i], sigmas[i + 1] / sigmas[i], weights))
        return rows


def _diffusers_grid(num_steps):
    timesteps = np.round(np.linspace(0, NUM_TRAIN_STEPS - 1, num_steps + 1))[::-1][:-1].astype(np.int64)
    products = np.append(alphas_cumprod()[timesteps], 1.0)
    return timesteps, np.sqrt(products), np.sqrt(1.0 - products)


def _official_grid(num_steps):
    times = np.linspace(1.0, 1.0 / NUM_TRAIN_STEPS, num_steps + 1)
    alphas = np.exp(log_alpha(times))
    timesteps = (times[:-1] - 1.0 / NUM_TRAIN_STEPS) * NUM_TRAIN_STEPS
    return timesteps, alphas, np.sqrt(1.0 - alphas**2)


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

"""DPM-Solver++ (multistep, arXiv 2211.01095) as a table of numbers.

With the noise schedule fixed, every step of the solver is a linear combination of the latents and of the last few
predictions of the clean latents. The table holds its coefficients, computed in float64 before sampling starts; what
runs on the device is multiply and add. The two conventions differ in the table alone (reference.md 2.10).
"""

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from mindsigma.diffusion.schedule import NUM_TRAIN_STEPS, alphas_cumprod, log_alpha
from mindsigma.errors import MindSigmaError

CONVENTIONS = ("diffusers", "official")
MAX_ORDER = 3


@dataclass(frozen=True)
class SolverStep:
    """One step: x0 = (latents - sigma * noise) / alpha, then latents = keep * latents + sum(weights * x0 history).

    Attributes:
        timestep: what the model is told, in training steps; fractional in the official convention.
        alpha, sigma: scales of signal and noise before the step.
        keep: weight of the latents.
        weights: weights of the predictions of x0, the newest first; their number is the order of the step.
    """

    timestep: float
    alpha: float
    sigma: float
    keep: float
    weights: Tuple[float, ...]


def solver_table(num_steps, order=2, convention="diffusers"):
    """Return the list of `num_steps` SolverStep.

    Args:
        num_steps: at least 1.
        order: 1, 2 or 3.
        convention: "diffusers": integer timesteps, the last step goes to a clean image at first order; "official":
            times uniform in [1/1000, 1], the last step ends at 1/1000, the order falls towards the end.
    """
    if not isinstance(num_steps, (int, np.integer)) or num_steps < 1:
        raise MindSigmaError(f"num_inference_steps must be a whole number of at least 1, not {num_steps!r}")
    if num_steps >= NUM_TRAIN_STEPS:
        raise MindSigmaError(f"num_inference_steps must be below {NUM_TRAIN_STEPS}, not {num_steps}")
    if order not in (1, 2, 3):
        raise MindSigmaError(f"solver_order must be 1, 2 or 3, not {order!r}")
    if convention not in CONVENTIONS:
        raise MindSigmaError(f"convention must be one of {', '.join(CONVENTIONS)}, not {convention!r}")
    grid = _diffusers_grid if convention == "diffusers" else _official_grid
    timesteps, alphas, sigmas = grid(num_steps)
    with np.errstate(divide="ignore"):
        lambdas = np.log(alphas) - np.log(sigmas)  # half log-SNR; infinite at a clean image
    steps = []
    for i in range(num_steps):
        weights = _step_weights(alphas[i + 1], lambdas, i, _step_order(i, num_steps, order, convention))
        keep = sigmas[i + 1] / sigmas[i]
        steps.append(SolverStep(float(timesteps[i]), float(alphas[i]), float(sigmas[i]), float(keep), weights))
    return steps


def _diffusers_grid(num_steps):
    timesteps = np.round(np.linspace(0, NUM_TRAIN_STEPS - 1, num_steps + 1))[::-1][:-1].astype(np.int64)
    products = np.append(alphas_cumprod()[timesteps], 1.0)
    return timesteps, np.sqrt(products), np.sqrt(1.0 - products)


def _official_grid(num_steps):
    times = np.linspace(1.0, 1.0 / NUM_TRAIN_STEPS, num_steps + 1)
    alphas = np.exp(log_alpha(times))
    timesteps = (times[:-1] - 1.0 / NUM_TRAIN_STEPS) * NUM_TRAIN_STEPS
    return timesteps, alphas, np.sqrt(1.0 - alphas**2)


def _step_order(i, num_steps, order, convention):
    """Order of step i: limited by the history, and towards the end of the trajectory as the convention has it."""
    order = min(order, i + 1)
    remaining = num_steps - i
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

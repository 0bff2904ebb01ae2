"""PixArt-Σ's training loss: squared error of the noise plus a variance bound (arXiv 2102.09672).

All coefficients that depend on the timestep alone are rows of float64 tables; a graph gets them as columns (N, 1, 1, 1)
in fp32 and does no indexing.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from mindspore import ops

from mindsigma.choices import WEIGHTINGS
from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import filled, mean, split
from mindsigma.sampling.schedule import alphas_cumprod
from mindsigma.training.objective import Objective, noise_part

SNR_SWITCH = 249  # above it the snr variant compares noise, up to it clean latents

# Columns of `coefficients`, in this order.
COLUMNS = (
    "signal",  # sqrt(alphas_cumprod)
    "noise",  # sqrt(1 - alphas_cumprod)
    "mean_x0",  # posterior mean: weight of the clean latents
    "mean_xt",  # posterior mean: weight of the noisy latents
    "min_log",  # posterior_log_variance_clipped
    "max_log",  # log(beta)
    "weight",  # of the squared error
    "compare_noise",  # 1: compare noise, 0: clean latents
    "first",  # 1 at t = 0, where the bound is a discretised likelihood
    "sample",  # of the sample, squared error and bound
)


@dataclass(frozen=True)
class LossConfig:
    """Variants of the loss.

    Attributes:
        learn_sigma: the network predicts a variance too, trained by the bound.
        snr: compare clean latents instead of noise up to timestep 249 (the official `snr_loss`).
        weighting: "none", or "min-snr": squared errors of noise weighted by min(snr, gamma) / snr (arXiv 2303.09556).
        gamma: of min-snr.
    """

    learn_sigma: bool = True
    snr: bool = False
    weighting: str = "none"
    gamma: float = 5.0

    def __post_init__(self):
        if self.weighting not in WEIGHTINGS:
            raise MindSigmaError(f"loss weighting must be one of {', '.join(WEIGHTINGS)}, not {self.weighting!r}")
        if self.weighting == "min-snr" and self.snr:
            raise MindSigmaError("the snr loss has no min-snr weighting: choose one of the two")
        if not self.gamma > 0:
            raise MindSigmaError(f"gamma of min-snr must be positive, not {self.gamma!r}")


class Denoising(Objective):
    """The loss of a DiT that predicts the noise in noisy latents, and their variance.

    Args:
        dit: DiT in training mode.
        bound: whether the variance is trained, too; None: if the network predicts one.
    """

    terms = ("mse", "bound")

    def __init__(self, dit, bound=None):
        super().__init__(dit)
        self.bound = dit.config.learn_sigma if bound is None else bound

    def construct(self, clean, noise, numbers, timestep, states, mask, image_size=None, aspect_ratio=None):
        """Squared error and bound of a micro-batch.

        Args:
            clean, noise: (N, c, h, w) fp32, scaled latents and standard normal noise.
            numbers: fp32 (N, len(COLUMNS)), for the timesteps.
            timestep: fp32 (N,), 0 ... 999.
            states, mask: caption (N, L, d) and (N, L).
            image_size, aspect_ratio: micro conditions, or None.
        """
        noisy = noisy_latents(clean, noise, numbers)
        output = self.dit(noisy, timestep, states, mask, image_size, aspect_ratio)
        return self.terms_of(output, clean, noisy, noise, numbers)

    def terms_of(self, output, clean, noisy, noise, numbers):
        """Squared error and bound of what the network gives, (N, c or 2 c, h, w), for the noisy latents."""
        if not self.bound:
            output = noise_part(output, clean)
        mse, bound = diffusion_loss(output, clean, noisy, noise, numbers, self.bound)
        return mean(mse), mean(bound)


@lru_cache(maxsize=8)
def coefficient_table(config):
    """float64 (1000, len(COLUMNS)) for a LossConfig."""
    products = alphas_cumprod()
    previous = np.append(1.0, products[:-1])
    alphas = products / previous
    betas = 1.0 - alphas
    posterior = betas * (1.0 - previous) / (1.0 - products)
    snr = products / (1.0 - products)
    steps = np.arange(len(products))
    columns = {
        "signal": np.sqrt(products),
        "noise": np.sqrt(1.0 - products),
        "mean_x0": betas * np.sqrt(previous) / (1.0 - products),
        "mean_xt": (1.0 - previous) * np.sqrt(alphas) / (1.0 - products),
        "min_log": np.log(np.append(posterior[1], posterior[1:])),
        "max_log": np.log(betas),
        "weight": np.minimum(snr, config.gamma) / snr if config.weighting == "min-snr" else np.ones_like(snr),
        "compare_noise": (steps > SNR_SWITCH) | (not config.snr),
        "first": steps == 0,
        "sample": np.ones_like(snr),
    }
    return np.stack([np.asarray(columns[name], np.float64) for name in COLUMNS], 1)


def coefficients(timestep, config, weight=1.0):
    """float32 (N, len(COLUMNS)) for integer timesteps (N,); `weight`: of the samples, a number or (N,)."""
    table = coefficient_table(config)[np.asarray(timestep)].astype(np.float32)
    table[:, COLUMNS.index("sample")] = weight
    return table


def noisy_latents(clean, noise, numbers):
    """Latents (N, c, h, w) at the timesteps of `numbers`, the result of `coefficients`."""
    columns = split(numbers, len(COLUMNS), 1)
    return _column(columns, "signal") * clean + _column(columns, "noise") * noise


def diffusion_loss(output, clean, noisy, noise, numbers, learn_sigma):
    """Loss of each sample.

    Args:
        output: (N, c or 2 c, h, w), the network's: noise and, with learn_sigma, the place of the variance in [-1, 1].
        clean, noisy, noise: (N, c, h, w) fp32; noisy from `noisy_latents`.
        numbers: fp32 (N, len(COLUMNS)).

    Returns:
        mse and bound, both fp32 (N,), the bound in bits and zero without learn_sigma; the loss is their sum.
    """
    columns = split(numbers, len(COLUMNS), 1)
    output = output.astype(clean.dtype)
    epsilon, place = split(output, 2, 1) if learn_sigma else (output, None)
    signal, sigma = _column(columns, "signal"), _column(columns, "noise")
    compare = _column(columns, "compare_noise")
    predicted_clean = (noisy - sigma * epsilon) / signal
    error = compare * (noise - epsilon) + (1.0 - compare) * (clean - predicted_clean)
    sample = _column(columns, "sample").reshape(-1)
    mse = _mean_of_rest(error * error) * _column(columns, "weight").reshape(-1) * sample
    if not learn_sigma:
        return mse, ops.zeros_like(mse)

    # The bound trains the variance alone: the mean is a constant for it.
    predicted_clean = ops.stop_gradient(predicted_clean)
    mean_x0, mean_xt = _column(columns, "mean_x0"), _column(columns, "mean_xt")
    true_mean = mean_x0 * clean + mean_xt * noisy
    predicted_mean = mean_x0 * predicted_clean + mean_xt * noisy
    low, high = _column(columns, "min_log"), _column(columns, "max_log")
    place = (place + 1.0) * 0.5
    log_variance = place * high + (1.0 - place) * low
    difference = true_mean - predicted_mean
    divergence = 0.5 * (
        log_variance - low - 1.0 + ops.exp(low - log_variance) + difference * difference * ops.exp(-log_variance)
    )
    first = _column(columns, "first")
    # Where the likelihood is not used its inputs are replaced, so that no gradient passes through saturated tails.
    likelihood = _discretised_log_likelihood(clean, predicted_mean, 0.5 * log_variance * first)
    bound = first * -likelihood + (1.0 - first) * divergence
    return mse, _mean_of_rest(bound) * sample * (1.0 / np.log(2.0))


def _column(columns, name):
    """One of `numbers`' columns (N, 1), as (N, 1, 1, 1)."""
    return columns[COLUMNS.index(name)].reshape(-1, 1, 1, 1)


def _mean_of_rest(x):
    return mean(x.reshape(x.shape[0], -1), 1)


def _discretised_log_likelihood(x, mean, log_scale):
    """log likelihood of x, taken as 256 levels in [-1, 1], under a Gaussian."""
    inverse = ops.exp(-log_scale)
    centred = x - mean
    upper = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    inside = ops.log(_at_least(upper - lower))
    below, above = ops.log(_at_least(upper)), ops.log(_at_least(1.0 - lower))
    return ops.select(x < -0.999, below, ops.select(x > 0.999, above, inside))


def _at_least(x):
    return ops.maximum(x, filled((1,), 1e-12, x.dtype))


def _normal_cdf(x):
    """The tanh approximation of the official code: 0.5 (1 + tanh(u)).

    In the tails 1 + tanh(u) is a few units of fp32's last place, and the logarithm of the difference of two such
    numbers depends on how they are rounded: 1 - 2 e / (1 + e), e = exp(-2 |u|), rounds as an exact tanh would.
    """
    u = (2.0 / np.pi) ** 0.5 * (x + 0.044715 * x * x * x)
    e = ops.exp(-2.0 * ops.abs(u))
    tanh = ops.sign(u) * (1.0 - 2.0 * e / (1.0 + e))
    return 0.5 * (1.0 + tanh)

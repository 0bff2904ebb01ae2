"""The levels of noise at which a trajectory asks the network, as diffusers and the official code space them.

All in float64. Timesteps are those of training, 0 ... 999. A noise level is sigma / alpha. At level s the latents hold
1 / sqrt(1 + s²) of the clean ones and s / sqrt(1 + s²) of noise.
"""

from dataclasses import dataclass

import numpy as np

from mindsigma.arguments import numbers
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS, alphas_cumprod, log_alpha

LAST = NUM_TRAIN_STEPS - 1
KARRAS_RHO = 7.0  # arXiv 2206.00364
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Grid:
    """timesteps (N,), and alphas and sigmas (N + 1,): scales of signal and noise there and at the end."""

    timesteps: np.ndarray
    alphas: np.ndarray
    sigmas: np.ndarray


def at_timesteps(timesteps, ends_clean=True):
    """Grid of falling whole timesteps; the end is a clean image, or timestep 0."""
    timesteps = np.asarray(timesteps)
    products = np.append(alphas_cumprod()[timesteps.astype(np.int64)], 1.0 if ends_clean else alphas_cumprod()[0])
    return Grid(timesteps, np.sqrt(products), np.sqrt(1.0 - products))


def at_levels(levels, timesteps=None, whole=False):
    """Grid of falling noise levels (N + 1,), that of the end included.

    The timesteps are those given, or interpolated between the logarithms of the levels of training, and then rounded if
    they are to be `whole`.
    """
    levels = np.asarray(levels, np.float64)
    if timesteps is None:
        timesteps = np.interp(np.log(levels[:-1]), np.log(training_levels()), np.arange(NUM_TRAIN_STEPS))
        timesteps = np.round(timesteps) if whole else timesteps
    alphas = 1.0 / np.sqrt(1.0 + levels**2)
    return Grid(np.asarray(timesteps), alphas, levels * alphas)


def at_fractions(timesteps):
    """Grid of falling timesteps that may be fractions, where the level is interpolated; the end is a clean image."""
    levels = np.interp(timesteps, np.arange(NUM_TRAIN_STEPS), training_levels())
    return at_levels(np.append(levels, 0.0), timesteps)


def training_levels():
    """Noise levels of the timesteps 0 ... 999."""
    return np.sqrt(1.0 / alphas_cumprod() - 1.0)


def karras_levels(num_steps):
    """`num_steps` noise levels from that of timestep 999 to that of timestep 0, and 0 for the end."""
    ends = training_levels()[[LAST, 0]] ** (1 / KARRAS_RHO)
    return np.append((ends[0] + np.linspace(0, 1, num_steps) * (ends[1] - ends[0])) ** KARRAS_RHO, 0.0)


def spaced(num_steps, spacing):
    """Falling whole timesteps as diffusers spaces them (table 2 of arXiv 2305.08891)."""
    steps = np.arange(num_steps)
    if spacing == "leading":
        return steps[::-1] * (NUM_TRAIN_STEPS // num_steps)
    if spacing == "trailing":
        return np.round(NUM_TRAIN_STEPS - steps * (NUM_TRAIN_STEPS / num_steps)).astype(np.int64) - 1
    return np.round(linspace(num_steps)).astype(np.int64)


def linspace(num_steps):
    """Falling timesteps from 999 to 0, not rounded."""
    return np.linspace(0, LAST, num_steps)[::-1] if num_steps > 1 else np.array([float(LAST)])


def spaced_officially(num_steps, spacing):
    """Falling whole timesteps as the official code's respacing has them: "ddimN" is leading, "N" is linspace.

    Raises MindSigmaError for steps that no whole stride makes.
    """
    if spacing == "leading":
        stride = next((i for i in range(1, NUM_TRAIN_STEPS + 1) if -(-NUM_TRAIN_STEPS // i) <= num_steps), 1)
        steps = np.arange(0, NUM_TRAIN_STEPS, stride)[::-1]
        if len(steps) != num_steps:
            raise MindSigmaError(
                f"num_inference_steps {num_steps}: no whole stride makes so many steps, as spacing leading needs it in "
                f"convention official; take {len(steps)}"
            )
        return steps
    if num_steps == 1:
        return np.array([LAST])
    strides = np.cumsum(np.full(num_steps - 1, LAST / (num_steps - 1)))  # added up one by one, as it is done there
    return np.round(np.append(0.0, strides)).astype(np.int64)[::-1]


def solver_timesteps(num_steps):
    """Falling whole timesteps of diffusers' multistep solvers: one more of spacing linspace, without the last."""
    return np.round(linspace(num_steps + 1)).astype(np.int64)[:-1]


def solver_grid(num_steps, karras=None, timesteps=None, sigmas=None):
    """Grid of diffusers' multistep solvers, of whole timesteps: their own, or what was chosen instead."""
    if karras or sigmas is not None:
        return at_levels(karras_levels(num_steps) if karras else sigmas, whole=True)
    return at_timesteps(solver_timesteps(num_steps) if timesteps is None else timesteps)


def continuous(num_steps):
    """Grid of the official solvers: times uniform from 1 to 1/1000, which is the end; fractions of timesteps."""
    times = np.linspace(1.0, 1.0 / NUM_TRAIN_STEPS, num_steps + 1)
    alphas = np.exp(log_alpha(times))
    return Grid((times[:-1] - 1.0 / NUM_TRAIN_STEPS) * NUM_TRAIN_STEPS, alphas, np.sqrt(1.0 - alphas**2))


def checked_timesteps(timesteps, whole=True):
    """A tuple of the caller's timesteps, if they fall strictly within 0 ... 999, or None."""
    if timesteps is None:
        return None
    timesteps = numbers("timesteps", timesteps)
    falling("timesteps", timesteps)
    if timesteps[0] > LAST or timesteps[-1] < 0:
        raise MindSigmaError(f"timesteps must lie within 0 ... {LAST}, not {timesteps[0]:g} ... {timesteps[-1]:g}")
    if whole and any(step % 1 for step in timesteps):
        raise MindSigmaError("timesteps must be whole numbers; fractions are for samplers euler and euler-ancestral")
    return timesteps


def checked_levels(sigmas):
    """A tuple of the caller's noise levels, if they fall strictly to 0 or above, or None."""
    if sigmas is None:
        return None
    sigmas = numbers("sigmas", sigmas)
    falling("sigmas", sigmas)
    most = training_levels()[-1]
    if len(sigmas) < 2 or sigmas[0] > most * 1.0001 or sigmas[-1] < 0:  # rounded to four digits they are still taken
        raise MindSigmaError(
            f"sigmas must be at least two noise levels within 0 ... {most:.2f}, the last one that of the end, which is "
            "0 for a clean image"
        )
    return sigmas


def falling(name, values):
    """Raise MindSigmaError if numbers do not fall strictly."""
    for i in range(1, len(values)):
        if values[i] >= values[i - 1]:
            raise MindSigmaError(f"{name} must fall from one to the next, but {values[i]:g} follows {values[i - 1]:g}")

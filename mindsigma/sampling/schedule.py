"""PixArt-Σ's noise schedule (models/README.md, "Sampling")."""

from functools import lru_cache

import numpy as np

NUM_TRAIN_STEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


@lru_cache(maxsize=1)
def alphas_cumprod():
    """Product of 1 - beta up to each of the 1000 training steps, float64 (1000,), read-only."""
    products = np.cumprod(1.0 - np.linspace(BETA_START, BETA_END, NUM_TRAIN_STEPS, dtype=np.float64))
    products.setflags(write=False)
    return products


def log_alpha(time):
    """log of the signal scale at continuous time in (0, 1], piecewise linear between training steps (DPM-Solver)."""
    grid = np.arange(1, NUM_TRAIN_STEPS + 1, dtype=np.float64) / NUM_TRAIN_STEPS
    return np.interp(time, grid, 0.5 * np.log(alphas_cumprod()))

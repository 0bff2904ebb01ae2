"""Distances of two sets of features by kernels: KID of Inception's features, CMMD of CLIP's."""

import numpy as np

from mindsigma.errors import MindSigmaError

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # of clean-fid
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # of Jayasumana et al. 2024
BLOCK = 2048  # rows of a kernel matrix at once


def kid(one, other, subsets=KID_SUBSETS, subset_size=KID_SUBSET_SIZE, seed=0):
    """Kernel Inception distance: unbiased MMD² under the kernel (x·y / d + 1)³, mean over random subsets.

    Args:
        one, other: features (n, d) and (m, d).
        subsets: how many; each has `subset_size` features of both, or all of the smaller set.

    Returns:
        mean and standard deviation over the subsets.
    """
    one, other = _pair(one, other)
    size = min(len(one), len(other), subset_size)
    random = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = one[random.choice(len(one), size, replace=False)]
        y = other[random.choice(len(other), size, replace=False)]
        values.append(_unbiased(x, y))
    return float(np.mean(values)), float(np.std(values))


def _unbiased(x, y):
    """MMD² of two sets of one size without the terms of a feature with itself."""
    n, d = x.shape

    def kernel(a, b):
        return (a @ b.T / d + 1) ** 3

    within = kernel(x, x) + kernel(y, y)
    return (within.sum() - np.trace(within)) / (n * (n - 1)) - 2 * kernel(x, y).mean()


def cmmd(one, other):
    """CLIP maximum mean discrepancy: 1000 times the biased MMD² of normalised features under a Gaussian of sigma 10.

    Args:
        one, other: CLIP's features (n, d), (m, d), of ViT-L/14@336 in the paper; they are normalised here.
    """
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in _pair(one, other))

    def mean(a, b):
        total = 0.0
        for start in range(0, len(a), BLOCK):
            # |a - b|² = 2 - 2 a·b of unit vectors.
            total += np.exp((a[start : start + BLOCK] @ b.T - 1) / CMMD_SIGMA**2).sum()
        return total / len(a) / len(b)

    return float(CMMD_SCALE * (mean(one, one) + mean(other, other) - 2 * mean(one, other)))


def _pair(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1]:
        raise MindSigmaError(f"features of shapes {one.shape} and {other.shape} cannot be compared")
    if min(len(one), len(other)) < 2:
        raise MindSigmaError(f"{min(len(one), len(other))} images are too few to compare; give at least 2")
    return one, other

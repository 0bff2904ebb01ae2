"""Fréchet distance of two sets of features: running means and covariances, the distance, files of statistics.

FID is this distance of Inception's features (`inception.py`): |m1 - m2|² + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2), with
means m and covariances S (n - 1) in float64.
"""

from dataclasses import dataclass

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.arrays import read_arrays
from mindsigma.weights.formats.atomic import replacing

MOST_FEATURES = 8192  # of a vector; Inception has 2048


@dataclass
class Statistics:
    """Mean (d,) and covariance (d, d) of a set of features, float64; count is 0 where a file does not tell it."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0

    @classmethod
    def of(cls, features):
        """Of an array (n, d)."""
        running = RunningStatistics()
        running.add(features)
        return running.result()


class RunningStatistics:
    """Mean and covariance of features that come in parts, in the memory of one (d, d) matrix.

    Attributes:
        count: number of vectors so far.
        mean: (d,) float64, or None before the first part.
        scatter: (d, d) float64, sum of the outer products of the deviations from the mean.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def add(self, features):
        """Take in an array (n, d), of any n."""
        features = np.asarray(features, np.float64)
        if not len(features):
            return
        if not np.isfinite(features).all():
            raise MindSigmaError("features that are NaN or infinite; check the weights, or use fp32 (--dtype)")
        mean = features.mean(0)
        deviations = features - mean
        self.merge(len(features), mean, deviations.T @ deviations)

    def merge(self, count, mean, scatter):
        """Take in the count, mean and scatter of other vectors (Chan, Golub and LeVeque 1983)."""
        if not count:
            return
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total, step = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total

    def result(self):
        """Statistics. Raises MindSigmaError for fewer than two vectors, which have no covariance."""
        if self.count < 2:
            raise MindSigmaError(f"{self.count} images have no covariance; give at least 2")
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)


def frechet_distance(one, other):
    """Fréchet distance of two Statistics, a float.

    The trace of (S1 S2)^(1/2) is the sum of the singular values of F1 F2', where S = F' F: nothing is lost to the roots
    of rounding errors where a covariance lacks rank, as it does with fewer images than features.
    """
    if one.mean.shape != other.mean.shape:
        raise MindSigmaError(
            f"features of {one.mean.shape[0]} and of {other.mean.shape[0]} numbers cannot be compared; "
            "make both with the same network"
        )
    step = one.mean - other.mean
    root = np.linalg.svd(_factor(one.covariance) @ _factor(other.covariance).T, compute_uv=False).sum()
    return float(step @ step + np.trace(one.covariance) + np.trace(other.covariance) - 2 * root)


def _factor(covariance):
    """F (r, d) with F' F = S, r the rank of a covariance S (d, d)."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def write_statistics(path, statistics, features=None):
    """Write an .npz (Path) that pytorch-fid and clean-fid read: mu and sigma, here with n, and with feats if given."""
    more = {} if features is None else {"feats": features}
    with replacing(path) as file:
        np.savez(file, mu=statistics.mean, sigma=statistics.covariance, n=np.int64(statistics.count), **more)


def read_features(path):
    """Features (n, d) of an .npz of `write_statistics`, or of clean-fid for KID. Raises MindSigmaError."""
    features = read_arrays(path, ("feats",)).get("feats")
    if features is None:
        raise MindSigmaError(f"{path}: holds no features; make it with: evaluate.py statistics --features")
    if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise MindSigmaError(f"{path}: its features are no finite numbers (n, d); make the file again")
    return features


def read_statistics(path):
    """Statistics of an .npz of pytorch-fid, clean-fid or `write_statistics`. Raises MindSigmaError."""
    arrays = read_arrays(path, ("mu", "sigma", "n"))
    if "mu" not in arrays or "sigma" not in arrays:
        raise MindSigmaError(f"{path}: lacks mu and sigma, the mean and covariance of features; give another file")
    mean, covariance = np.atleast_1d(arrays["mu"]), np.atleast_2d(arrays["sigma"])
    size = mean.size
    if mean.shape != (size,) or covariance.shape != (size, size) or not 0 < size <= MOST_FEATURES:
        raise MindSigmaError(f"{path}: mu {mean.shape} and sigma {covariance.shape} are no mean and covariance")
    for name, array in (("mu", mean), ("sigma", covariance)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise MindSigmaError(f"{path}: {name} holds what is no finite number; make the file again")
    count = arrays.get("n", np.int64(0))
    count = int(count) if count.ndim == 0 and count.dtype.kind in "iu" and count >= 0 else 0
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64), count)

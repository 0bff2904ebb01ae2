"""Improved precision and recall (Kynkäänniemi et al. 2019): which pictures lie among the others, by neighbours."""

import numpy as np

from mindsigma.errors import MindSigmaError

NEIGHBOURS = 3
BLOCK = 1024  # rows of distances at once


def precision_recall(generated, real, neighbours=NEIGHBOURS):
    """(precision, recall), 0 ... 1: share of generated features within the real manifold, and the other way round.

    The manifold of a set is the union of the balls around its features that reach to each one's k-th neighbour.

    Args:
        generated, real: features (n, d), (m, d).
    """
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if min(len(generated), len(real)) <= neighbours:
        raise MindSigmaError(f"precision and recall need more than {neighbours} images of either kind")
    return _share_within(generated, real, neighbours), _share_within(real, generated, neighbours)


def _share_within(points, manifold, neighbours):
    radii = np.concatenate(
        # The nearest of all is the feature itself, at 0.
        [np.partition(block, neighbours, axis=1)[:, neighbours] for block in _distances(manifold, manifold)]
    )
    inside = [np.any(block <= radii, axis=1) for block in _distances(points, manifold)]
    return float(np.concatenate(inside).mean())


def _distances(points, others):
    """Squared distances (rows, len(others)), some rows at a time."""
    norms = np.square(others).sum(1)
    for start in range(0, len(points), BLOCK):
        rows = points[start : start + BLOCK]
        yield np.maximum(np.square(rows).sum(1)[:, None] + norms - 2 * rows @ others.T, 0.0)

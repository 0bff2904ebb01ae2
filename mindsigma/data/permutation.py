"""A shuffled range that is computed place by place: nothing is stored, however long it is."""

import numpy as np

from mindsigma.data.randomness import generator

ROUNDS = 8


class Permutation:
    """A permutation of 0 ... count - 1, determined by its key: a Feistel network of keyed hashes.

    The network permutes the smallest power of four that holds the range. What comes to lie outside is permuted again
    until it lies within, which is a permutation of the range (cycle walking; Black and Rogaway, 2002).

    Args:
        count: length of the range, at least 1.
        seed, purpose, number: the key, as those of `generator`.
    """

    def __init__(self, count, seed, purpose, number=0):
        self.count = count
        self._half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))  # bits
        self._mask = (np.uint64(1) << self._half) - np.uint64(1)
        self._keys = generator(seed, purpose, number).integers(0, 2**64, ROUNDS, np.uint64)

    def __call__(self, places):
        """int64 (n,): what stands at the places (n,) of the shuffled range."""
        values = self._once(np.asarray(places, np.uint64))
        outside = np.flatnonzero(values >= self.count)
        while outside.size:
            values[outside] = self._once(values[outside])
            outside = outside[values[outside] >= self.count]
        return values.astype(np.int64)

    def _once(self, values):
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_hashed(right + key) & self._mask)
        return left << self._half | right


def _hashed(values):
    """The finaliser of splitmix64: every bit of the input changes about half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))

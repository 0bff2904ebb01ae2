"""Random numbers of a sample as a function of seed, purpose and draw number: nothing to store, nothing global."""

import hashlib

import numpy as np

from mindsigma.errors import MindSigmaError


def generator(seed, purpose, draw=0):
    """A NumPy generator whose stream is determined by its arguments alone.

    The counter-based Philox is keyed by seed and purpose, and its counter starts at the draw's own block of 2**64
    values; so a run on two ranks draws what a run on one draws, and a resumed run what the uninterrupted one did.

    Args:
        seed: int, 0 to 2**64 - 1.
        purpose: what the numbers are for ("caption", "noise", ...); another purpose is another stream.
        draw: int >= 0, number of the draw (Batch.draws) or of the epoch.
    """
    seed, draw = int(seed), int(draw)
    if not 0 <= seed < 2**64:
        raise MindSigmaError(f"seed must lie in 0 ... 2**64 - 1, not {seed}")
    if draw < 0:
        raise MindSigmaError(f"draw number must be at least 0, not {draw}")
    stream = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    key = np.array([seed, stream], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, draw, 0, 0], np.uint64)))

"""Checks of what a caller may get wrong; each raises MindSigmaError that names the argument."""

import os

import numpy as np

from mindsigma.errors import MindSigmaError


def one_of(name, value, known):
    """Return the value if it is known."""
    if value not in known:
        raise MindSigmaError(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value


def positive(name, value):
    """Check for a whole number of at least 1."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise MindSigmaError(f"{name} must be a whole number of at least 1, not {value!r}")


def texts_of(name, value):
    """List of at least one text from a text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if texts is None or not isinstance(texts, (list, tuple)) or not texts:
        raise MindSigmaError(f"{name} must be a text or a list of at least one text, not {value!r}")
    for text in texts:
        if not isinstance(text, str):
            raise MindSigmaError(f"{name} must hold texts, not {type(text).__name__}")
    return list(texts)


def seeds_for(seed, count):
    """List of one seed for each image from a number, a list, or None for a random number."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, (list, tuple)):
        if len(seed) != count:
            raise MindSigmaError(f"{len(seed)} seeds for {count} images; give one number, or one for each image")
        seeds = list(seed)
    else:
        seeds = [seed + i for i in range(count)]
    for value in seeds:
        if not isinstance(value, (int, np.integer)) or value < 0:
            raise MindSigmaError(f"seed must be a whole number of at least 0, not {value!r}")
    return [int(value) for value in seeds]

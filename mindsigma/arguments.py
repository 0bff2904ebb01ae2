"""Checks of what a caller may get wrong; each raises MindSigmaError that names the argument."""

import math
import os

import numpy as np

from mindsigma.errors import MindSigmaError, one_line

LONGEST_QUOTE = 80  # characters of a value in a message


def shown(value):
    """A value as a message quotes it: short, or its type alone where it may be large or strange."""
    plain = value is None or isinstance(value, (str, bytes, int, float, np.number))
    if not plain and not isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__}"
    return one_line(repr(value[: LONGEST_QUOTE + 1] if isinstance(value, (str, bytes)) else value), LONGEST_QUOTE)


def one_of(name, value, known):
    """Return the value if it is one of the known texts."""
    if not isinstance(value, str) or value not in known:
        raise MindSigmaError(f"{name} must be one of {', '.join(known)}, not {shown(value)}")
    return value


def whole(name, value, least=1, most=math.inf, unit=""):
    """Return a whole number of `least` ... `most` (" pixels"), as an int; True and 1.0 are none."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not least <= value <= most:
        span = f"of at least {least}" if most == math.inf else f"of {least} ... {most}"
        raise MindSigmaError(f"{name} must be a whole number {span}{unit}, not {shown(value)}")
    return int(value)


def number(name, value):
    """Return a finite number, as a float."""
    kind = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not kind or abs(value) > 1e30 or value != value:  # no float32 beyond that is left finite
        raise MindSigmaError(f"{name} must be a finite number, not {shown(value)}")
    return float(value)


def is_number(value):
    """Whether a value is a finite number."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and bool(np.isfinite(value))


def numbers(name, value):
    """Return a tuple of at least one and at most 1000 finite numbers, from a list, a tuple or an array."""
    values = value.tolist() if isinstance(value, np.ndarray) and value.ndim == 1 else value
    if not isinstance(values, (list, tuple)) or not 0 < len(values) <= 1000 or not all(map(is_number, values)):
        raise MindSigmaError(f"{name} must be a list of 1 ... 1000 finite numbers, not {shown(value)}")
    return tuple(map(float, values))


def fraction(name, value):
    """Return a number of 0 ... 1, as a float."""
    if not is_number(value) or not 0 <= value <= 1:
        raise MindSigmaError(f"{name} must be a number of 0 ... 1, not {shown(value)}")
    return float(value)


def flag(name, value):
    """Return a truth; texts such as "false" are none."""
    if not isinstance(value, (bool, np.bool_)) and not (isinstance(value, int) and value in (0, 1)):
        raise MindSigmaError(f"{name} must be True or False, not {shown(value)}")
    return bool(value)


def path_like(name, value):
    """Return a path, or the name of a model: a text or a pathlib.Path."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise MindSigmaError(f"{name} must be a path or the name of a model, not {shown(value)}")
    return value


def array(name, value, kinds="fiu"):
    """A NumPy array of numbers from an array, a tensor or nested lists."""
    try:
        result = value.asnumpy() if hasattr(value, "asnumpy") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MindSigmaError(f"{name} must be an array of numbers, not {shown(value)}") from error
    if result.dtype.kind not in kinds:
        if result.dtype.name != "bfloat16":
            raise MindSigmaError(f"{name} must be an array of numbers, not of {result.dtype}")
        result = result.astype(np.float32)
    return result


def texts_of(name, value):
    """List of at least one text from a text or a list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts:
        raise MindSigmaError(f"{name} must be a text or a list of at least one text, not {shown(value)}")
    for text in texts:
        if not isinstance(text, str):
            raise MindSigmaError(f"{name} must hold texts, not {type(text).__name__}")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise MindSigmaError(f"{name} {shown(text)} holds half a character, which no text has")
    return list(texts)


def seeds_for(seed, count):
    """List of one seed for each image from a number, a list, or None for a random number."""
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    if isinstance(seed, np.ndarray) and seed.ndim == 1:
        seed = seed.tolist()
    if not isinstance(seed, (list, tuple)):
        seed = whole("seed", seed, 0)
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise MindSigmaError(f"{len(seed)} seeds for {count} images; give one number, or one for each image")
    return [whole("seed", value, 0) for value in seed]

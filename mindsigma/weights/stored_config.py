"""What a config taken from a file may say: kinds and ranges, checked before any network is built from it."""

import math
import re
from contextlib import contextmanager
from dataclasses import fields

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import RAISED

LONGEST_TEXT = 64  # characters, a digest's
LARGEST = 2**20  # of any size; the largest published one is T5-XXL's vocabulary of 32128
LONGEST = 16  # levels of a VAE
FACTOR = 1e4  # of any scale
BOUNDS = {"input_size": 2048}  # latent side; 4K has 512
LONGEST_MESSAGE = 600  # characters; a config may hold any text
LAYERS = ("depth", "num_layers", "layers_per_block", "layers")  # each has tensors of its own
ANY_SIGN = ("shift_factor",)


def checked(path, config_class, values, tensors):
    """`values` (dict), after a check of those that are fields of the dataclass: their kind, and a sane range.

    `tensors` is the number of tensors the weights have, which the number of layers cannot exceed. Raises MindSigmaError
    that names `path` and the key.
    """
    for field in fields(config_class):
        value = values.get(field.name, field.default)
        most = tensors if field.name in LAYERS else BOUNDS.get(field.name, LARGEST)
        if field.name in values and not _fits(field.name, value, field.default, most):
            raise MindSigmaError(
                f"{path}: its config cannot have {field.name} {one_line(repr(value), 60)}; correct it, or copy or "
                "download it again"
            )
    return values


def _fits(name, value, default, most):
    if default is None:
        return _fits_compression(value)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, str):
        return isinstance(value, str) and len(value) <= LONGEST_TEXT
    if isinstance(default, int):
        return _is_size(value, most)
    if isinstance(default, tuple):
        return isinstance(value, (list, tuple)) and 0 < len(value) <= LONGEST and all(_is_size(n, most) for n in value)
    if name in ANY_SIGN:
        return value is None or _is_number(value)
    return _is_number(value) and value > 0


def _is_size(value, most):
    return type(value) is int and 0 < value <= most


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= FACTOR


def _fits_compression(value):
    """Whether KVCompression.parse can take the value without counting to a billion."""
    if isinstance(value, dict):
        lists = [entry for entry in value.values() if isinstance(entry, (list, tuple))]
        known = all(
            entry is None or isinstance(entry, (str, list, tuple)) or _is_size(entry, LARGEST)
            for entry in value.values()
        )
        return known and all(len(entry) <= LARGEST and all(type(n) is int for n in entry) for entry in lists)
    return not isinstance(value, (bool, int, float, list)) and not re.search(r"\d{5}", str(value))


@contextmanager
def config_of(path):
    """Let every error of working out a config be one of one line that names `path`."""
    try:
        yield
    except MindSigmaError as error:
        message = str(error) if str(path) in str(error) else f"{path}: {error}"
        raise MindSigmaError(one_line(message, LONGEST_MESSAGE)) from error
    except RAISED as error:
        raise MindSigmaError(
            f"{path}: its config and the shapes of its tensors make no network ({one_line(error)}); "
            "copy or download it again"
        ) from error

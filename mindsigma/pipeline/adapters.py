"""Adapters named by a user, `FILE[:WEIGHT]`, and a DiT's weights with them."""

import math
from pathlib import Path

from mindsigma.checkpoints.adapter_reader import Opened, open_adapter
from mindsigma.checkpoints.adapter_view import Adapted
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.pipeline.locate import locate


def parse_adapter(text):
    """(file or folder, weight) of `FILE[:WEIGHT]`; what is a file as a whole has weight 1, as has one without."""
    text = str(text)
    name, colon, tail = text.rpartition(":")
    if not colon or Path(text).expanduser().exists():
        return text, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0
    if not math.isfinite(weight) or not name:
        raise MindSigmaError(f"{text}: an adapter is given as FILE or FILE:WEIGHT, the weight a finite number")
    return name, weight


def open_adapters(adapters):
    """list of (Opened, weight) of what a user gave.

    Args:
        adapters: iterable of `FILE[:WEIGHT]`, of (path, weight), or of what this function returned.
    """
    pairs = [parse_adapter(one) if isinstance(one, (str, Path)) else (one[0], float(one[1])) for one in adapters]
    return [(one if isinstance(one, Opened) else open_adapter(locate(one)), weight) for one, weight in pairs]


def notes_of(opened):
    """list[str]: what was assumed about an Opened adapter, and what of its source was left out."""
    name = opened.adapter.path.name
    notes = [f"{name}: {line}" for line in opened.assumed]
    if opened.dropped:
        notes.append(
            f"{name}: {len(opened.dropped)} tensors of a text encoder are left out: {one_line(opened.dropped[0])}"
            + (", ..." if len(opened.dropped) > 1 else "")
        )
    return notes


def with_adapters(tensors, adapters, dtype=None):
    """A view of a DiT's tensors with adapters (as for `open_adapters`) merged in their order; `dtype` as in Adapted."""
    opened = open_adapters(adapters)
    if not opened:
        return tensors
    return Adapted(tensors, [(one.adapter, weight) for one, weight in opened], dtype)

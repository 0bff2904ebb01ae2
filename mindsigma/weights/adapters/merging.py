"""Adapters named by a user, `FILE[:WEIGHT]`, and a DiT's weights with them."""

import math
import os
from pathlib import Path

from mindsigma.arguments import number, path_like, shown
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.adapters.adapter_file import tensors_of
from mindsigma.weights.adapters.adapter_reader import Opened, open_adapter
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.formats.finite import finite
from mindsigma.weights.locate import locate


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
        adapters: `FILE[:WEIGHT]`, or a list or tuple of such, of (path, weight), or of what this function returned.
    """
    if isinstance(adapters, (str, os.PathLike)):
        adapters = [adapters]
    if not isinstance(adapters, (list, tuple)):
        raise MindSigmaError(
            f"lora must be a list of adapters, each FILE[:WEIGHT] or (path, weight), not {shown(adapters)}"
        )
    opened = []
    for one in adapters:
        pair = isinstance(one, (list, tuple)) and len(one) == 2
        if pair and isinstance(one[0], Opened):
            opened.append(one)
            continue
        if pair:
            path, weight = path_like("lora", one[0]), number("weight of lora", one[1])
        else:
            path, weight = parse_adapter(path_like("lora", one))
        opened.append((open_finite_adapter(locate(path)), weight))
    return opened


def open_finite_adapter(path):
    """`open_adapter`; raises MindSigmaError where a tensor holds NaN or infinity, too."""
    opened = open_adapter(path)
    for name, entry in opened.adapter.entries.items():
        for key, array in tensors_of(name, entry).items():
            finite(path, key, array)
        if not math.isfinite(entry.scale):
            raise MindSigmaError(f"{path}: the scale of '{one_line(name)}' is {entry.scale}, no number")
    return opened


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

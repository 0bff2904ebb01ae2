"""How much memory a model's weights take and how much there is, told before they are read."""

import os
from math import prod
from pathlib import Path

from mindsigma.runtime import device

WORTH_TELLING = 1e9  # bytes of weights below which nobody asks
NAMES = {"t5": "T5", "dit": "DiT", "vae": "VAE"}


def free_bytes():
    """Memory of this machine that can still be taken, in bytes, within the limit of its container; None if unknown."""
    found = []
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable"))
        found.append(int(line.split()[1]) * 1024)
        limit, used = (Path("/sys/fs/cgroup", name).read_text("ascii") for name in ("memory.max", "memory.current"))
        found.append(int(limit) - int(used))  # "max" is no number: no limit
    except (OSError, StopIteration, ValueError):
        pass
    return max(min(found), 0) if found else None


def resident_bytes():
    """Memory that this process holds, in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def weight_bytes(pending):
    """Bytes that the weights of a Pending network take in memory once they are read."""
    held = getattr(pending, "held", None)  # of text encoders that are not held whole
    if held is not None:
        return held
    tensors = pending.tensors
    return sum(prod(tensors.shape(name)) for name in tensors.names()) * (4 if "32" in str(pending.dtype) else 2)


def told(pipeline, free=None, together=False):
    """Lines about the memory that a pipeline's weights take and that is free: one, or none where nobody asks.

    Args:
        free: see `lines`.
        together: T5 stays beside the others; else it is let go of before they are read.
    """
    drawing = ("dit", *pipeline.controlnets, "vae")
    groups = [
        [(NAMES.get(name, "ControlNet"), weight_bytes(pipeline.components.opened(name))) for name in names]
        for names in ((("t5", *drawing),) if together else (("t5",), drawing))
    ]
    return lines(groups, {"T5": "--text-encoder-memory layers reads it layer by layer, int8 in a quarter"}, free)


def lines(groups, remedies, free=None, what="weights of ", more=""):
    """Lines about the memory that something takes and that is free: one, or none where nobody asks.

    Args:
        groups: list of lists of (name, bytes); what is in a group is held at once, one group after the other.
        remedies: dict name -> what to do where that is the largest part of too much.
        free: bytes, by default those of this machine; nothing is said of a device's own memory.
        what, more: texts before and behind the sizes.
    """
    on_host = device() == "CPU"
    free = free_bytes() if free is None and on_host else free
    most = max(groups, key=total)
    short = on_host and free is not None and total(most) > free
    if total(most) < WORTH_TELLING and not short:
        return []
    text = f"memory: {what}{', then '.join(map(listed, groups))}{more}"
    if on_host and free is not None:
        text += f"; free are {free / 1e9:.1f} GB"
    if short:
        name, _ = max(most, key=lambda part: part[1])
        remedy = f" for {name}: {remedies[name]}" if name in remedies else ": the machine will swap or end this process"
        text += f", too little{remedy}"
    return [text]


def total(group):
    """Bytes of a list of (name, bytes)."""
    return sum(size for _, size in group)


def listed(group):
    """A list of (name, bytes) in words."""
    *others, last = (f"{name} {size / 1e9:.1f} GB" for name, size in group)
    return f"{', '.join(others)} and {last}" if others else last

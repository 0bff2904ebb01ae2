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


def told(pipeline, free=None):
    """Line about the memory that a pipeline's weights take and that is free, or None where it is not worth a line.

    Args:
        free: bytes, by default those of this machine; nothing is said of a device's own memory.
    """
    drawing = ("dit", *pipeline.controlnets, "vae")
    parts = {name: weight_bytes(pipeline.components.opened(name)) for name in ("t5", *drawing)}
    on_host = device() == "CPU"
    free = free_bytes() if free is None and on_host else free
    most = max(parts["t5"], sum(parts[name] for name in drawing))  # T5 is let go of before the others are read
    short = on_host and free is not None and most > free
    if most < WORTH_TELLING and not short:
        return None
    sizes = ", then ".join(
        " and ".join(f"{NAMES.get(name, 'ControlNet')} {parts[name] / 1e9:.1f} GB" for name in names)
        for names in (("t5",), drawing)
    )
    line = f"memory: weights of {sizes}"
    if on_host and free is not None:
        line += f"; free are {free / 1e9:.1f} GB"
    if short and parts["t5"] == most:
        return f"{line}, too little for T5: --text-encoder-memory layers reads it layer by layer, int8 in a quarter"
    return f"{line}, too little: the machine will swap or end this process" if short else line

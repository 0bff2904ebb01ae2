"""How much memory a run's weights, gradients and states take, told before they are read."""

from dataclasses import dataclass
from math import prod

import mindspore as ms

from mindsigma.pipeline import memory
from mindsigma.weights.names.dit_names import NULL_CAPTION

STATES = {"came": 1, "adamw": 2, "lion": 1}  # numbers of the optimiser for one of the network; CAME's rows are few
FP32 = 4
ENCODERS = "extract features first, tools/extract_features.py --text-encoder-memory layers, and leave out --prompts"


@dataclass(frozen=True)
class Needed:
    """Bytes of one process; what a step computes comes on top.

    Attributes:
        weights: of all networks, as they compute.
        gradients: of what learns.
        states: of the optimiser, master weights, averages, sums of micro-batches.
    """

    weights: float = 0
    gradients: float = 0
    states: float = 0

    def __add__(self, other):
        return Needed(self.weights + other.weights, self.gradients + other.gradients, self.states + other.states)


def width(dtype):
    """Bytes of a number."""
    return FP32 if dtype == ms.float32 else FP32 // 2


def frozen(numbers, dtype):
    """Needed for so many weights that stay as they are."""
    return Needed(numbers * width(dtype))


def learning(args, numbers, dtype=ms.float32, processes=1, averaged=True):
    """Needed for so many weights that learn; in a dtype of half precision they have masters in fp32.

    What the processes divide (ZeRO) is counted as if every tensor could be divided. `averaged`: whether --ema-decay is
    for these weights, too.
    """
    states = STATES[args.optimizer] + (dtype != ms.float32) + (args.accumulation > 1)
    states += averaged and args.ema_decay > 0
    together = min(args.zero_group or processes, processes)
    shares = [together if args.zero >= stage else 1 for stage in (3, 2, 1)]
    sizes = (numbers * width(dtype), numbers * FP32, numbers * FP32 * states)
    return Needed(*(size / share for size, share in zip(sizes, shares)))


def weights_of(component):
    """Numbers of a DiT's Component."""
    view = component.view
    return sum(prod(view.shape(name)) for name in view.names() if name != NULL_CAPTION)


def told(needed, encoders=(), free=None):
    """Lines about the memory that a run needs and that is free: one, or none where nobody asks.

    Args:
        needed: Needed.
        encoders: list of (name, bytes) of T5 and the VAE, where the run encodes images or draws some.
        free: of memory.lines.
    """
    own = [("weights", needed.weights), ("gradients", needed.gradients), ("states", needed.states)]
    group = [*encoders, *((name, size) for name, size in own if size)]
    return memory.lines([group], {"T5": ENCODERS}, free, "", ", beside what a step computes")

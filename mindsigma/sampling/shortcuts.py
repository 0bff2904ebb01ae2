"""Approximate speed-ups as a table, made before sampling: which step is guided, and what it takes from a step before.

All are off by default and then change no bit. Outside `guidance_interval` only the conditional half runs (arXiv
2404.07724); from `text_reuse` on cross-attention repeats what it gave before (arXiv 2404.02747, without its average of
the two halves); with `block_reuse` the middle half of the blocks repeats the change that it made to the tokens (as
arXiv 2312.00858 and 2406.01125 do).
"""

from dataclasses import dataclass
from typing import Tuple

import numpy as np

from mindsigma.arguments import is_number
from mindsigma.errors import MindSigmaError

# What a step does: all its work; all, and keep what a later one takes; the rest beside what was kept.
PLAIN = "plain"
KEEP_TEXT, TAKE_TEXT = "keep-text", "take-text"
KEEP_BLOCKS, TAKE_BLOCKS = "keep-blocks", "take-blocks"


@dataclass(frozen=True)
class StepPlan:
    """What a step does.

    Attributes:
        guided: both halves of guidance run, else the conditional one alone.
        kind: PLAIN or one of KEEP_, TAKE_.
        perturbed: images with perturbed attention may run, too (sampling/perturbed.py).
        controls: numbers of the ControlNets that act (sampling/controls.py).
    """

    guided: bool
    kind: str
    perturbed: bool = False
    controls: Tuple[int, ...] = ()


@dataclass(frozen=True)
class Shortcuts:
    """The choices.

    Attributes:
        guidance_interval: begin and end of guidance, fractions of the trajectory from noise (0) to image (1); a step
            is guided if its middle lies within.
        text_reuse: fraction of the trajectory from which the outputs of cross-attention are those of the last step
            before; 1 is never.
        block_reuse: n: every n-th step runs all blocks, the others the first and the last quarter; 1 is all of them.

    Raises:
        MindSigmaError: a value out of range, or both kinds of reuse at once.
    """

    guidance_interval: Tuple[float, float] = (0.0, 1.0)
    text_reuse: float = 1.0
    block_reuse: int = 1

    def __post_init__(self):
        interval = self.guidance_interval
        if not isinstance(interval, (tuple, list)) or len(interval) != 2 or not all(map(is_number, interval)):
            raise MindSigmaError(f"guidance_interval must be two fractions of the trajectory, not {interval!r}")
        if not 0 <= interval[0] < interval[1] <= 1:
            raise MindSigmaError(f"guidance_interval must be 0 <= begin < end <= 1, not {interval[0]} {interval[1]}")
        if not is_number(self.text_reuse) or not 0 < self.text_reuse <= 1:
            raise MindSigmaError(f"text_reuse must be a fraction above 0 and at most 1, not {self.text_reuse!r}")
        whole = isinstance(self.block_reuse, (int, np.integer)) and not isinstance(self.block_reuse, bool)
        if not whole or self.block_reuse < 1:
            raise MindSigmaError(f"block_reuse must be a whole number of at least 1, not {self.block_reuse!r}")
        if self.text_reuse < 1 and self.block_reuse > 1:
            raise MindSigmaError("text_reuse and block_reuse exclude each other; give one of them")

    def plan(self, num_steps, guided, before=0, perturbed=False):
        """List of `num_steps` StepPlan.

        Args:
            num_steps: at least 1.
            guided: whether there is guidance by two halves at all.
            before: steps of the trajectory that are left out before these.
            perturbed: whether there is guidance by perturbed attention, which keeps to the same interval.

        Raises:
            MindSigmaError: guidance_interval is given without guidance, or no step lies within it; reuse together with
                perturbed attention.
        """
        begin, end = self.guidance_interval
        if (begin, end) != (0, 1) and not (guided or perturbed):
            raise MindSigmaError("guidance_interval needs guidance, a guidance_scale above 1")
        if perturbed and (self.text_reuse < 1 or self.block_reuse > 1):
            raise MindSigmaError("text_reuse and block_reuse exclude pag_scale; leave out one of them")
        places = [(i + 0.5) / (before + num_steps) for i in range(before, before + num_steps)]
        inside = [begin <= place <= end for place in places]
        if (guided or perturbed) and not any(inside):
            raise MindSigmaError(f"guidance_interval {begin} {end} holds the middle of none of {num_steps} steps")
        if perturbed:
            return [StepPlan(guided and within, PLAIN, within) for within in inside]
        halves = [guided and within for within in inside]
        keep, take = (KEEP_TEXT, TAKE_TEXT) if self.text_reuse < 1 else (KEEP_BLOCKS, TAKE_BLOCKS)
        wanted = [i > 0 and self._takes(before + i, before + num_steps) for i in range(num_steps)]
        steps, kept = [], None  # kept: whether what was kept holds both halves; None: nothing is
        for i, both in enumerate(halves):
            if wanted[i] and kept is not None and kept >= both:
                steps.append(StepPlan(both, take))
                kept = both
                continue
            needed = i + 1 < num_steps and wanted[i + 1] and both >= halves[i + 1]
            steps.append(StepPlan(both, keep if needed else PLAIN))
            kept = both if needed else None
        return steps

    def _takes(self, i, num_steps):
        """Whether step i, not the first, would take what an earlier one kept."""
        if self.text_reuse < 1:
            return i / num_steps >= self.text_reuse
        return i % self.block_reuse != 0


def repeated_blocks(depth):
    """First and last (exclusive) of the blocks that TAKE_BLOCKS leaves out: the middle half."""
    if depth < 3:
        raise MindSigmaError(f"block_reuse needs a model of at least 3 blocks, not {depth}")
    outer = max(1, depth // 4)
    return outer, depth - outer


def cost(plan, depth, first_perturbed=None):
    """Block evaluations of a plan, the two halves of guidance counted as two; cross-attention is not looked at.

    `first_perturbed`: block from which on perturbed images run, too.
    """
    total = 0
    for step in plan:
        blocks = depth
        if step.kind == TAKE_BLOCKS:
            first, last = repeated_blocks(depth)
            blocks -= last - first
        total += blocks * (2 if step.guided else 1)
        if step.perturbed:
            total += depth - first_perturbed
    return total

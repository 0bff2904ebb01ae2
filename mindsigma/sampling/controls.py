"""ControlNets in sampling: which act at which step, how strongly, and what each takes that is made once a trajectory.

Guess mode: only the conditional half of guidance is controlled, the first copies weakly, so that a picture can be drawn
without a prompt (arXiv 2302.05543, section 3.4; the weights are diffusers').
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.models.checks import check_condition
from mindsigma.ops.operators import filled, narrow, split
from mindsigma.sampling.captions import conditional_text_kv
from mindsigma.sampling.shortcuts import PLAIN

GUESS_FIRST = 0.1  # of the first copy, the last has 1
REUSE = "text_reuse and block_reuse exclude a ControlNet; leave out one of them"
LEFT_OUT = "control_start and control_end (--control-start, --control-end) {0:g} {1:g} hold none of {2} steps"


@dataclass(frozen=True)
class Control:
    """A ControlNet and how it acts.

    Attributes:
        controlnet: ControlNet.
        condition: latents of the picture, scaled, float32 (1 or N, c, h, w).
        scale: weight of what the copies add.
        start, end: the part of the trajectory, from noise (0) to image (1), whose steps it acts in: step i of n does if
            start <= i / n and (i + 1) / n <= end, as in diffusers.
        guess: guess mode, the same for all of a trajectory.
    """

    controlnet: Any
    condition: Any
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def scales(self):
        """Weights of the copies, float32 (layers,)."""
        layers = self.controlnet.config.layers
        weights = np.logspace(np.log10(GUESS_FIRST), 0, layers) if self.guess else np.ones(layers)
        return (self.scale * weights).astype(np.float32)

    def acts(self, step, steps):
        """Whether it acts in a step, from 0, of a whole trajectory."""
        return acting(self.scale, self.start, self.end, step, steps)


def acting(scale, start, end, step, steps):
    """Whether a ControlNet acts in a step, from 0, of a whole trajectory; see Control."""
    return scale != 0 and start <= step / steps and (step + 1) / steps <= end


def controlled(plan, controls, before=0):
    """A list of StepPlan with the numbers of the Controls that act in each step.

    `before`: steps of the trajectory that are left out before these. Raises MindSigmaError for a Control that acts in
    none, unless its scale is 0, and for steps that reuse what an earlier one made.
    """
    steps = before + len(plan)
    if controls and any(how.kind != PLAIN for how in plan):
        raise MindSigmaError(REUSE)
    result = []
    for i, how in enumerate(plan, before):
        result.append(replace(how, controls=tuple(k for k, one in enumerate(controls) if one.acts(i, steps))))
    acting = {k for how in result for k in how.controls}
    for k, one in enumerate(controls):
        if one.scale != 0 and k not in acting:
            raise MindSigmaError(LEFT_OUT.format(one.start, one.end, len(plan)))
    return result


class ControlSum(nn.Cell):
    """What several ControlNets add to the tokens of one DiT, together.

    Args:
        controlnets: tuple of ControlNet.
        guess: guess mode.
    """

    def __init__(self, controlnets, guess=False):
        super().__init__(auto_prefix=False)  # parameters keep their names
        self.controlnets, self.guess = nn.CellList(list(controlnets), auto_prefix=False), guess

    def construct(self, x, given, height, width, gather=None, both=False):
        """A tuple of what is added before blocks 1, 2, ..., (N, T, C) each, from the tokens (N, T, C) after block 0.

        Args:
            given: for each ControlNet its hint (1 or N, T, C), modulation (1, 6 * layers, C), text_kv and scales.
            height, width, gather: of DiTBlock.
            both: the first half of x is guidance's unconditional one.
        """
        images = x.shape[0]
        if both and self.guess:
            x = narrow(x, 0, images // 2, images // 2)
        total = ()
        for i, controlnet in enumerate(self.controlnets):
            hint, modulation, text_kv, scales = given[i]
            rows = controlnet.split_modulation(modulation)
            total = sums(total, controlnet(x, hint, rows, text_kv, height, width, scales, gather))
        if not (both and self.guess):
            return total
        nothing, whole = filled(x.shape, 0.0, x.dtype), ()
        for change in total:
            whole += (ops.concat((nothing, change), 0),)
        return whole


def sums(some, others):
    """Tuple of the sums of two tuples of tensors, as long as the longer one."""
    result = ()
    for i in range(max(len(some), len(others))):
        if i < len(some) and i < len(others):
            result += (some[i] + others[i],)
        else:
            result += (some[i] if i < len(some) else others[i],)
    return result


class ControlText(nn.Cell):
    """`ControlNet.text_kv` of a caption's states, as a graph of its own."""

    def __init__(self, dit, controlnet):
        super().__init__(auto_prefix=False)
        self.dit, self.controlnet = dit, controlnet

    def construct(self, states, mask):
        """States (N, L, caption_channels) and mask (N, L) to a pair of keys and values for each copy."""
        return self.controlnet.text_kv(self.dit.embed_caption(states, mask), mask)


class ControlModulations(nn.Cell):
    """`ControlNet.modulations` side by side, (S, 6 * layers, C), for all timesteps (S,) of a trajectory at once."""

    def __init__(self, dit, controlnet):
        super().__init__(auto_prefix=False)
        self.dit, self.controlnet = dit, controlnet

    def construct(self, timestep, image_size=None, aspect_ratio=None):
        """Arguments of Modulations."""
        _, t6 = self.dit.embed_timestep(timestep, image_size, aspect_ratio)
        return ops.concat(self.controlnet.modulations(t6), 1)


class ControlHint(nn.Cell):
    """`ControlNet.hint` of a condition's latents."""

    def __init__(self, dit, controlnet):
        super().__init__(auto_prefix=False)
        self.dit, self.controlnet = dit, controlnet

    def construct(self, latents, position):
        """Latents (N, c, h, w) fp32 and their position (1, T, C) to (N, T, C)."""
        return self.controlnet.hint(self.dit.x_embedder(latents.astype(self.dit.dtype), position))


class ControlGraphs:
    """The graphs of a ControlNet beside a DiT that are run once a trajectory."""

    def __init__(self, dit, controlnet):
        self.text_kv = ControlText(dit, controlnet)
        self.modulations = ControlModulations(dit, controlnet)
        self.hint = ControlHint(dit, controlnet)


class ControlInputs:
    """What the Controls of a trajectory take at its steps, made before the first one.

    Args:
        controls: list of Control.
        graphs: DenoisingGraphs.
        step: GuidedStep, which knows the position and which rows of the latents are drawn.
        shape: of the latents (N, c, h, w).
    """

    def __init__(self, controls, graphs, step, shape):
        self.controls, self.guided, self.halves, self.joined = controls, False, step.halves, graphs.joined
        self._graphs, position = [graphs.of_controlnet(one.controlnet) for one in controls], step.position(shape)
        self._hints, self._scales, self._texts, self._rows = [], [], [], []
        for one, own in zip(controls, self._graphs):
            condition = Tensor(np.asarray(one.condition, np.float32))
            check_condition(tuple(shape), tuple(condition.shape))
            self._hints.append(own.hint(step.own_rows(condition), position))
            self._scales.append(Tensor(one.scales()))

    def prepare(self, of_captions, guided, timesteps, conditions):
        """Make what follows from the captions and the timesteps.

        Args:
            of_captions: function (cell, guided) of a ControlText, to its results for the captions.
            guided: whether there is an unconditional half.
            timesteps: fp32 (S,). conditions: micro conditions, none or two.
        """
        self.guided = guided
        for one, own in zip(self.controls, self._graphs):
            self._texts.append(of_captions(own.text_kv, guided and not one.guess))
            self._rows.append(split(own.modulations(timesteps, *conditions), timesteps.shape[0], 0))

    def at(self, i, how):
        """What ControlSum takes in step i, of a StepPlan; a pair for the two halves of guidance one after the other."""
        if how.guided and self.halves:
            return self._of(i, how, 0), self._of(i, how, 1)
        return self._of(i, how)

    def _of(self, i, how, half=None):
        given = ()
        for k in how.controls:
            guess, text, hint = self.controls[k].guess, self._texts[k], self._hints[k]
            if half is not None and not guess:
                text = text[half]
            elif self.guided and not how.guided and not guess:
                text = conditional_text_kv(text, self.halves)
            if how.guided and half is None and self.joined and not guess and hint.shape[0] > 1:
                hint = ops.concat((hint, hint), 0)
            given += ((hint, self._rows[k][i], text, self._scales[k]),)
        return given

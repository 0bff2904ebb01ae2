"""One guided denoising step as a cell, and the loop over the solver's table as a generator."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.diffusion.dpm_solver import MAX_ORDER
from mindsigma.diffusion.shortcuts import KEEP_BLOCKS, KEEP_TEXT, PLAIN, Shortcuts
from mindsigma.models.dit.reuse import ReusingDiT, conditional_half
from mindsigma.ops.kernels import is_native
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph

NO_SHORTCUTS = Shortcuts()


@dataclass
class Step:
    """State after a denoising step: index from 0, number of steps, the model's timestep, latents (N, c, h, w) fp32."""

    index: int
    total: int
    timestep: float
    latents: Tensor


def advance(latents, history, numbers, guidance_scale, prediction, guided, kernels):
    """Guidance and one multistep update (see GuidedStep); prediction (2 * N or N, 2 * c, h, w) is the DiT's."""
    if is_native(prediction, kernels):
        return native.solver_update(latents, history, numbers, guidance_scale, prediction, guided)
    batch, channels = latents.shape[:2]
    noise = prediction[:, :channels].astype(ms.float32)
    if guided:
        unconditional, conditional = noise[:batch], noise[batch:]
        noise = unconditional + guidance_scale * (conditional - unconditional)
    x0 = (latents - numbers[1] * noise) / numbers[0]
    latents = numbers[2] * latents + numbers[3] * x0
    for i in range(MAX_ORDER - 1):
        latents = latents + numbers[4 + i] * history[i]
    return latents, ops.concat((x0.expand_dims(0), history[:-1]), 0)


def doubled(latents, kernels):
    """Latents for both halves of guidance."""
    if is_native(latents, kernels):
        return native.twice(latents)
    return ops.concat((latents, latents), 0)


def after(value, done):
    """`value`, once `done` is there: else a scheduler may run both halves at once, in twice the memory."""
    return ops.depend(value, done)


def joined(unconditional, conditional):
    """Predictions of both halves, computed one after the other."""
    return ops.concat((unconditional, conditional), 0)


class GuidedStep(nn.Cell):
    """Noise prediction with classifier-free guidance and one multistep update. One graph in graph mode.

    Args:
        dit: the DiT.
        guided: whether the captions hold an unconditional half, first, and a conditional half.
        halves: compute the two halves one after the other, in half the memory.
    """

    def __init__(self, dit, guided, halves=False):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.dit = dit
        self.guided, self.halves = guided, guided and halves
        self.joined, self.after = SharedGraph(joined), SharedGraph(after)
        self.doubled = SharedGraph(doubled, static=(dit.kernels,), of_operations=True)
        self.advance = SharedGraph(advance, static=(guided, dit.kernels), of_operations=True)

    def position(self, shape):
        """Position embedding for the latents of this step, of an image whose latents have this shape."""
        return self.dit.position(shape)

    def construct(self, latents, history, numbers, guidance_scale, keys, rows, position):
        """Advance the latents by one step.

        Args:
            latents: (N, c, h, w) fp32.
            history: (MAX_ORDER - 1, N, c, h, w) fp32, earlier predictions of x0, the newest first.
            numbers: fp32 (3 + MAX_ORDER,): alpha, sigma, keep and weights of a SolverStep.
            guidance_scale: fp32 scalar tensor.
            keys: result of dit.encode_caption for 2 * N captions, or N if not guided; with `halves` a pair of such
                results for N captions each.
            rows: (1, ...) of dit.modulations, for the step's timestep.
            position: of dit.position.

        Returns:
            latents and history after the step.
        """
        if self.halves:
            unconditional = self.dit.denoise(latents, rows, keys[0], position)
            rows = self.after(rows, unconditional)
            prediction = self.joined(unconditional, self.dit.denoise(latents, rows, keys[1], position))
        else:
            inputs = self.doubled(latents) if self.guided else latents
            prediction = self.dit.denoise(inputs, rows, keys, position)
        return self.advance(latents, history, numbers, guidance_scale, prediction)


class ReusingStep(GuidedStep):
    """A GuidedStep that keeps something for later steps or takes it from an earlier one: a graph of its own.

    Args:
        dit, guided, halves: see GuidedStep.
        kind: see ReusingDiT.
    """

    def __init__(self, dit, guided, halves, kind):
        super().__init__(dit, guided, halves)
        self.network = ReusingDiT(dit, kind)

    def construct(self, latents, history, numbers, guidance_scale, keys, rows, position, kept=None):
        """`GuidedStep.construct` with what the network takes, if it does; with `halves` a pair, one for each half.

        Returns:
            latents and history after the step, and what a later step takes.
        """
        if self.halves:
            first, second = (None, None) if kept is None else kept
            unconditional, first = self.network(latents, rows, keys[0], position, first)
            rows = self.after(rows, unconditional)
            conditional, second = self.network(latents, rows, keys[1], position, second)
            prediction, kept = self.joined(unconditional, conditional), (first, second)
        else:
            inputs = self.doubled(latents) if self.guided else latents
            prediction, kept = self.network(inputs, rows, keys, position, kept)
        latents, history = self.advance(latents, history, numbers, guidance_scale, prediction)
        return latents, history, kept


class CaptionKeys(nn.Cell):
    """`DiT.encode_caption` as a graph of its own."""

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def construct(self, states, mask):
        """See DiT.encode_caption."""
        return self.dit.encode_caption(states, mask)


class Modulations(nn.Cell):
    """`DiT.modulations` as a graph of its own, for all timesteps of a trajectory at once."""

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def construct(self, timestep, image_size=None, aspect_ratio=None):
        """See DiT.modulations."""
        return self.dit.modulations(timestep, image_size, aspect_ratio)


class DenoisingGraphs:
    """The graphs of a DiT's denoising, kept so that they are compiled once however often images are drawn."""

    def __init__(self, dit):
        self.dit = dit
        self.caption_keys, self.modulations = CaptionKeys(dit), Modulations(dit)
        self._steps = {}

    def step(self, guided, shape, halves=False, kind=PLAIN):
        """The step for latents of this shape; kind as in a StepPlan."""
        key = guided, guided and halves, kind
        if key not in self._steps:
            self._steps[key] = GuidedStep(self.dit, *key[:2]) if kind == PLAIN else ReusingStep(self.dit, *key)
        return self._steps[key]

    def halves(self, unconditional, conditional):
        """The halves of a tensor that the step computes with, one after the other."""
        return ops.concat((unconditional, conditional), 0)


def denoising_steps(
    graphs, latents, table, caption, guidance_scale, unconditional=None, conditions=None, halves=False,
    shortcuts=NO_SHORTCUTS,
):  # fmt: skip
    """Generate the trajectory of the latents.

    Args:
        graphs: DenoisingGraphs.
        latents: start noise, Tensor (N, c, h, w) fp32.
        table: list of SolverStep.
        caption: (states, mask) for N images.
        guidance_scale: weight of guidance; used if `unconditional` is given.
        unconditional: (states, mask) for N images, of the same length as caption's, or None for no guidance.
        conditions: (image_size (1, 2), aspect_ratio (1, 1)) of all images, or None.
        halves: see GuidedStep.
        shortcuts: Shortcuts; none by default.

    Yields:
        first the prepared caption keys (so that the caller can free the text encoder), then a Step for each of the
        table; latents that are sent back replace the step's.
    """
    guided = unconditional is not None
    plan = shortcuts.plan(len(table), guided)
    step = graphs.step(guided, latents.shape, halves)
    halves = step.halves
    if halves:
        keys = graphs.caption_keys(*unconditional), graphs.caption_keys(*caption)
    elif guided:
        keys = graphs.caption_keys(*(graphs.halves(*pair) for pair in zip(unconditional, caption)))
    else:
        keys = graphs.caption_keys(*caption)
    yield keys

    # What depends on the timestep or the size alone is made before the first step.
    timesteps = Tensor(np.array([entry.timestep for entry in table], np.float32))
    all_rows = graphs.modulations(timesteps, *(conditions or ()))
    position = step.position(latents.shape)
    mutable = ms.mutable if ms.get_context("mode") == ms.GRAPH_MODE else lambda value: value
    keys = mutable(keys)  # inputs of the graph, not constants of it
    conditional = None if all(how.guided == guided for how in plan) else mutable(conditional_keys(keys, halves))
    scale = Tensor(guidance_scale, ms.float32)
    history = ops.zeros((MAX_ORDER - 1,) + latents.shape, ms.float32)
    kept, kept_guided = None, guided
    for i, (entry, how) in enumerate(zip(table, plan)):
        weights = entry.weights + (0.0,) * (MAX_ORDER - len(entry.weights))
        numbers = Tensor(np.array([entry.alpha, entry.sigma, entry.keep, *weights], np.float32))
        step = graphs.step(how.guided, latents.shape, halves, how.kind)
        inputs = numbers, scale, keys if how.guided == guided else conditional, all_rows[i : i + 1], position
        if how.kind == PLAIN:
            latents, history = step(latents, history, *inputs)
        else:
            if how.kind in (KEEP_TEXT, KEEP_BLOCKS):
                taken = ()
            else:
                taken = (mutable(conditional_half(kept, halves) if kept_guided and not how.guided else kept),)
            latents, history, kept = step(latents, history, *inputs, *taken)
            kept_guided = how.guided
        replacement = yield Step(i, len(table), entry.timestep, latents)
        latents = latents if replacement is None else replacement


def conditional_keys(keys, halves):
    """The conditional half of `keys` of both."""
    if halves:
        return keys[1]
    return tuple((k[k.shape[0] // 2 :], v[v.shape[0] // 2 :]) for k, v in keys)

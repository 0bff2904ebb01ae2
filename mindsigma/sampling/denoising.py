"""One guided denoising step as a cell, and the loop over a sampler's table as a generator."""

from dataclasses import dataclass
from functools import partial
from typing import Callable

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.ops.operators import mean, narrow, split, unstack
from mindsigma.sampling.captions import conditional_text_kv
from mindsigma.sampling.controls import ControlGraphs, ControlInputs, ControlSum, controlled
from mindsigma.sampling.perturbed import PerturbedDiT, perturbed_text_kv
from mindsigma.sampling.reuse import ReusingDiT, conditional_half
from mindsigma.sampling.shortcuts import KEEP_BLOCKS, KEEP_TEXT, PLAIN, Shortcuts

NO_SHORTCUTS = Shortcuts()


@dataclass
class Step:
    """State after a denoising step.

    Attributes:
        index, total: of the step, from 0, and of how many.
        timestep: what the model was told.
        latents: (N, c, h, w) fp32.
        clean: function without arguments: the clean latents that the network predicted, a float32 array like latents.
    """

    index: int
    total: int
    timestep: float
    latents: Tensor
    clean: Callable


def guide(prediction, guidance_scale, guided, channels, rescale=0.0, perturbed=None):
    """Noise (N, channels, h, w) fp32 of a DiT's prediction (2 * N or N, channels or more, h, w).

    `guided`: the prediction holds the unconditional half, then the conditional one; `rescale`: how far the guided
    noise is brought back to the standard deviation of the conditional one; `perturbed`: the prediction with perturbed
    attention for N images, and `guidance_scale` is a pair, the second for it.
    """
    noise = narrow(prediction, 1, 0, channels).astype(ms.float32)
    if not guided and perturbed is None:
        return noise
    scale, pag_scale = (guidance_scale, None) if perturbed is None else guidance_scale
    conditional = noise
    if guided:
        unconditional, conditional = split(noise, 2, 0)
        noise = unconditional + scale * (conditional - unconditional)  # arXiv 2207.12598
    if perturbed is not None:
        noise = noise + pag_scale * (conditional - narrow(perturbed, 1, 0, channels).astype(ms.float32))
    if rescale:  # arXiv 2305.08891
        noise = noise * (rescale * deviation(conditional) / deviation(noise) + (1 - rescale))
    return noise


def deviation(x):
    """Standard deviation (N, 1, 1, 1) of each of x (N, c, h, w)."""
    centred = x - mean(x, (1, 2, 3), True)
    return ops.sqrt(mean(centred * centred, (1, 2, 3), True))


def variance_of(prediction, guided, channels):
    """What a prediction holds besides the noise, (N, channels, h, w); of guidance the conditional half's."""
    rest = narrow(prediction, 1, channels, prediction.shape[1] - channels)
    half = rest.shape[0] // 2
    return narrow(rest, 0, half, half) if guided else rest


class GuidedStep(nn.Cell):
    """Noise prediction with classifier-free guidance and one step of a sampler. One graph in graph mode.

    Args:
        dit: the DiT.
        sampler: Sampler.
        guided: whether the captions hold an unconditional half, first, and a conditional half.
        halves: compute the two halves one after the other, in half the memory.
        kind: what it keeps for later steps or takes from an earlier one: of a StepPlan.
        rescale: of the guided noise, see `guide`.
        perturbed: layers of perturbed attention, of the plain kind only; none by default.
        control: ControlSum of the ControlNets that act, of the plain kind only; None by default.
    """

    def __init__(self, dit, sampler, guided, halves=False, kind=PLAIN, rescale=0.0, perturbed=(), control=None):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.network, self.sampler, self.perturbed = ReusingDiT(dit, kind), sampler, len(perturbed) > 0
        self.conditional_network = self.network  # of the conditional half, or of both at once
        if self.perturbed:
            self.conditional_network = PerturbedDiT(dit, perturbed, guided and not halves)
        self.position, self.control, self.patch_size = dit.position, control, dit.config.patch_size
        self.channels = dit.config.in_channels
        self.guided, self.halves, self.kind, self.rescale = guided, guided and halves, kind, rescale

    def construct(
        self, latents, history, numbers, guidance_scale, text_kv, modulation, position, fresh=None, kept=None,
        given=None,
    ):  # fmt: skip
        """Advance the latents by one step.

        Args:
            latents: (N, c, h, w) fp32; history: tuple of such, what the sampler keeps, the newest first.
            numbers: fp32, of the step's Row; fresh: standard normal noise like the latents, for a sampler that `draws`.
            guidance_scale: fp32, a scalar tensor or (1, c, 1, 1), one for each channel; with perturbed attention a pair
                of this and of its scale, a scalar tensor.
            text_kv: of the DiT for 2 * N captions, or N if not guided; with `halves` a pair, each for N captions. With
                perturbed attention that of the conditional half, or of both at once, is of `perturbed_text_kv`.
            modulation: (1, 6 * depth + 2, C): rows of all blocks and of the final layer for this timestep.
            position: of DiT.position.
            kept: what an earlier step returned, for the kinds that take it; with `halves` a pair, one for each half.
            given: what the ControlNets take, of ControlSum.construct; with `halves` a pair, one for each half.

        Returns:
            latents and history after the step, and what a later step takes, but for the plain kind.
        """
        if self.halves:
            first, second = (None, None) if kept is None else kept
            control = None if self.control is None or self.control.guess else self.of_control(latents, given[0])
            unconditional, first = self.network(latents, modulation, text_kv[0], position, first, control=control)
            # Else a scheduler may run both halves at once, in twice the memory.
            modulation = ops.depend(modulation, unconditional)
            control = None if self.control is None else self.of_control(latents, given[1])
            conditional, second = self.conditional_network(
                latents, modulation, text_kv[1], position, second, control=control
            )
            prediction, kept = ops.concat((unconditional, conditional), 0), (first, second)
        else:
            inputs = self.both(latents) if self.guided else latents
            control = None if self.control is None else self.of_control(latents, given, self.guided)
            prediction, kept = self.conditional_network(inputs, modulation, text_kv, position, kept, control=control)
        perturbed = None
        if self.perturbed:
            perturbed = kept[1] if self.halves else kept
        noise = self.guided_noise(prediction, guidance_scale, perturbed)
        variance = None
        if self.sampler.learned_variance:
            variance = variance_of(prediction, self.guided, self.channels)
        latents, history = self.sampler(latents, history, scalars(numbers), noise, variance, fresh)
        return (latents, history) if self.kind == PLAIN else (latents, history, kept)

    def both(self, latents):
        """Latents (2 * N, c, h, w) of both halves of guidance."""
        return ops.concat((latents, latents), 0)

    def guided_noise(self, prediction, guidance_scale, perturbed):
        """See `guide`."""
        return guide(prediction, guidance_scale, self.guided, self.channels, self.rescale, perturbed)

    def of_control(self, latents, given, both=False):
        """What `DiT.run` takes as control: a function of the tokens after block 0."""
        height, width = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size

        def added(x):
            return self.control(x, given, height, width, None, both)

        return added

    def own_rows(self, latents):
        """The rows of latents (N, c, h, w) that this process draws: all."""
        return latents


def scalars(numbers):
    """A step's numbers one by one: as they are outside a graph, of its input (K,) inside."""
    return unstack(numbers, 0) if isinstance(numbers, Tensor) else numbers


class TextKV(nn.Cell):
    """`DiT.text_kv` as a graph of its own."""

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def construct(self, states, mask):
        """States (N, L, caption_channels) and mask (N, L) to a pair of keys and values for each block."""
        return self.dit.text_kv(states, mask)


class Modulations(nn.Cell):
    """`DiT.modulations` side by side, (S, 6 * depth + 2, C), for all timesteps (S,) of a trajectory at once."""

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def construct(self, timestep, image_size=None, aspect_ratio=None):
        """Timesteps (S,), micro conditions (1, 2) and (1, 1) or None; to (S, 6 * depth + 2, C)."""
        return ops.concat(self.dit.modulations(timestep, image_size, aspect_ratio), 1)


class DenoisingGraphs:
    """The graphs of a DiT's denoising, kept so that they are compiled once however often images are drawn."""

    joined = True  # one call computes both halves of guidance, unless it is told otherwise
    guided_step = GuidedStep

    def __init__(self, dit):
        self.dit = dit
        self.text_kv, self.modulations = TextKV(dit), Modulations(dit)
        self._steps, self._controls, self._sums = {}, {}, {}

    def of_controlnet(self, controlnet):
        """ControlGraphs of a ControlNet."""
        if controlnet not in self._controls:
            self._controls[controlnet] = ControlGraphs(self.dit, controlnet)
        return self._controls[controlnet]

    def control(self, controls):
        """ControlSum of Controls, or None."""
        if not controls:
            return None
        key = tuple(one.controlnet for one in controls), controls[0].guess
        if key not in self._sums:
            self._sums[key] = ControlSum(*key)
        return self._sums[key]

    def step(self, sampler, guided, shape, halves=False, kind=PLAIN, rescale=0.0, perturbed=(), control=None):
        """The step for latents of this shape, arguments as of GuidedStep. Samplers of one graph share it."""
        how = guided, guided and halves, kind, rescale if guided or perturbed else 0.0, perturbed, control
        if (sampler.graph, how) not in self._steps:
            self._steps[sampler.graph, how] = self.guided_step(self.dit, sampler, *how)
        return self._steps[sampler.graph, how]

    def halves(self, unconditional, conditional):
        """The halves of a tensor that the step computes with, one after the other."""
        return ops.concat((unconditional, conditional), 0)


def denoising_steps(
    graphs, latents, sampler, num_steps, caption, guidance_scale, unconditional=None, conditions=None, halves=False,
    shortcuts=NO_SHORTCUTS, fresh_noise=None, rescale=0.0, begin=None, pag=None, controls=(),
):  # fmt: skip
    """Generate the trajectory of the latents.

    Args:
        graphs: DenoisingGraphs.
        latents: Tensor (N, c, h, w) fp32, standard normal noise, or if `begin` is given as the row there has them.
        sampler: Sampler.
        num_steps: steps of its table.
        caption: (states, mask) for N images.
        guidance_scale: weight of guidance; used if `unconditional` is given.
        unconditional: (states, mask) for N images, of the same length as caption's, or None for no guidance.
        conditions: (image_size (1, 2), aspect_ratio (1, 1)) of all images, or None.
        halves: compute guidance's two halves one after the other, in half the memory.
        shortcuts: Shortcuts; none by default.
        fresh_noise: function (k, shape) of the k-th draw of a sampler that `draws`, float32 (N, c, h, w).
        rescale: of the guided noise, see `guide`.
        begin: row of the table where the trajectory begins; None: it is a whole one.
        pag: PerturbedAttention, or None.
        controls: list of Control.

    Yields:
        first the prepared text_kv (so that the caller can free the text encoder), then a Step for each of the table;
        latents that are sent back replace the step's.
    """
    if sampler.draws and fresh_noise is None:
        raise MindSigmaError(f"{type(sampler).__name__} draws noise at every step: give fresh_noise")
    guided, table = unconditional is not None, sampler.table(num_steps, begin or 0)
    if begin is None and sampler.start_scale(table) != 1:
        latents = Tensor(latents.asnumpy() * np.float32(sampler.start_scale(table)))
    plan = shortcuts.plan(len(table), guided, begin or 0, pag is not None)
    plan = plan if pag is None else pag.limit(plan, table)
    plan = controlled(plan, controls, begin or 0)
    step = graphs.step(sampler, guided, latents.shape, halves, rescale=rescale, perturbed=pag.layers if pag else ())
    halves = step.halves

    def of_captions(cell, guided):
        """What a cell makes of the captions; with `halves` a pair."""
        if guided and halves:
            return cell(*unconditional), cell(*caption)
        if guided:
            return cell(*(graphs.halves(*pair) for pair in zip(unconditional, caption)))
        return cell(*caption)

    text_kv = of_captions(graphs.text_kv, guided)
    yield text_kv

    # What depends on the timestep or the size alone is made before the first step.
    timesteps = Tensor(np.array([row.timestep for row in table], np.float32))
    modulations = split(graphs.modulations(timesteps, *(conditions or ())), len(table), 0)
    position = step.position(latents.shape)
    control_inputs = ControlInputs(controls, graphs, step, latents.shape)
    control_inputs.prepare(of_captions, guided, timesteps, conditions or ())
    in_graph = ms.get_context("mode") == ms.GRAPH_MODE
    mutable = ms.mutable if in_graph else lambda value: value  # inputs of the graph, not constants of it
    texts = {}  # by what is guided and perturbed
    for how in plan:
        if (how.guided, how.perturbed) not in texts:
            own = text_kv if how.guided == guided else conditional_text_kv(text_kv, halves)
            if how.perturbed:
                own = with_perturbed(own, pag.layers[0], latents.shape[0], how.guided and halves)
            texts[how.guided, how.perturbed] = mutable(own)
    scale = scale_of_channels(guidance_scale, sampler.guided_channels, latents.shape[1])
    history = sampler.start_history(latents.shape)
    varying = mutable if history else tuple  # no tuple without elements is an input of a graph
    kept, kept_guided = None, guided
    drawn = draws_ahead(sampler, table, fresh_noise, latents.shape)
    for i, (row, how) in enumerate(zip(table, plan)):
        numbers = Tensor(np.array(row.numbers, np.float32)) if in_graph else row.numbers
        before, fresh = latents, drawn[i]
        perturbed, scales = (), scale
        if how.perturbed:
            perturbed, scales = pag.layers, mutable((scale, Tensor(pag.scale_at(row.timestep), ms.float32)))
        control = graphs.control([controls[k] for k in how.controls])
        step = graphs.step(sampler, how.guided, latents.shape, halves, how.kind, rescale, perturbed, control)
        text = texts[how.guided, how.perturbed]
        inputs = latents, varying(history), numbers, scales, text, modulations[i], position
        inputs += () if fresh is None and how.kind == PLAIN and control is None else (fresh,)
        if control is not None:
            inputs += None, mutable(control_inputs.at(i, how))
        if how.kind == PLAIN:
            latents, history = step(*inputs)
        else:
            if how.kind in (KEEP_TEXT, KEEP_BLOCKS):
                taken = ()
            else:
                taken = (mutable(conditional_half(kept, halves) if kept_guided and not how.guided else kept),)
            latents, history, kept = step(*inputs, *taken)
            kept_guided = how.guided
        clean = partial(clean_latents, sampler, row, before, latents, history, fresh)
        replacement = yield Step(i, len(table), row.timestep, latents, clean)
        latents = latents if replacement is None else replacement


def clean_latents(sampler, row, before, after, history, fresh):
    """`Sampler.clean` of tensors."""
    before, after, *history = (tensor.asnumpy() for tensor in (before, after, *history))
    return sampler.clean(row, before, after, tuple(history), None if fresh is None else fresh.asnumpy())


def draws_ahead(sampler, table, fresh_noise, shape):
    """Fresh noise (N, c, h, w) fp32 of every step, drawn before the first one, or None: no step waits for the host."""
    if not sampler.draws:
        return [None] * len(table)
    none = Tensor(np.zeros(shape, np.float32))  # where a step adds nothing of it
    return [
        Tensor(np.asarray(fresh_noise(sampler.first_draw + i, shape), np.float32)) if row.draws else none
        for i, row in enumerate(table)
    ]


def scale_of_channels(scale, guided, channels):
    """A guidance scale as fp32: a scalar tensor, or (1, channels, 1, 1) if only the first `guided` channels have it."""
    if guided is None or guided >= channels:
        return Tensor(scale, ms.float32)
    scales = np.ones((1, channels, 1, 1), np.float32)  # a scale of 1 is the conditional prediction
    scales[:, :guided] = scale
    return Tensor(scales)


def with_perturbed(text_kv, first, count, halves):
    """What a DiT takes of the captions, for perturbed attention from block `first` on of `count` images."""
    if halves:
        return text_kv[0], perturbed_text_kv(text_kv[1], first, count)
    return perturbed_text_kv(text_kv, first, count)

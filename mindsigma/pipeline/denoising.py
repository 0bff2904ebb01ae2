"""One guided denoising step as a cell, and the loop over the solver's table as a generator."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.diffusion.dpm_solver import MAX_ORDER
from mindsigma.ops.shared_graph import SharedGraph


@dataclass
class Step:
    """State after a denoising step: index from 0, number of steps, the model's timestep, latents (N, c, h, w) fp32."""

    index: int
    total: int
    timestep: float
    latents: Tensor


def advance(latents, history, numbers, guidance_scale, prediction, guided):
    """Guidance and one multistep update (see GuidedStep); prediction (2 * N or N, 2 * c, h, w) is the DiT's."""
    batch, channels = latents.shape[:2]
    noise = prediction[:, :channels].astype(ms.float32)
    if guided:
        unconditional, conditional = noise[:batch], noise[batch:]
        noise = unconditional + guidance_scale * (conditional - unconditional)
    x0 = (latents - numbers[2] * noise) / numbers[1]
    latents = numbers[3] * latents + numbers[4] * x0
    for i in range(MAX_ORDER - 1):
        latents = latents + numbers[5 + i] * history[i]
    return latents, ops.concat((x0.expand_dims(0), history[:-1]), 0)


def model_inputs(latents, numbers, guided):
    """Latents, doubled for guidance, and the timestep for each of them."""
    inputs = ops.concat((latents, latents), 0) if guided else latents
    return inputs, ops.broadcast_to(numbers[0:1], (inputs.shape[0],))


class GuidedStep(nn.Cell):
    """Noise prediction with classifier-free guidance and one multistep update. One graph in graph mode.

    Args:
        dit: the DiT.
        guided: whether the captions hold an unconditional half, first, and a conditional half.
    """

    def __init__(self, dit, guided):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.dit = dit
        self.model_inputs = SharedGraph(model_inputs, static=(guided,))
        self.advance = SharedGraph(advance, static=(guided,))

    def construct(self, latents, history, numbers, guidance_scale, keys, image_size=None, aspect_ratio=None):
        """Advance the latents by one step.

        Args:
            latents: (N, c, h, w) fp32.
            history: (MAX_ORDER - 1, N, c, h, w) fp32, earlier predictions of x0, the newest first.
            numbers: fp32 (4 + MAX_ORDER,): timestep, alpha, sigma, keep and weights of a SolverStep.
            guidance_scale: fp32 scalar tensor.
            keys: result of dit.encode_caption for 2 * N captions, or N if not guided.

        Returns:
            latents and history after the step.
        """
        inputs, timestep = self.model_inputs(latents, numbers)
        prediction = self.dit.denoise(inputs, timestep, keys, image_size, aspect_ratio)
        return self.advance(latents, history, numbers, guidance_scale, prediction)


class CaptionKeys(nn.Cell):
    """`DiT.encode_caption` as a graph of its own."""

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def construct(self, states, mask):
        """See DiT.encode_caption."""
        return self.dit.encode_caption(states, mask)


class DenoisingGraphs:
    """The graphs of a DiT's denoising, kept so that they are compiled once however often images are drawn."""

    def __init__(self, dit):
        self.caption_keys = CaptionKeys(dit)
        self.step = {guided: GuidedStep(dit, guided) for guided in (False, True)}

    def halves(self, unconditional, conditional):
        """The halves of a tensor that the step computes with, one after the other."""
        return ops.concat((unconditional, conditional), 0)

    def step_for(self, guided, shape):
        """The step for latents of this shape."""
        return self.step[guided]


def denoising_steps(graphs, latents, table, caption, guidance_scale, unconditional=None, conditions=None):
    """Generate the trajectory of the latents.

    Args:
        graphs: DenoisingGraphs.
        latents: start noise, Tensor (N, c, h, w) fp32.
        table: list of SolverStep.
        caption: (states, mask) for N images.
        guidance_scale: weight of guidance; used if `unconditional` is given.
        unconditional: (states, mask) for N images, of the same length as caption's, or None for no guidance.
        conditions: (image_size (N, 2), aspect_ratio (N, 1)) or None.

    Yields:
        first the prepared caption keys (so that the caller can free the text encoder), then a Step for each of the
        table; latents that are sent back replace the step's.
    """
    guided = unconditional is not None
    states, mask = caption
    if guided:
        states = graphs.halves(unconditional[0], states)
        mask = graphs.halves(unconditional[1], mask)
    keys = graphs.caption_keys(states, mask)
    yield keys

    step = graphs.step_for(guided, latents.shape)
    extra = ()
    if conditions is not None:
        extra = tuple(graphs.halves(value, value) if guided else value for value in conditions)
    if ms.get_context("mode") == ms.GRAPH_MODE:
        keys = ms.mutable(keys)  # inputs of the graph, not constants of it
    scale = Tensor(guidance_scale, ms.float32)
    history = ops.zeros((MAX_ORDER - 1,) + latents.shape, ms.float32)
    for i, entry in enumerate(table):
        weights = entry.weights + (0.0,) * (MAX_ORDER - len(entry.weights))
        numbers = np.array([entry.timestep, entry.alpha, entry.sigma, entry.keep, *weights], np.float32)
        latents, history = step(latents, history, Tensor(numbers), scale, keys, *extra)
        replacement = yield Step(i, len(table), entry.timestep, latents)
        latents = latents if replacement is None else replacement

"""What a training step minimises, as a cell that a method of training defines."""

import mindspore as ms
from mindspore import nn, ops

from mindsigma.ops.operators import split


class Objective(nn.Cell):
    """A loss, with whatever networks it needs beside the one that learns.

    Args:
        dit: DiT that learns, in training mode. Other networks of the objective get no gradient.

    Attributes:
        terms: names of what the loss is the sum of.
        averages: Parameters of another network that hold the moving averages, one for each of those that learn and in
            their order; empty: the step keeps the averages itself.
    """

    terms = ("loss",)
    averages = ()

    def __init__(self, dit):
        super().__init__(auto_prefix=False)
        self.dit = dit

    def set_learning(self, learning):
        """Put what learns into training mode, or out of it; other networks stay as they are."""
        self.dit.set_train(learning)

    def construct(self, *inputs):
        """From the tensors of a micro-batch a tuple: an fp32 scalar for each of `terms`, then what is handed on."""
        raise NotImplementedError


def noise_part(output, latents):
    """The noise that a network predicts for latents (N, c, h, w), fp32 (N, c, h, w), from its output of c or 2 c."""
    if output.shape[1] != latents.shape[1]:
        output = split(output, 2, 1)[0]
    return output.astype(ms.float32)


def noise_of_both(dit, latents, timestep, text, null, conditions):
    """The noise predicted without and with the caption, fp32 (N, c, h, w) each, by one call of the network.

    Args:
        timestep: fp32 (N,).
        text: caption (N, L, d) and its mask (N, L).
        null: null caption (1, L, d) and its mask (N, L).
        conditions: micro conditions, none or two.
    """
    caption, mask = text
    latents, timestep = twice(latents), twice(timestep)
    states = ops.concat((ops.broadcast_to(null[0], caption.shape), caption), 0)
    output = dit(latents, timestep, states, ops.concat((null[1], mask), 0), *[twice(one) for one in conditions])
    return split(noise_part(output, latents), 2, 0)


def twice(x):
    """x (N, ...) and again x: (2 N, ...)."""
    return ops.concat((x, x), 0)

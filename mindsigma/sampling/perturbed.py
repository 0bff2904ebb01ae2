"""Perturbed-attention guidance (PAG, arXiv 2403.17377): away from what the network predicts without its self-attention.

In chosen blocks every token of the perturbed images attends to itself alone; all else of them is the conditional
images', prompt included. Guidance adds scale * (conditional - perturbed) to the noise, with or without an unconditional
half. Until the first chosen block the perturbed images are the conditional ones, so they exist from there on only.
"""

from dataclasses import dataclass, replace
from typing import Tuple

from mindspore import nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.models.checks import check_modulation
from mindsigma.ops.operators import narrow
from mindsigma.sampling.schedule import NUM_TRAIN_STEPS


@dataclass(frozen=True)
class PerturbedAttention:
    """How an image is led by it.

    Attributes:
        layers: numbers of the blocks, from 0, ascending.
        scale: of guidance.
        adaptive_scale: the scale falls by so much with every timestep from 1000 down, at most to 0.
    """

    layers: Tuple[int, ...]
    scale: float
    adaptive_scale: float = 0.0

    def scale_at(self, timestep):
        """The scale of a step."""
        return max(0.0, self.scale - self.adaptive_scale * (NUM_TRAIN_STEPS - timestep))

    def limit(self, plan, rows):
        """List of StepPlan for the Rows of a trajectory: no images are perturbed where the scale is 0."""
        return [
            replace(how, perturbed=how.perturbed and self.scale_at(row.timestep) > 0) for how, row in zip(plan, rows)
        ]


def chosen_layers(layers, depth):
    """Layers in order, each once; None is the middle one. Raises MindSigmaError for those that the model lacks."""
    if layers is None:
        return (depth // 2,)
    if max(layers) >= depth:
        raise MindSigmaError(f"pag_layers (--pag-layers) {max(layers)}: the model has the blocks 0 ... {depth - 1}")
    return tuple(sorted(set(layers)))


class PerturbedDiT(nn.Cell):
    """`DiT.denoise` of images, and of the conditional ones among them once more with perturbed attention.

    Args:
        dit: the DiT.
        layers: of PerturbedAttention.
        guided: the first half of the images is the unconditional one.
    """

    def __init__(self, dit, layers, guided):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.dit, self.layers, self.guided = dit, layers, guided

    def construct(self, latents, modulation, text_kv, position, kept=None, gather=None, control=None):
        """Predict noise and variance as `DiT.denoise` does.

        Args:
            text_kv: of `perturbed_text_kv`.
            kept: of no meaning here.
            control: of `DiT.run`; the perturbed images get what is added to the conditional ones.

        Returns:
            the predictions (M, out_channels, h, w) for latents (M, c, h, w), and those of the perturbed images (N, ...)
            with N = M / 2 if guided, else M.
        """
        dit, images = self.dit, latents.shape[0]
        check_modulation(modulation.shape, images)
        height, width = latents.shape[2] // dit.config.patch_size, latents.shape[3] // dit.config.patch_size
        rows = dit.split_modulation(modulation)
        x = dit.x_embedder(latents.astype(dit.dtype), position)
        count = images // 2 if self.guided else images
        added = ()
        for i, block in enumerate(dit.blocks):
            if i == 1 and control is not None:
                added = control(x if self.layers[0] > 0 else narrow(x, 0, 0, images))
            if 1 <= i <= len(added):
                x = x + (added[i - 1] if i <= self.layers[0] else with_last_again(added[i - 1], count))
            if i == self.layers[0]:
                x = with_last_again(x, count)
            perturbed = count if i in self.layers else 0
            x, _ = block(x, rows[i], text_kv[i][0], text_kv[i][1], height, width, gather, None, perturbed)
        prediction = dit.final_layer(x, rows[dit.config.depth], height, width)
        return narrow(prediction, 0, 0, images), narrow(prediction, 0, images, count)


def perturbed_text_kv(text_kv, first, count):
    """`DiT.text_kv`, from block `first` on with the last `count` images' once more, for the perturbed ones."""
    pairs = ()
    for i, (k, v) in enumerate(text_kv):
        pairs += ((k, v) if i < first else (with_last_again(k, count), with_last_again(v, count)),)
    return pairs


def with_last_again(x, count):
    """The last `count` places of x along the first axis a second time after all."""
    return ops.concat((x, narrow(x, 0, x.shape[0] - count, count)), 0)

"""A call of a DiT that keeps what changes little from step to step, or takes it from a call before."""

from mindspore import nn

from mindsigma.models.checks import check_modulation
from mindsigma.ops.operators import split
from mindsigma.sampling.shortcuts import KEEP_BLOCKS, KEEP_TEXT, PLAIN, TAKE_BLOCKS, TAKE_TEXT, repeated_blocks


class ReusingDiT(nn.Cell):
    """`DiT.denoise` of one kind (sampling/shortcuts.py).

    Args:
        dit: the DiT.
        kind: PLAIN or one of KEEP_ and TAKE_.
    """

    def __init__(self, dit, kind):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.dit, self.kind = dit, kind
        self.first = self.last = dit.config.depth  # of the blocks that are repeated; none by default
        if kind in (KEEP_BLOCKS, TAKE_BLOCKS):
            self.first, self.last = repeated_blocks(dit.config.depth)

    def construct(self, latents, modulation, text_kv, position, kept=None, control=None):
        """Predict noise and variance as `DiT.denoise` does.

        Args:
            control: of `DiT.run`, for the plain kind only.
            kept: second result of a call of the KEEP_ kind for latents of the same shape; not looked at by KEEP_.

        Returns:
            the prediction (N, out_channels, h, w), and a tuple: of (N, T, C) for each block, what cross-attention adds
            to the tokens; or of one, what the middle blocks add.
        """
        dit, kind = self.dit, self.kind
        if kind == PLAIN:
            return dit.denoise(latents, modulation, text_kv, position, control=control), kept
        check_modulation(modulation.shape, latents.shape[0])
        height, width = latents.shape[2] // dit.config.patch_size, latents.shape[3] // dit.config.patch_size
        rows = dit.split_modulation(modulation)
        x = dit.x_embedder(latents.astype(dit.dtype), position)
        changes, before = (), x
        for i, block in enumerate(dit.blocks):
            if i == self.first:
                before = x
                if kind == TAKE_BLOCKS:
                    x = x + kept[0]
            if kind != TAKE_BLOCKS or i < self.first or i >= self.last:
                taken = kept[i] if kind == TAKE_TEXT else None
                x, change = block(x, rows[i], text_kv[i][0], text_kv[i][1], height, width, None, taken)
                changes += (change,)
            if kind == KEEP_BLOCKS and i + 1 == self.last:
                kept = (x - before,)
        if kind == KEEP_TEXT:
            kept = changes
        return dit.final_layer(x, rows[dit.config.depth], height, width), kept


def conditional_half(kept, halves):
    """What was kept of both halves, for the conditional one alone; halves: it is a pair, one result for each."""
    if halves:
        return kept[1]
    return tuple(split(tensor, 2, 0)[1] for tensor in kept)

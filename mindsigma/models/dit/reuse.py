"""A call of a DiT that keeps what changes little from step to step, or takes it from a call before."""

from mindspore import nn

from mindsigma.diffusion.shortcuts import KEEP_BLOCKS, KEEP_TEXT, TAKE_BLOCKS, TAKE_TEXT, repeated_blocks
from mindsigma.models.dit.dit import check_rows


class ReusingDiT(nn.Cell):
    """`DiT.denoise` of one kind (diffusion/shortcuts.py).

    Args:
        dit: the DiT.
        kind: one of KEEP_ and TAKE_.
    """

    def __init__(self, dit, kind):
        super().__init__(auto_prefix=False)  # the DiT's parameters keep their names
        self.dit = dit
        self.kind = kind
        self.first, self.last = 0, 0
        if kind in (KEEP_BLOCKS, TAKE_BLOCKS):
            self.first, self.last = repeated_blocks(dit.config.depth)

    def construct(self, latents, rows, keys, position, kept=None):
        """Predict noise and variance as `DiT.denoise` does.

        Args:
            kept: second result of a call of the KEEP_ kind for latents of the same shape; not looked at by KEEP_.

        Returns:
            the prediction (N, out_channels, h, w), and a tuple: of (N, T, C) for each block, what cross-attention adds
            to the tokens; or of one, what the middle blocks add.
        """
        dit, depth = self.dit, self.dit.config.depth
        p = dit.config.patch_size
        height, width = latents.shape[2] // p, latents.shape[3] // p
        check_rows(rows.shape, latents.shape[0])
        rows = dit.split_rows(rows)
        x = dit.embed_latents(latents.astype(dit.dtype), position)
        if self.kind == KEEP_TEXT:
            kept = ()
            for i, block in enumerate(dit.blocks):
                x, change = block.keep_text(x, rows[i], keys[i][0], keys[i][1], height, width)
                kept += (change,)
        elif self.kind == TAKE_TEXT:
            for i, block in enumerate(dit.blocks):
                x = block.take_text(x, rows[i], kept[i], height, width)
        else:
            start = x
            for i, block in enumerate(dit.blocks):
                if i == self.first:
                    start = x
                    if self.kind == TAKE_BLOCKS:
                        x = x + kept[0]
                if i == self.last and self.kind == KEEP_BLOCKS:
                    kept = (x - start,)
                if self.kind == KEEP_BLOCKS or i < self.first or i >= self.last:
                    x = block(x, rows[i], keys[i][0], keys[i][1], height, width)
        return dit.predict(x, rows[depth], height, width), kept


def conditional_half(kept, halves):
    """What was kept of both halves, for the conditional one alone; halves: it is a pair, one result for each."""
    if halves:
        return kept[1]
    return tuple(tensor[tensor.shape[0] // 2 :] for tensor in kept)

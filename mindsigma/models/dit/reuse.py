"""A call of a DiT that keeps what changes little from step to step, or takes it from a call before."""

from mindspore import nn

from mindsigma.diffusion.shortcuts import KEEP_BLOCKS, KEEP_TEXT, TAKE_BLOCKS, TAKE_TEXT, repeated_blocks
from mindsigma.models.dit.checks import check_rows
from mindsigma.models.dit.native_blocks import NativeBlocks


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
        self.ranges, self.native = (), None
        if kind in (KEEP_BLOCKS, TAKE_BLOCKS):
            first, last = repeated_blocks(dit.config.depth)
            self.ranges = ((0, first), (first, last), (last, dit.config.depth))
            if dit.native_blocks is not None:
                self.native = nn.CellList([NativeBlocks(dit, *some) for some in self.ranges])

    def construct(self, latents, rows, keys, position, kept=None):
        """Predict noise and variance as `DiT.denoise` does.

        Args:
            kept: second result of a call of the KEEP_ kind for latents of the same shape; not looked at by KEEP_.

        Returns:
            the prediction (N, out_channels, h, w), and a tuple: of (N, T, C) for each block, what cross-attention adds
            to the tokens; or of one, what the middle blocks add.
        """
        dit = self.dit
        height, width = latents.shape[2] // dit.config.patch_size, latents.shape[3] // dit.config.patch_size
        check_rows(rows.shape, latents.shape[0])
        latents = latents.astype(dit.dtype)
        x = dit.embed_latents(latents, position)
        if self.kind in (KEEP_TEXT, TAKE_TEXT):
            x, kept = self._reusing_text(x, rows, keys, height, width, kept)
        else:
            parts = rows if dit.takes_one_call() else dit.split_rows(rows)
            x = self._through(0, x, parts, keys, height, width)
            start = x
            x = x + kept[0] if self.kind == TAKE_BLOCKS else self._through(1, x, parts, keys, height, width)
            if self.kind == KEEP_BLOCKS:
                kept = (x - start,)
            x = self._through(2, x, parts, keys, height, width)
        return dit.predict_of_all(x, rows, latents), kept

    def _reusing_text(self, x, rows, keys, height, width, kept):
        dit = self.dit
        if dit.takes_one_call():
            if self.kind == TAKE_TEXT:
                return dit.native_blocks(x, rows, keys, height, width, "take", kept), kept
            return dit.native_blocks(x, rows, keys, height, width, "keep")
        rows = dit.split_rows(rows)
        if self.kind == TAKE_TEXT:
            for i, block in enumerate(dit.blocks):
                x = block.take_text(x, rows[i], kept[i], height, width)
            return x, kept
        kept = ()
        for i, block in enumerate(dit.blocks):
            x, change = block.keep_text(x, rows[i], keys[i][0], keys[i][1], height, width)
            kept += (change,)
        return x, kept

    def _through(self, part, x, rows, keys, height, width):
        """Tokens x (N, T, C) through the blocks before those that are repeated (0), through these (1), or after (2).

        rows: of all blocks, as one call takes them, else split.
        """
        if self.dit.takes_one_call():
            return self.native[part](x, rows, keys, height, width)
        for i in range(self.ranges[part][0], self.ranges[part][1]):
            x = self.dit.blocks[i](x, rows[i], keys[i][0], keys[i][1], height, width)
        return x


def conditional_half(kept, halves):
    """What was kept of both halves, for the conditional one alone; halves: it is a pair, one result for each."""
    if halves:
        return kept[1]
    return tuple(tensor[tensor.shape[0] // 2 :] for tensor in kept)

"""Rows in pieces, where what is made of all of them at once leaves holes in a card's memory."""

import math

from mindspore import ops

from mindsigma.ops.operators import fused, split_unevenly

# 640 MiB in half precision. Of 4096 px, guided, the MLP's hidden tokens take 1152, twice at once, more than any hole
# that a block's other tensors leave: memory was planned for a quarter more than what is alive.
MOST_NUMBERS = 5 << 26


def at_once(x, width):
    """Whether rows x (..., C) may become `width` numbers each all at once; on a CPU they always may."""
    return not fused() or len(piece_lengths(x.shape, width, MOST_NUMBERS)) == 1


def pieces_of(x, width):
    """Rows x (..., C) as a tuple of (n, C): the fewest pieces that may be computed `at_once`."""
    return split_unevenly(x.reshape(-1, x.shape[-1]), piece_lengths(x.shape, width, MOST_NUMBERS), 0)


@ops.constexpr
def piece_lengths(shape, width, most):
    """Rows of each piece of x of a shape (..., C), a tuple: the fewest of at most `most` numbers, `width` a row.

    All pieces but the last are of one length.
    """
    rows = math.prod(shape[:-1])
    count = -(-rows // max(1, most // width))
    length = -(-rows // count)
    return tuple(min(length, rows - begin) for begin in range(0, rows, length))

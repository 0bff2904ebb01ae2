"""The blocks of a DiT that one call of the native library computes: those without compression and q/k norms."""

from mindsigma.models.dit.block import NORM_EPS
from mindsigma.ops.kernels import NATIVE
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph

WEIGHTS = 12  # of a block, and two tensors of the caption


def native_blocks(x, rows, *rest):
    """x (N, T, C) through blocks; rows as of dit.all_rows.

    `rest`: keys and values of the caption for each block, number of heads, then the blocks' weights.
    """
    count = (len(rest) - 1) // (WEIGHTS + 2)
    heads, weights, tensors = rest[2 * count], rest[2 * count + 1 :], ()
    for i in range(count):
        tensors += rest[2 * i : 2 * i + 2] + weights[WEIGHTS * i : WEIGHTS * i + WEIGHTS]
    return native.blocks(x, rows, tensors, heads, NORM_EPS)


def leading_blocks(blocks, config, execution):
    """SharedGraph of `native_blocks` for the first blocks of a network, and their number; (None, 0) without any."""
    if execution.kernels != NATIVE or not execution.native or config.qk_norm:
        return None, 0
    count, weights = 0, ()
    while count < len(blocks) and not blocks[count].compressed:
        block = blocks[count]
        weights += block.attn.tensors + block.cross_attn.q_linear.tensors + block.cross_attn.proj.tensors
        weights += block.mlp.tensors
        count += 1
    return (SharedGraph(native_blocks, weights, (config.num_heads,)), count) if count > 0 else (None, 0)

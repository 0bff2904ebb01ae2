"""Blocks of a DiT that one call of the native library computes."""

from mindspore import nn

from mindsigma.models.dit.branches import NORM_EPS
from mindsigma.ops.kernels import NATIVE
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph


def native_blocks(x, rows, height, width, text, count, *rest):
    """x (N, T, C), on a grid of height x width, through `count` blocks; rows as of modulation.all_rows.

    `text`: see native.blocks. `rest`: keys and values of the caption for each block, with "take" what cross-attention
    adds in each; index of the first block, number of heads, whether there are q/k norms, sampling and factor of
    compression, for each block whether it has compression, and its number of weights, the name of the kernels; then
    the weights.
    """
    end = 3 * count if text == "take" else 2 * count
    first, heads, qk_norm, sampling, factor, compressed, lengths = rest[end : end + 7]
    weights, tensors = rest[end + 8 :], ()
    for i in range(count):
        tensors += rest[2 * i : 2 * i + 2]
        if text == "take":
            tensors += (rest[2 * count + i],)
        tensors += weights[: lengths[i]]
        weights = weights[lengths[i] :]
    rows = rows[:, 6 * first :] if first > 0 else rows
    return native.blocks(x, rows, tensors, heads, NORM_EPS, qk_norm, sampling, factor, height, width, compressed, text)


class NativeBlocks(nn.Cell):
    """Blocks first ... last - 1 of a DiT in one call, outside training and without low-rank changes."""

    def __init__(self, dit, first, last):
        super().__init__()
        config, blocks = dit.config, list(dit.blocks)[first:last]
        compression = config.kv_compression
        compressed = tuple(block.compressed for block in blocks)
        self.compressed = any(compressed)
        sampling, factor = (compression.sampling, compression.factor) if self.compressed else (None, 1)
        weights = [block.one_graph.weights for block in blocks]
        lengths = tuple(len(tensors) for tensors in weights)
        static = (first, config.num_heads, config.qk_norm, sampling, factor, compressed, lengths, NATIVE)
        self.first, self.last = first, last
        self.graph = SharedGraph(native_blocks, sum(weights, ()), static, of_operations=True)

    def construct(self, x, rows, keys, height, width, text="", changes=()):
        """Tokens x (N, height * width, C) through the blocks.

        Args:
            rows, keys: of all blocks, see DiT.denoise.
            text: "keep" for a further result, a tuple of what cross-attention adds in each block (N, T, C); "take" to
                add such `changes` instead.
        """
        if not self.compressed:
            height, width = 0, 0  # the graph does not depend on the grid: do not compile one for each
        tensors = ()
        for pair in keys[self.first : self.last]:
            tensors += (pair[0], pair[1])
        result = self.graph(x, rows, height, width, text, self.last - self.first, *tensors, *changes)
        return (result[0], result[1:]) if text == "keep" else result

"""A DiT block in one graph of native CPU kernels; norms, gates and sums ride in the passes of the linear maps."""

from mindspore import ops

from mindsigma.models.dit.kv_compression import compress
from mindsigma.ops.attention import attend, attend_qkv, prepare_keys
from mindsigma.ops.functional import layer_norm, linear
from mindsigma.ops.linear_chains import add_gated_linear, add_linear, modulated_linear, modulated_linear_gelu

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


def divide(qkv, height, width, kernels, qk_norm, sampling, factor, *weights):
    """Queries (N, T, C), keys and values (N, K, C) of qkv (N, T, 3 * C), compressed if asked for.

    `weights`: of the q/k norms and of the compression.
    """
    q, k, v = ops.split(qkv, qkv.shape[-1] // 3, -1)
    if qk_norm:
        q = layer_norm(q, QK_NORM_EPS, kernels, weights[0], weights[1])
        k = layer_norm(k, QK_NORM_EPS, kernels, weights[2], weights[3])
    if sampling is not None:
        # The same convolution and the same LayerNorm serve keys and values.
        weights = weights[4:] if qk_norm else weights
        k = compress(k, height, width, sampling, factor, kernels, weights)
        v = compress(v, height, width, sampling, factor, kernels, weights)
    return q, k, v


def native_block(
    x, rows, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, first_cross, *weights
):  # fmt: skip
    """Tokens x (N, T, C) after the block; rows (N or 1, 6, C) as of block.block_rows.

    `weights`: of self-attention, from `first_cross` of cross-attention (4 tensors), then of the MLP.
    """
    qkv = modulated_linear(x, rows, 0, NORM_EPS, weights[0], weights[1], kernels)
    if qk_norm or sampling is not None:
        q, keys, values = divide(qkv, height, width, kernels, qk_norm, sampling, factor, *weights[4:first_cross])
        keys, values = prepare_keys(keys, values, None, num_heads, kernels)
        out = attend(q, keys, values, num_heads, kernels)
    else:
        out = attend_qkv(qkv, num_heads, kernels)
    x = add_gated_linear(x, out, rows, 2, weights[2], weights[3], kernels)
    cross, mlp = weights[first_cross : first_cross + 4], weights[first_cross + 4 :]
    out = attend(linear(x, cross[0], cross[1], kernels), k, v, num_heads, kernels)
    x = add_linear(x, out, cross[2], cross[3], kernels)
    h = modulated_linear_gelu(x, rows, 3, NORM_EPS, mlp[0], mlp[1], kernels)
    return add_gated_linear(x, h, rows, 5, mlp[2], mlp[3], kernels)

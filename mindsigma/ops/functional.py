"""Linear maps, normalisations and activations as pure functions of tensors.

Each takes `kernels` where a fused Ascend operation exists. The `math` compositions are chosen for the CPU backend,
whose own LayerNorm, GroupNorm and GELU kernels are several times slower and whose Tanh is only good to 1e-4.
"""

import numpy as np
from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype

from mindsigma.ops.kernels import FUSED, is_native
from mindsigma.ops.low_rank import add_changes
from mindsigma.ops.native import operations as native

_matmul = ops.MatMul()
_matmul_transposed = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()

GELU_SCALE = 2.0 * (2.0 / np.pi) ** 0.5  # tanh(u) = 2 sigmoid(2u) - 1
GELU_CUBIC = GELU_SCALE * 0.044715


def linear(x, weight, bias=None):
    """Return x @ weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in) or any shape that flattens to it; or (weight, changes) with the low-rank changes of
            ops/low_rank.py.
        bias: (out,) or None.
    """
    changes = ()
    if isinstance(weight, tuple):
        weight, changes = weight
    shape = x.shape
    weight = weight.reshape(weight.shape[0], -1)
    x = x.reshape(-1, shape[-1])
    y = _matmul_transposed(x, weight)
    if len(changes) > 0:
        y = add_changes(y, x, weight, changes)
    if bias is not None:
        y = ops.bias_add(y, bias)
    return y.reshape(shape[:-1] + (weight.shape[0],))


def _row_mean(x):
    """Mean over the last axis of x (rows, columns), kept: a product with a constant column, faster than ReduceMean."""
    columns = x.shape[-1]
    return _matmul(x, ops.fill(x.dtype, (columns, 1), 1.0 / columns))


def _spread_column(column, width):
    """column (rows, 1) repeated to (rows, width).

    An outer product instead of broadcasting: a broadcasting operation of the CPU backend keeps index tables of four
    times the size of its output for as long as its graph lives, and is slower.
    """
    return _matmul(column, ops.fill(column.dtype, (1, width), 1.0))


def spread_rows(row, length, kernels):
    """row (N, 1, C) as an operand for (N, length, C): repeated for `math`, as it is for `fused`, which broadcasts."""
    if kernels == FUSED:
        return row
    return _batch_matmul(ops.fill(row.dtype, (row.shape[0], length, 1), 1.0), row)


def scale_and_shift(x, scale, shift, kernels):
    """x * scale + shift for x (N, T, C), scale and shift (N, 1, C)."""
    length = x.shape[1]
    return x * spread_rows(scale, length, kernels) + spread_rows(shift, length, kernels)


def layer_norm(x, eps, kernels, weight=None, bias=None):
    """LayerNorm over the last axis of x (N, T, C), with optional affine weight and bias (C,)."""
    channels = x.shape[-1]
    if kernels == FUSED:
        gamma = ops.ones((channels,), x.dtype) if weight is None else weight
        beta = ops.zeros((channels,), x.dtype) if bias is None else bias
        return mint.nn.functional.layer_norm(x, (channels,), gamma, beta, eps)
    rows = x.reshape(-1, channels)
    centred = rows - _spread_column(_row_mean(rows), channels)
    inverse = ops.rsqrt(_row_mean(centred * centred) + eps)  # (rows, 1)
    if weight is None:
        return (centred * _spread_column(inverse, channels)).reshape(x.shape)
    return ops.bias_add(centred * _matmul(inverse, weight.reshape(1, channels)), bias).reshape(x.shape)


def rms_norm(x, eps, kernels, weight):
    """T5's LayerNorm: x / rms(x) * weight over the last axis, without mean or bias; computed in x's dtype."""
    if kernels == FUSED:
        return ops.rms_norm(x, weight, eps)[0]
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    inverse = ops.rsqrt(_row_mean(rows * rows) + eps)
    return (rows * _matmul(inverse, weight.reshape(1, channels))).reshape(x.shape)


def group_norm(x, groups, weight, bias, eps, kernels):
    """GroupNorm of x (N, C, H, W) with weight and bias (C,)."""
    if is_native(x, kernels):
        return native.group_norm(x, groups, weight, bias, eps, False)
    if kernels == FUSED:
        return ops.group_norm(x, groups, weight, bias, eps)
    batch, channels, height, width = x.shape
    rows = x.reshape(batch * groups, -1)
    centred = rows - _spread_column(_row_mean(rows), rows.shape[1])
    inverse = ops.rsqrt(_row_mean(centred * centred) + eps)  # (N * groups, 1)
    # The norm's scale and the weight in one pass over the image.
    scale = ops.broadcast_to(inverse, (batch * groups, channels // groups)).reshape(batch, channels) * weight
    scaled = centred.reshape(-1, height * width) * _spread_column(scale.reshape(-1, 1), height * width)
    return ops.bias_add(scaled.reshape(x.shape), bias)


def group_norm_silu(x, groups, weight, bias, eps, kernels):
    """SiLU of `group_norm`."""
    if is_native(x, kernels):
        return native.group_norm(x, groups, weight, bias, eps, True)
    return silu(group_norm(x, groups, weight, bias, eps, kernels))


def gelu_tanh(x, kernels):
    """GELU in the tanh approximation, the one PixArt-Σ and T5 v1.1 were trained with."""
    if kernels == FUSED:
        return ops.gelu(x, approximate="tanh")
    return x * ops.sigmoid(x * (GELU_SCALE + GELU_CUBIC * x * x))


def silu(x):
    """x * sigmoid(x)."""
    return x * ops.sigmoid(x)


def upsample_nearest_2x(x):
    """Repeat every pixel of x (N, C, H, W) twice along both axes."""
    return mint.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


def sinusoid(positions, dim, max_period=10000.0):
    """Timestep features [cos | sin] of positions (N,), fp32 (N, dim) (reference.md 2.2)."""
    half = dim // 2
    frequencies = np.exp(-np.log(max_period) * np.arange(half) / half).astype(np.float32)
    angles = positions.astype(mstype.float32).reshape(-1, 1) * Tensor(frequencies).reshape(1, -1)
    return ops.concat((ops.cos(angles), ops.sin(angles)), -1)

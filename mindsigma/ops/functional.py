"""Linear maps, normalisations and activations as pure functions of tensors.

Each takes `kernels` where a fused Ascend operation exists (ops/ascend.py). The `math` compositions are chosen for the
CPU backend, whose own LayerNorm, GroupNorm and GELU kernels are several times slower and whose Tanh is only good to
1e-4.
"""

import numpy as np
from mindspore import Tensor, mint, ops
from mindspore import dtype as mstype

from mindsigma.ops import ascend
from mindsigma.ops.derivatives import (
    add_bias,
    gelu,
    native_linear,
    native_linear_with_bias,
    normalise,
    row_mean,
    spread_column,
)
from mindsigma.ops.kernels import for_ascend, has_written_gradients, is_learning_natively, is_native
from mindsigma.ops.low_rank import add_changes
from mindsigma.ops.native import operations as native

_matmul = ops.MatMul()
_matmul_transposed = ops.MatMul(transpose_b=True)
_batch_matmul = ops.BatchMatMul()


def linear(x, weight, bias=None, kernels=None):
    """Return x @ weight^T + bias.

    Args:
        x: (..., in).
        weight: (out, in) or any shape that flattens to it; or (weight, changes) with the low-rank changes of
            ops/low_rank.py.
        bias: (out,) or None.
        kernels: MATH for the gradient of the bias that is fast on a CPU, TRAINING for all three.
    """
    changes = ()
    if isinstance(weight, tuple):
        weight, changes = weight
    shape = x.shape
    weight = weight.reshape(weight.shape[0], -1)
    x = x.reshape(-1, shape[-1])
    if is_learning_natively(x, kernels) and len(changes) == 0 and native.takes(weight):
        y = native_linear(x, weight) if bias is None else native_linear_with_bias(x, weight, bias)
        return y.reshape(shape[:-1] + (weight.shape[0],))
    y = _matmul_transposed(x, weight)
    if len(changes) > 0:
        y = add_changes(y, x, weight, changes)
    if bias is not None:
        y = add_bias(y, bias) if has_written_gradients(kernels) else ops.bias_add(y, bias)
    return y.reshape(shape[:-1] + (weight.shape[0],))


def spread_rows(row, shape, kernels):
    """row (N or 1, 1, C) as an operand for `shape` (N, T, C): repeated, or as it is where Ascend broadcasts."""
    if for_ascend(kernels):
        return row
    batch, length, channels = shape
    if row.shape[0] == batch:
        return _batch_matmul(ops.fill(row.dtype, (batch, length, 1), 1.0), row)
    return _matmul(ops.fill(row.dtype, (batch * length, 1), 1.0), row.reshape(1, channels)).reshape(shape)


def scale_and_shift(x, scale, shift, kernels):
    """x * scale + shift for x (N, T, C), scale and shift (N or 1, 1, C)."""
    if for_ascend(kernels):
        return ascend.multiply_add(shift, x, scale, kernels)
    return x * spread_rows(scale, x.shape, kernels) + spread_rows(shift, x.shape, kernels)


def layer_norm(x, eps, kernels, weight=None, bias=None):
    """LayerNorm over the last axis of x (N, T, C), with optional affine weight and bias (C,)."""
    channels = x.shape[-1]
    if for_ascend(kernels):
        gamma = ops.ones((channels,), x.dtype) if weight is None else weight
        beta = ops.zeros((channels,), x.dtype) if bias is None else bias
        return ascend.layer_norm(x, gamma, beta, eps, kernels)
    rows = x.reshape(-1, channels)
    if weight is None:
        return normalise(rows, eps).reshape(x.shape)
    centred = rows - spread_column(row_mean(rows), channels)
    inverse = ops.rsqrt(row_mean(centred * centred) + eps)  # (rows, 1)
    return ops.bias_add(centred * _matmul(inverse, weight.reshape(1, channels)), bias).reshape(x.shape)


def rms_norm(x, eps, kernels, weight):
    """T5's LayerNorm: x / rms(x) * weight over the last axis, without mean or bias; computed in x's dtype."""
    if for_ascend(kernels):
        return ascend.rms_norm(x, weight, eps, kernels)
    channels = x.shape[-1]
    rows = x.reshape(-1, channels)
    inverse = ops.rsqrt(row_mean(rows * rows) + eps)
    return (rows * _matmul(inverse, weight.reshape(1, channels))).reshape(x.shape)


def group_norm(x, groups, weight, bias, eps, kernels):
    """GroupNorm of x (N, C, H, W) with weight and bias (C,)."""
    if is_native(x, kernels):
        return native.group_norm(x, groups, weight, bias, eps, False)
    if for_ascend(kernels):
        return ops.group_norm(x, groups, weight, bias, eps)
    batch, channels, height, width = x.shape
    rows = x.reshape(batch * groups, -1)
    centred = rows - spread_column(row_mean(rows), rows.shape[1])
    inverse = ops.rsqrt(row_mean(centred * centred) + eps)  # (N * groups, 1)
    # The norm's scale and the weight in one pass over the image.
    scale = ops.broadcast_to(inverse, (batch * groups, channels // groups)).reshape(batch, channels) * weight
    scaled = centred.reshape(-1, height * width) * spread_column(scale.reshape(-1, 1), height * width)
    return ops.bias_add(scaled.reshape(x.shape), bias)


def group_norm_silu(x, groups, weight, bias, eps, kernels, last_use=False):
    """SiLU of `group_norm`; of a `last_use` x may be overwritten by it."""
    if is_native(x, kernels):
        return native.group_norm(x, groups, weight, bias, eps, True, last_use)
    return silu(group_norm(x, groups, weight, bias, eps, kernels))


def gelu_tanh(x, kernels):
    """GELU in the tanh approximation, the one PixArt-Σ and T5 v1.1 were trained with."""
    if for_ascend(kernels):
        return ascend.gelu(x, kernels)
    return gelu(x)


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

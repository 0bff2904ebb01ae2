"""Shrinking keys and values on the token grid (paper section 3.2, reference.md 2.6)."""

from mindspore import ops

from mindsigma.ops.functional import layer_norm, spread_rows
from mindsigma.ops.kernels import for_ascend

NORM_EPS = 1e-5


def compress(x, height, width, sampling, factor, kernels, weights):
    """Keep one of factor² tokens of x (N, height * width, C); a remainder of rows and columns is dropped.

    Args:
        weights: for "conv" (sr_weight (C, 1, r, r), sr_bias (C,), norm_weight (C,), norm_bias (C,)), else empty.

    Returns:
        (N, (height // factor) * (width // factor), C); "uniform_every": (N, height * width // factor, C).
    """
    batch, length, channels = x.shape
    if sampling == "uniform_every":
        kept = length // factor
        return x[:, : kept * factor].reshape(batch, kept, factor, channels)[:, :, 0]
    rows, columns = height // factor, width // factor
    x = x.reshape(batch, height, width, channels)
    if rows * factor != height or columns * factor != width:
        x = x[:, : rows * factor, : columns * factor]
    x = x.reshape(batch, rows, factor, columns, factor, channels)
    if sampling == "conv":
        return _convolve(x, kernels, *weights)
    if sampling == "pool":
        return (_cell_sum(x) * (1.0 / factor**2)).reshape(batch, rows * columns, channels)
    return x[:, :, 0, :, 0].reshape(batch, rows * columns, channels)


def _cell_sum(x):
    """Sum over the cells of x (N, rows, r, columns, r, C): (N, rows, columns, C)."""
    total = None
    for i in range(x.shape[2]):
        for j in range(x.shape[4]):
            part = x[:, :, i, :, j]
            total = part if total is None else total + part
    return total


def _convolve(x, kernels, sr_weight, sr_bias, norm_weight, norm_bias):
    """Depthwise convolution whose stride is its kernel, a weighted sum inside each cell, and LayerNorm.

    x (N, rows, r, columns, r, C) to (N, rows * columns, C).
    """
    batch, rows, factor, columns, _, channels = x.shape
    tokens = rows * columns
    cell_weight = sr_weight.reshape(channels, factor * factor).transpose(1, 0)  # (r * r, C)
    if for_ascend(kernels):  # two passes instead of eleven, four of them strided copies
        total = (
            (x * cell_weight.reshape(1, 1, factor, 1, factor, channels)).sum((2, 4)).reshape(batch, tokens, channels)
        )
        return layer_norm(total + sr_bias, NORM_EPS, kernels, norm_weight, norm_bias)
    total = None
    for i in range(factor):
        for j in range(factor):
            row = cell_weight[i * factor + j].reshape(1, 1, channels)
            part = x[:, :, i, :, j].reshape(1, batch * tokens, channels)
            part = part * spread_rows(row, part.shape, kernels)
            total = part if total is None else total + part
    x = ops.bias_add(total.reshape(batch * tokens, channels), sr_bias).reshape(batch, tokens, channels)
    return layer_norm(x, NORM_EPS, kernels, norm_weight, norm_bias)

"""Shrinking keys and values on the token grid (paper section 3.2, reference.md 2.6)."""

from mindspore import ops

from mindsigma.ops.functional import layer_norm, spread_rows

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
        sr_weight, sr_bias, norm_weight, norm_bias = weights
        # A depthwise convolution whose stride is its kernel: a weighted sum inside each cell, no convolution needed.
        tokens = rows * columns
        cell_weight = sr_weight.reshape(channels, factor * factor).transpose(1, 0)  # (r * r, C)
        total = None
        for i in range(factor):
            for j in range(factor):
                row = cell_weight[i * factor + j].reshape(1, 1, channels)
                part = x[:, :, i, :, j].reshape(1, batch * tokens, channels)
                part = part * spread_rows(row, batch * tokens, kernels)
                total = part if total is None else total + part
        x = ops.bias_add(total.reshape(batch * tokens, channels), sr_bias).reshape(batch, tokens, channels)
        return layer_norm(x, NORM_EPS, kernels, norm_weight, norm_bias)
    return x[:, :, 0, :, 0].reshape(batch, rows * columns, channels)

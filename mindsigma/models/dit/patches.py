"""Latents to tokens and tokens to a prediction: patches, and the last modulated norm and linear map."""

from mindspore import nn, ops

from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.branches import NORM_EPS
from mindsigma.models.layers import Affine, normal, parameter, xavier_uniform
from mindsigma.ops.functional import linear
from mindsigma.ops.kernels import for_ascend
from mindsigma.ops.linear_chains import modulated_linear, takes_natively
from mindsigma.ops.native import operations as native


def embed_latents(latents, position, patch_size, kernels, weight, bias):
    """Tokens (N, T, C) of latents (N, c, h, w), with position (1, T, C)."""
    if takes_natively(latents, weight, kernels):
        return native.patch_embedding(latents, position, weight, bias)
    x = patchify(latents, patch_size)
    if for_ascend(kernels):
        return ascend.dense(x, weight.reshape(weight.shape[0], -1), bias, kernels) + position
    tokens = linear(x, weight, bias)
    return tokens + ops.tile(position, (tokens.shape[0], 1, 1))


def predict(x, rows, height, width, shift_row, patch_size, kernels, weight, bias):
    """Output (N, out, h, w) of tokens x (N, height * width, C), modulated by two of the rows (N or 1, R, C)."""
    if for_ascend(kernels):
        shift, scale = ascend.rows_of(rows[:, shift_row : shift_row + 2])
        x = ascend.dense(ascend.modulated_norm(x, shift, scale, kernels), weight, bias, kernels)
    else:
        x = modulated_linear(x, rows, shift_row, NORM_EPS, kernels, weight, bias)
    return unpatchify(x, height, width, patch_size)


def predict_like(x, rows, latents, shift_row, patch_size, kernels, weight, bias):
    """`predict` for the patches of latents (N, c, h, w)."""
    if takes_natively(x, weight, kernels):
        return native.patch_prediction(x, rows, latents, shift_row, NORM_EPS, weight, bias)
    height, width = latents.shape[2] // patch_size, latents.shape[3] // patch_size
    return predict(x, rows, height, width, shift_row, patch_size, kernels, weight, bias)


def patchify(latents, patch_size):
    """(N, c, h, w) to (N, T, c * p * p), tokens row by row, channels in the order of a convolution's kernel."""
    batch, channels, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, height // p, p, width // p, p)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(x, height, width, patch_size):
    """(N, height * width, p * p * c), channel last, to (N, c, height * p, width * p)."""
    batch, p = x.shape[0], patch_size
    x = x.reshape(batch, height, width, p, p, -1)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * p, width * p)


class PatchEmbedding(nn.Cell):
    """Weights of the patch convolution, initialised as a linear map of flattened patches."""

    def __init__(self, config, dtype):
        super().__init__()
        p, channels = config.patch_size, config.in_channels
        fan_in = channels * p * p
        init = xavier_uniform(fan_in, config.hidden_size)
        self.proj = Affine(fan_in, config.hidden_size, init, (config.hidden_size, channels, p, p), dtype=dtype)


class FinalLayer(nn.Cell):
    """Weights of the last modulation and linear map; the map starts at zero."""

    def __init__(self, config, dtype):
        super().__init__()
        features = config.patch_size**2 * config.out_channels
        self.linear = Affine(config.hidden_size, features, "zeros", dtype=dtype)
        self.scale_shift_table = parameter((2, config.hidden_size), normal(config.hidden_size**-0.5), dtype)

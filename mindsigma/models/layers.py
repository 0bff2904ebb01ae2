"""Holders of parameters with the names and shapes of the published checkpoints, and their initial distributions."""

import math

import mindspore as ms
from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, Uniform, initializer


def xavier_uniform(fan_in, fan_out):
    """Uniform initializer with variance 2 / (fan_in + fan_out)."""
    return Uniform(math.sqrt(6.0 / (fan_in + fan_out)))


def parameter(shape, init="zeros", dtype=ms.float32):
    """A Parameter whose random values are only drawn when no weights follow."""
    return Parameter(initializer(init, shape, dtype))


class Holder(nn.Cell):
    """Holds the parameters `weight` and, unless it is None, `bias`."""

    @property
    def tensors(self):
        """(weight, bias), or (weight,) without bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


class Affine(Holder):
    """weight (out, in) or `shape`, and bias (out,) unless `has_bias` is False."""

    def __init__(self, in_features, out_features, init=None, shape=None, has_bias=True, dtype=ms.float32):
        super().__init__()
        init = xavier_uniform(in_features, out_features) if init is None else init
        self.weight = parameter(shape or (out_features, in_features), init, dtype)
        self.bias = parameter((out_features,), "zeros", dtype) if has_bias else None


class Norm(Holder):
    """weight and, unless `has_bias` is False, bias (channels,) of a normalisation."""

    def __init__(self, channels, has_bias=True, dtype=ms.float32):
        super().__init__()
        self.weight = parameter((channels,), "ones", dtype)
        self.bias = parameter((channels,), "zeros", dtype) if has_bias else None


def normal(sigma):
    """Zero-mean normal initializer."""
    return Normal(sigma)

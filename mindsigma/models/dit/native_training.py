"""A block in training as one call of the native library, and its backward pass as another. For blocks in fp32."""

import numpy as np
from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.derivatives import training_block
from mindsigma.ops.low_rank import merged
from mindsigma.ops.native import direct
from mindsigma.ops.native.operations import block_plan, block_plan_tensor


def native_block(
    x, modulation, caption, mask, height, width, heads, eps, qk_norm, sampling, factor, table, *weights
):  # fmt: skip
    """A block in training: tokens x (N, T, C), the timestep's modulation (N, 6 * C), the projected caption (N, L, C).

    Its mask is (N, L) or None; `weights` as of native.training_block, with the changes of ops/low_rank.py.
    """
    kept = ops.ones(caption.shape[:2], mstype.float32) if mask is None else mask.astype(mstype.float32) - 0.5
    plain = ()
    for weight in weights:
        plain += (merged(weight),)
    plan = block_plan_tensor(*_arguments(x, height, width, heads, eps, qk_norm, sampling, factor))
    return training_block(x, modulation, caption, kept, table, plan, plain)


def native_block_keeping(
    x, modulation, caption, mask, height, width, heads, eps, qk_norm, sampling, factor, table, *weights
):  # fmt: skip
    """`native_block` of plain weights, from PyNative, and what its backward pass needs besides."""
    numbers = block_plan(*_arguments(x, height, width, heads, eps, qk_norm, sampling, factor))
    return direct.training_block(x, modulation, caption, _kept(caption, mask), table, numbers, weights)


def native_block_backward(
    gradient, saved, x, modulation, caption, mask, height, width, heads, eps, qk_norm, sampling, factor, table, *weights
):  # fmt: skip
    """Gradients of all that `native_block` takes but mask and grid, from that of its result."""
    kept = _kept(caption, mask)
    numbers = block_plan(*_arguments(x, height, width, heads, eps, qk_norm, sampling, factor))
    found = direct.training_block_gradient(gradient, saved, x, modulation, caption, kept, table, numbers, weights)
    return found[:3] + (None, None, None) + found[3:]


def _arguments(x, height, width, heads, eps, qk_norm, sampling, factor):
    """Those of `block_plan`."""
    return x.shape[1], heads, eps, qk_norm, sampling, factor, height, width, (sampling is not None,)


def _kept(caption, mask):
    if mask is None:
        return np.ones(caption.shape[:2], np.float32)
    return mask.asnumpy().astype(np.float32) - 0.5

"""A block in training as one call of the native library, and its backward pass as another.

For blocks in fp32 without compression and q/k norms.
"""

import numpy as np
from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.derivatives import training_block
from mindsigma.ops.low_rank import merged
from mindsigma.ops.native import direct


def native_block(x, modulation, caption, mask, heads, eps, table, *weights):
    """A block in training: tokens x (N, T, C), the timestep's modulation (N, 6 * C), the projected caption (N, L, C).

    Its mask is (N, L) or None; `weights`: weight and bias of qkv, proj, q, kv, the projection after it, fc1, fc2, with
    the changes of ops/low_rank.py.
    """
    kept = ops.ones(caption.shape[:2], mstype.float32) if mask is None else mask.astype(mstype.float32) - 0.5
    plain = ()
    for weight in weights:
        plain += (merged(weight),)
    return training_block(x, modulation, caption, kept, table, heads, eps, plain)


def native_block_keeping(x, modulation, caption, mask, heads, eps, table, *weights):
    """`native_block` of plain weights, from PyNative, and what its backward pass needs besides."""
    return direct.training_block(x, modulation, caption, _kept(caption, mask), table, weights, heads, eps)


def native_block_backward(gradient, saved, x, modulation, caption, mask, heads, eps, table, *weights):
    """Gradients of all that `native_block` takes but the mask, from that of its result."""
    kept = _kept(caption, mask)
    found = direct.training_block_gradient(gradient, saved, x, modulation, caption, kept, table, weights, heads, eps)
    return found[:3] + (None,) + found[3:]


def _kept(caption, mask):
    if mask is None:
        return np.ones(caption.shape[:2], np.float32)
    return mask.asnumpy().astype(np.float32) - 0.5

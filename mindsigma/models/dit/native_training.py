"""A block in training as one call of the native library, and its backward pass as another.

For blocks in fp32 without compression and q/k norms.
"""

from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.derivatives import training_block
from mindsigma.ops.low_rank import gradients_of_merged, merged
from mindsigma.ops.native import operations as native


def kept_tokens(mask, caption):
    """(N, L) of a caption (N, L, C), below 0 where its mask (N, L) drops a token; None drops none."""
    return ops.ones(caption.shape[:2], mstype.float32) if mask is None else mask.astype(mstype.float32) - 0.5


def native_block(x, modulation, caption, mask, heads, eps, table, *weights):
    """A block in training: tokens x (N, T, C), the timestep's modulation (N, 6 * C), the projected caption (N, L, C).

    Its mask is (N, L) or None; `weights`: weight and bias of qkv, proj, q, kv, the projection after it, fc1, fc2, with
    the changes of ops/low_rank.py.
    """
    return training_block(x, modulation, caption, kept_tokens(mask, caption), table, heads, eps, _merged(weights))


def native_block_keeping(x, modulation, caption, mask, heads, eps, table, *weights):
    """`native_block`, and what its backward pass needs besides."""
    kept = kept_tokens(mask, caption)
    return native.training_block(x, modulation, caption, kept, table, _merged(weights), heads, eps, True)


def native_block_backward(gradient, saved, x, modulation, caption, mask, heads, eps, table, *weights):
    """Gradients of all that `native_block` takes but the mask, then of weights' changes, from that of its result."""
    kept = kept_tokens(mask, caption)
    found = native.training_block_gradient(
        gradient, saved, x, modulation, caption, kept, table, _merged(weights), heads, eps
    )
    of_changes = ()
    for i in range(len(weights)):
        of_changes += gradients_of_merged(weights[i], found[4 + i])
    return found[:3] + (None,) + found[3:] + of_changes


def _merged(weights):
    result = ()
    for weight in weights:
        result += (merged(weight),)
    return result

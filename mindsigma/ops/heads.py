"""Attention heads in the width that Ascend's kernel takes: 72 columns become 80, by wider weights, not by padding.

FlashAttentionScore wants heads of a multiple of 16. Rows of zeros in the projections that make queries, keys and values
and columns of zeros in the one that takes the result give the same attention, exactly, at no cost a call. Column D of a
caption's heads carries the mask: every query holds 1 there, by its bias, and a dropped key MASKED.

Weights are widened once, when a network is loaded for sampling (backends/ascend.py). Where they are not, as in
training, the same functions stand in the graph, on weights, which are small beside activations.
"""

import numpy as np
from mindspore import Tensor, ops

from mindsigma.ops.operators import HEAD_MULTIPLE, dense, extend, narrow, split, split_unevenly

# Added to the logit of a dropped key: far enough for its weight to be exactly 0 in fp32 and fp16, and inside fp16's
# range also after the division by the scale that the kernel multiplies back.
MASKED = -3000.0


def project(x, linear, heads, width, first):
    """A Linear map of x (N, T, in) with heads of `width` columns: (N, T, heads * width).

    Args:
        heads: (number, D).
        first: value of the first new column of each head.
    """
    number, head_dim = heads
    if len(linear.changes) > 0:  # they were made for the narrow weight
        return widen_tokens(linear(x), number, head_dim, width, first)
    weight, bias = linear.weights(x.dtype)
    weight = widen_rows(weight, number, head_dim, width)
    return dense(x, weight, widen_rows(bias, number, head_dim, width, first=first))


def project_heads(x, linear, heads, width, parts, widened, apart=False):
    """Tuple of the `parts` of a Linear map of x (N, T, in), the first `widened` of them with heads of `width` columns.

    Args:
        heads: (number, D).
        apart: none may be a view, which keeps the whole (see `narrow`).
    """
    number, head_dim = heads
    channels = number * head_dim
    if len(linear.changes) > 0:  # they were made for the narrow weight
        as_trained, pieces = split(linear(x), parts, 2), ()
        for i in range(parts):
            piece = as_trained[i]
            pieces += (widen_tokens(piece, number, head_dim, width) if i < widened else piece,)
        return pieces
    weight, bias = linear.weights(x.dtype)
    weight = widen_rows(weight, number, head_dim, width, parts, widened)
    y = dense(x, weight, widen_rows(bias, number, head_dim, width, parts, widened))
    if widened in (0, parts):
        return split(y, parts, 2)
    if apart:
        return split_unevenly(y, (number * width,) * widened + (channels,) * (parts - widened), 2)
    result, end = (), 0
    for i in range(parts):
        begin, end = end, end + (number * width if i < widened else channels)
        result += (narrow(y, 2, begin, end - begin),)
    return result


def project_last(x, linear, heads, width, parts):
    """The last of the `parts` of `project_heads` alone, its heads of `width` columns: (N, T, heads * width)."""
    number, head_dim = heads
    channels = number * head_dim
    if len(linear.changes) > 0:
        return widen_tokens(narrow(linear(x), 2, (parts - 1) * channels, channels), number, head_dim, width)
    weight, bias = linear.weights(x.dtype)
    # Of an aligned network all parts are wide, or the last one is narrow.
    rows = number * width if weight.shape[0] == parts * number * width else channels
    begin = weight.shape[0] - rows
    weight = widen_rows(narrow(weight, 0, begin, rows), number, head_dim, width)
    return dense(x, weight, widen_rows(narrow(bias, 0, begin, rows), number, head_dim, width))


def join_heads(x, linear, heads, width):
    """A Linear map of x (N, T, heads * width), whose weight has narrow or wide columns."""
    number, head_dim = heads
    if len(linear.changes) > 0:
        return linear(narrow_tokens(x, number, head_dim))
    weight, bias = linear.weights(x.dtype)
    return dense(x, widen_columns(weight, number, head_dim, width), bias)


def mask_column(k, mask, heads, width):
    """Keys (N, L, heads * width) whose column D holds what drops the tokens where mask (N, L) is 0."""
    number, head_dim = heads
    # The kernel scales the whole product, so the penalty is divided by the scale beforehand.
    penalty = ((1.0 - mask.astype(k.dtype)) * (MASKED * head_dim**0.5)).reshape(mask.shape + (1, 1))
    column = _mask_columns(number, head_dim, width, k.dtype)  # (1, 1, number, width)
    return k + (penalty * column).reshape(k.shape)


def head_width(head_dim, masked=False):
    """Columns of an aligned head of `head_dim`; `masked`: with room for the mask's column."""
    return -(-(head_dim + masked) // HEAD_MULTIPLE) * HEAD_MULTIPLE


def _widen(x, outer, head_dim, width, first=0.0):
    """x as (outer, head_dim, rest) with rows up to `width`: one of `first`, then zeros; (outer, width, rest)."""
    x = x.reshape(outer, head_dim, -1)
    missing = width - head_dim
    if missing == 0:
        return x
    x = extend(x, 1, missing)
    return x if first == 0.0 else x + _one_row(head_dim, width, first, x.dtype)


@ops.constexpr
def _mask_columns(number, head_dim, width, dtype):
    """(1, 1, number, width) with 1 at `head_dim` of each head and zeros else, as a constant of the graph."""
    column = (np.arange(width) == head_dim).astype(np.float32)
    return Tensor(np.tile(column, (1, 1, number, 1)), dtype)


@ops.constexpr
def _one_row(head_dim, width, value, dtype):
    """(1, width, 1) with a value at `head_dim` and zeros else, as a constant of the graph."""
    return Tensor((np.arange(width) == head_dim).astype(np.float32).reshape(1, width, 1) * value, dtype)


def widen_rows(weight, num_heads, head_dim, width, parts=1, widened=None, first=0.0):
    """Rows of a weight or bias (parts * heads * D, ...) for aligned heads; of `widened` of its parts, the first ones.

    Args:
        first: value of the first new row of each head; the others are 0.
    """
    channels = num_heads * head_dim
    widened = parts if widened is None else widened
    rest = tuple(weight.shape[1:])
    if weight.shape[0] != parts * channels or width == head_dim or widened == 0:
        return weight  # aligned already, or nothing to do
    plain = (parts - widened) * channels
    wide = weight if plain == 0 else narrow(weight, 0, 0, widened * channels)
    wide = _widen(wide, widened * num_heads, head_dim, width, first).reshape((-1,) + rest)
    return wide if plain == 0 else ops.concat((wide, narrow(weight, 0, widened * channels, plain)), 0)


def widen_columns(weight, num_heads, head_dim, width):
    """Columns of a weight (out, heads * D) for aligned heads: (out, heads * width)."""
    out, channels = weight.shape
    if channels != num_heads * head_dim or width == head_dim:
        return weight
    return _widen(weight, out * num_heads, head_dim, width).reshape(out, -1)


def widen_stacked(x, columns, number, head_dim, width, parts, widened, first):
    """`widen_columns` or else `widen_rows` of K weights or biases at once, (K, *shape)."""
    count = x.shape[0]
    if columns:
        return _widen(x, count * x.shape[1] * number, head_dim, width).reshape(count, x.shape[1], -1)
    channels, rest = number * head_dim, tuple(x.shape[2:])
    plain = (parts - widened) * channels
    wide = x if plain == 0 else narrow(x, 1, 0, widened * channels)
    wide = _widen(wide, count * widened * number, head_dim, width, first).reshape((count, -1) + rest)
    return wide if plain == 0 else ops.concat((wide, narrow(x, 1, widened * channels, plain)), 1)


def narrow_stacked(x, columns, number, head_dim, width, parts, widened, first):
    """The reverse of `widen_stacked`, which its gradient is, too."""
    count = x.shape[0]
    if columns:
        return narrow(x.reshape(count * x.shape[1] * number, width), 1, 0, head_dim).reshape(count, x.shape[1], -1)
    rest, rows, plain = tuple(x.shape[2:]), widened * number * width, (parts - widened) * number * head_dim
    wide = x if plain == 0 else narrow(x, 1, 0, rows)
    heads = narrow(wide.reshape(count * widened * number, width, -1), 1, 0, head_dim).reshape((count, -1) + rest)
    return heads if plain == 0 else ops.concat((heads, narrow(x, 1, rows, plain)), 1)


def widen_tokens(x, num_heads, head_dim, width, first=0.0):
    """Tokens (N, L, heads * D) with aligned heads, where no weight can do it: a copy a call."""
    batch, length, _ = x.shape
    if width == head_dim:
        return x
    return _widen(x, batch * length * num_heads, head_dim, width, first).reshape(batch, length, -1)


def narrow_tokens(x, num_heads, head_dim):
    """The reverse of `widen_tokens`."""
    batch, length, channels = x.shape
    if channels == num_heads * head_dim:
        return x
    return narrow(x.reshape(batch, length, num_heads, -1), 3, 0, head_dim).reshape(batch, length, -1)

"""A DiT block as Ascend runs it: the mathematics of block.py in the fewest nodes (reference.md 2.5).

Attention is FlashAttentionScore in layout BSH on heads of aligned width (heads.py), so nothing is transposed or padded;
where one timestep holds for the whole batch, as in sampling, LayerNorm's own weight and bias are the modulation; a gate
and its residual are one Addcmul. In sampling a block without compression is 2 LayerNorm, 6 Dense, 1 Split,
2 FlashAttentionScore, 1 GeLU, 2 Addcmul and 1 Add on activations.
"""

from mindspore import ops

from mindsigma.models.dit.heads import head_width, narrow_tokens, widen_columns, widen_rows, widen_tokens
from mindsigma.models.dit.kv_compression import compress
from mindsigma.ops import ascend
from mindsigma.ops.attention import MASKED
from mindsigma.ops.functional import layer_norm, linear

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


def dense(x, weight, bias, kernels):
    """x weight^T + bias; a weight with low-rank changes (ops/low_rank.py) is more than one node."""
    if isinstance(weight, tuple):
        return linear(x, weight, bias)
    return ascend.dense(x, weight, bias, kernels)


def project_heads(x, weight, bias, heads, width, parts, widened, first, kernels):
    """Tuple of the `parts` of x weight^T + bias, the first `widened` of them with heads of `width` columns.

    Args:
        heads: (number, D).
        first: value of the first new column of each head.
    """
    number, head_dim = heads
    channels = number * head_dim
    if isinstance(weight, tuple):  # the changes are made for the narrow weight
        y = linear(x, weight, bias)
        pieces = ()
        for i in range(parts):
            piece = y[:, :, i * channels : (i + 1) * channels]
            pieces += (widen_tokens(piece, number, head_dim, width, first) if i < widened else piece,)
        return pieces
    weight = widen_rows(weight, number, head_dim, width, parts, widened)
    y = ascend.dense(x, weight, widen_rows(bias, number, head_dim, width, parts, widened, first), kernels)
    if parts == 1:
        return (y,)
    if widened in (0, parts):  # not ops.split, whose nodes in an exported graph name MindSpore's lines, not this one
        return ops.Split(-1, parts)(y)
    result, end = (), 0
    for i in range(parts):
        begin, end = end, end + (number * width if i < widened else channels)
        result += (y[:, :, begin:end],)
    return result


def join_heads(x, weight, bias, heads, width, kernels):
    """x weight^T + bias for x (N, T, heads * width) and a weight whose columns are narrow or wide."""
    number, head_dim = heads
    if isinstance(weight, tuple):
        return linear(narrow_tokens(x, number, head_dim), weight, bias)
    return ascend.dense(x, widen_columns(weight, number, head_dim, width), bias, kernels)


def modulated_norm(x, shift, scale, kernels):
    """LayerNorm of x (N, T, C) times scale plus shift, both (C,) or (N, 1, C)."""
    if len(scale.shape) == 1:
        return ascend.layer_norm(x, scale, shift, NORM_EPS, kernels)
    return ascend.multiply_add(shift, layer_norm(x, NORM_EPS, kernels), scale, kernels)


def rows_of(rows):
    """The rows of (N, K, C): K of (C,) where one holds for the batch, else of (N, 1, C)."""
    if rows.shape[0] == 1:
        return ops.unstack(rows.reshape(rows.shape[1:]), 0)
    result = ()
    for i in range(rows.shape[1]):
        result += (rows[:, i : i + 1],)
    return result


def caption_keys(caption, mask, num_heads, kernels, kv_weight, kv_bias):
    """Keys and values (N, L, heads * width) of a projected caption (N, L, C) with mask (N, L) or None."""
    head_dim = caption.shape[-1] // num_heads
    width = head_width(head_dim, True)
    k, v = project_heads(caption, kv_weight, kv_bias, (num_heads, head_dim), width, 2, 2, 0.0, kernels)
    if mask is None:
        return k, v
    # The kernel scales the whole product, so the penalty is divided by the scale beforehand.
    penalty = ((1.0 - mask.astype(k.dtype)) * (MASKED * head_dim**0.5)).reshape(mask.shape + (1, 1))
    column = widen_tokens(ops.zeros((1, 1, num_heads * head_dim), k.dtype), num_heads, head_dim, width, 1.0)
    return k + (penalty * column.reshape(1, 1, num_heads, width)).reshape(k.shape), v


def queries_keys_values(
    x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, qkv_weight, qkv_bias, *extra
):  # fmt: skip
    """What self-attention of tokens x (N, height * width, C) attends with and to, in aligned heads.

    Args:
        rows: see `ascend_block`.
        extra: weights of the q/k norms and of the compression.

    Returns:
        q (N, T, heads * width), k and v (N, K, heads * width).
    """
    head_dim = x.shape[-1] // num_heads
    heads, wide = (num_heads, head_dim), head_width(head_dim)
    shift, scale = rows_of(rows)[:2]
    h = modulated_norm(x, shift, scale, kernels)
    widened = widened_parts(qk_norm, sampling)
    q, k, v = project_heads(h, qkv_weight, qkv_bias, heads, wide, 3, widened, 0.0, kernels)
    if qk_norm:
        q = widen_tokens(layer_norm(q, QK_NORM_EPS, kernels, extra[0], extra[1]), num_heads, head_dim, wide)
        k = layer_norm(k, QK_NORM_EPS, kernels, extra[2], extra[3])
        extra = extra[4:]
    if sampling is not None:
        k = compress(k, height, width, sampling, factor, kernels, extra)
        v = compress(v, height, width, sampling, factor, kernels, extra)
    if widened < 3:
        k, v = widen_tokens(k, num_heads, head_dim, wide), widen_tokens(v, num_heads, head_dim, wide)
    return q, k, v


def attention_sum(x, gate, queries, keys, values, num_heads, kernels, proj_weight, proj_bias):
    """x + gate * attention of the results of `queries_keys_values`."""
    head_dim = x.shape[-1] // num_heads
    out = ascend.flash_attention(queries, keys, values, num_heads, head_dim**-0.5, kernels)
    out = join_heads(out, proj_weight, proj_bias, (num_heads, head_dim), head_width(head_dim), kernels)
    return ascend.multiply_add(x, out, gate, kernels)


def cross_attention(x, k, v, num_heads, kernels, q_weight, q_bias, proj_weight, proj_bias):
    """Cross-attention of x (N, T, C) to keys and values from `caption_keys`, not yet added to x."""
    head_dim = x.shape[-1] // num_heads
    heads, masked = (num_heads, head_dim), head_width(head_dim, True)
    (q,) = project_heads(x, q_weight, q_bias, heads, masked, 1, 1, 1.0, kernels)
    out = ascend.flash_attention(q, k, v, num_heads, head_dim**-0.5, kernels)
    return join_heads(out, proj_weight, proj_bias, heads, masked, kernels)


def feed_forward(x, shift, scale, gate, kernels, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """x + gate * MLP of x (N, T, C)."""
    h = modulated_norm(x, shift, scale, kernels)
    h = dense(ascend.gelu(dense(h, fc1_weight, fc1_bias, kernels), kernels), fc2_weight, fc2_bias, kernels)
    return ascend.multiply_add(x, h, gate, kernels)


def after_keys(x, rows, queries, keys, values, k, v, num_heads, kernels, *weights):
    """The rest of the block, from the results of `queries_keys_values`; other arguments as of `ascend_block`.

    `weights`: projection of self-attention, cross-attention (4 tensors), MLP.
    """
    _, _, gate_1, shift_2, scale_2, gate_2 = rows_of(rows)
    x = attention_sum(x, gate_1, queries, keys, values, num_heads, kernels, *weights[:2])
    x = x + cross_attention(x, k, v, num_heads, kernels, *weights[2:6])
    return feed_forward(x, shift_2, scale_2, gate_2, kernels, *weights[6:])


def ascend_block(
    x, rows, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, first_cross, *weights
):  # fmt: skip
    """Transform tokens x (N, height * width, C).

    Args:
        rows: (N or 1, 6, C): shift, 1 + scale, gate of attention, then of the MLP.
        k, v: from `caption_keys`.
        first_cross: place of cross-attention in `weights`: of self-attention, cross-attention (4 tensors), MLP.
    """
    queries, keys, values = queries_keys_values(
        x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, *weights[:2], *weights[4:first_cross]
    )
    return after_keys(x, rows, queries, keys, values, k, v, num_heads, kernels, *weights[2:4], *weights[first_cross:])


def keep_text(
    x, rows, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, first_cross, *weights
):  # fmt: skip
    """`ascend_block`, and what cross-attention added."""
    queries, keys, values = queries_keys_values(
        x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, *weights[:2], *weights[4:first_cross]
    )
    _, _, gate_1, shift_2, scale_2, gate_2 = rows_of(rows)
    x = attention_sum(x, gate_1, queries, keys, values, num_heads, kernels, *weights[2:4])
    change = cross_attention(x, k, v, num_heads, kernels, *weights[first_cross : first_cross + 4])
    return feed_forward(x + change, shift_2, scale_2, gate_2, kernels, *weights[first_cross + 4 :]), change


def take_text(
    x, rows, change, height, width, num_heads, kernels, qk_norm, sampling, factor, first_cross, *weights
):  # fmt: skip
    """`ascend_block` with what cross-attention added before."""
    queries, keys, values = queries_keys_values(
        x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, *weights[:2], *weights[4:first_cross]
    )
    _, _, gate_1, shift_2, scale_2, gate_2 = rows_of(rows)
    x = attention_sum(x, gate_1, queries, keys, values, num_heads, kernels, *weights[2:4])
    return feed_forward(x + change, shift_2, scale_2, gate_2, kernels, *weights[first_cross + 4 :])


def widened_parts(qk_norm, sampling):
    """How many of q, k, v the projection itself makes wide: a norm over the channels must not see the new columns."""
    return 0 if qk_norm else 1 if sampling is not None else 3

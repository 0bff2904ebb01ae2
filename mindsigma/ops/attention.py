"""Scaled dot-product attention: the one seam between the models and the kernel that computes it.

Keys and values are brought into the kernel's layout by `prepare_keys`, once, however many queries follow; `attend`
then answers queries. A key mask costs no mask tensor: it rides in an extra column of the heads, where the query holds
one and the key holds 0 (kept) or `MASKED` (dropped).
"""

from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.kernels import FUSED, is_native
from mindsigma.ops.native import operations as native

# Added to the logit of a dropped key: far enough for its weight to be exactly 0 in fp32 and fp16, and inside fp16's
# range also after the division by the scale that the fused kernel multiplies back.
MASKED = -3000.0

# Largest block of attention weights alive at once on the portable path, in elements.
MAX_SCORES = 1 << 24

# The fused kernel takes no others; fp32 goes through the portable path on every device.
FUSED_DTYPES = (mstype.float16, mstype.bfloat16)

_scores = ops.BatchMatMul(transpose_b=True)
_weighted = ops.BatchMatMul()


def _head_width(head_dim, masked, fused):
    """Columns of a head in the kernel's layout; the fused kernel wants a multiple of 16."""
    width = head_dim + (1 if masked else 0)
    return -(-width // 16) * 16 if fused else width


def _widen(x, width, first):
    """Append to x (..., D) columns up to `width`: `first` (a number or (..., 1)) and then zeros."""
    missing = width - x.shape[-1]
    if missing == 0:
        return x
    if isinstance(first, (int, float)):
        first = ops.full(x.shape[:-1] + (1,), first, dtype=x.dtype)
    if missing == 1:
        return ops.concat((x, first), -1)
    return ops.concat((x, first, ops.zeros(x.shape[:-1] + (missing - 1,), x.dtype)), -1)


def _is_fused(dtype, kernels):
    return kernels == FUSED and dtype in FUSED_DTYPES


def prepare_keys(k, v, mask, num_heads, kernels):
    """Bring keys and values (N, L, C) into the kernel's layout.

    Args:
        mask: (N, L), 1 keeps a key and 0 drops it, or None.

    Returns:
        k, v: (N, heads, L, D or D + 1) for `math`, (N, L, heads, D') for `fused`, D' a multiple of 16; for `native` as
            they are, or with a mask (N, L, C + 1) and (N, L, C), where the last column of k is 0 (kept) or `MASKED`.
    """
    batch, length, channels = k.shape
    if is_native(k, kernels):
        if mask is None:
            return k, v
        return ops.concat((k, ((1.0 - mask.astype(k.dtype)) * MASKED).reshape(batch, length, 1)), -1), v
    head_dim = channels // num_heads
    fused = _is_fused(k.dtype, kernels)
    width = _head_width(head_dim, mask is not None, fused)
    k = k.reshape(batch, length, num_heads, head_dim)
    v = v.reshape(batch, length, num_heads, head_dim)
    if mask is None:
        k = _widen(k, width, 0.0)
    else:
        # The fused kernel scales the whole product, the portable path scales only the query.
        penalty = MASKED * head_dim**0.5 if fused else MASKED
        column = ((1.0 - mask.astype(k.dtype)) * penalty).reshape(batch, length, 1, 1)
        k = _widen(k, width, ops.broadcast_to(column, (batch, length, num_heads, 1)))
    if fused:
        return k, _widen(v, width, 0.0)
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def attend(q, k, v, num_heads, kernels):
    """Attention of queries q (N, S, C) over prepared keys and values; returns (N, S, C)."""
    batch, length, channels = q.shape
    head_dim = channels // num_heads
    if is_native(q, kernels):
        return native.attention(q, k, v, num_heads, head_dim**-0.5, k.shape[-1] > channels)
    q = q.reshape(batch, length, num_heads, head_dim)
    if _is_fused(q.dtype, kernels):
        q = _widen(q, k.shape[-1], 1.0)
        out = ops.flash_attention_score(q, k, v, num_heads, scalar_value=head_dim**-0.5, input_layout="BSND")
        return out[..., :head_dim].reshape(batch, length, channels)
    q = _widen(q * head_dim**-0.5, k.shape[-1], 1.0).transpose(0, 2, 1, 3)  # (N, heads, S, D)
    out = _weighted_values(q, k, v)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, channels)


def attend_qkv(qkv, num_heads, kernels):
    """Attention among the rows of qkv (N, T, 3 * C), queries, keys and values side by side; returns (N, T, C)."""
    channels = qkv.shape[-1] // 3
    if is_native(qkv, kernels):
        return native.attention_of_qkv(qkv, num_heads, (channels // num_heads) ** -0.5)
    q, k, v = qkv[:, :, :channels], qkv[:, :, channels : 2 * channels], qkv[:, :, 2 * channels :]
    k, v = prepare_keys(k, v, None, num_heads, kernels)
    return attend(q, k, v, num_heads, kernels)


def _weighted_values(q, k, v):
    """softmax(q k^T) v for (N, heads, S, D), in as many pieces of the queries as `MAX_SCORES` asks for."""
    batch, heads, length, _ = q.shape
    scores = batch * heads * length * k.shape[2]
    pieces = -(-scores // MAX_SCORES)
    if pieces == 1:
        return _weighted(ops.softmax(_scores(q, k)), v)
    rows = -(-length // pieces)
    outputs = []
    for start in range(0, length, rows):
        piece = q[:, :, start : start + rows]
        if start > 0:
            # Without this order the scheduler keeps the weights of all pieces alive together.
            piece = ops.depend(piece, outputs[-1])
        outputs.append(_weighted(ops.softmax(_scores(piece, k)), v))
    return ops.concat(outputs, 2)


def attention_with_bias(q, k, v, bias, num_heads, kernels):
    """T5's attention: unscaled, with an additive bias (N or 1, heads, S, L); weights in fp32. Returns (N, S, C)."""
    batch, length, channels = q.shape
    head_dim = channels // num_heads
    if is_native(q, kernels):
        return native.attention(q, k, v, num_heads, 1.0, False, bias)
    q = q.reshape(batch, length, num_heads, head_dim).transpose(0, 2, 1, 3)
    k = k.reshape(batch, -1, num_heads, head_dim).transpose(0, 2, 1, 3)
    v = v.reshape(batch, -1, num_heads, head_dim).transpose(0, 2, 1, 3)
    weights = ops.softmax(_scores(q, k).astype(bias.dtype) + bias).astype(v.dtype)
    return _weighted(weights, v).transpose(0, 2, 1, 3).reshape(batch, length, channels)

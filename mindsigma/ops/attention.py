"""Scaled dot-product attention: the one seam between the models and the kernel that computes it.

Keys and values are brought into the kernel's layout by `prepare_keys`, once, however many queries follow; `attend`
then answers queries. A key mask costs no mask tensor: it rides in an extra column of the heads, where the query holds
one and the key holds 0 (kept) or `MASKED` (dropped). Ascend's blocks put that column into their weights instead
(models/dit/heads.py).
"""

from mindspore import ops

from mindsigma.ops.ascend import HEAD_MULTIPLE, flash_attention
from mindsigma.ops.derivatives import attention, native_attention
from mindsigma.ops.kernels import has_flash_attention, is_learning_natively, is_native
from mindsigma.ops.native import operations as native

# Added to the logit of a dropped key: far enough for its weight to be exactly 0 in fp32 and fp16, and inside fp16's
# range also after the division by the scale that the fused kernel multiplies back.
MASKED = -3000.0

# Largest block of attention weights alive at once on the portable path, in elements.
MAX_SCORES = 1 << 24

_scores = ops.BatchMatMul(transpose_b=True)
_weighted = ops.BatchMatMul()


def _with_column(x, column):
    """x (N, L, heads, D) with `column`, a number or (N, L, heads, 1), appended."""
    if isinstance(column, (int, float)):
        column = ops.full(x.shape[:-1] + (1,), column, dtype=x.dtype)
    return ops.concat((x, column), -1)


def prepare_keys(k, v, mask, num_heads, kernels):
    """Bring keys and values (N, L, C) into the kernel's layout.

    Args:
        mask: (N, L), 1 keeps a key and 0 drops it, or None.

    Returns:
        k, v: (N, heads, L, D) for `math`, keys with a column more if there is a mask; (N, L, C) if one
        FlashAttentionScore takes them as they are, and for `native`, with a mask (N, L, C + 1) and (N, L, C), where the
        last column of k is 0 (kept) or `MASKED`.
    """
    batch, length, channels = k.shape
    if is_native(k, kernels) or is_learning_natively(k, kernels):
        if mask is None:
            return k, v
        return ops.concat((k, ((1.0 - mask.astype(k.dtype)) * MASKED).reshape(batch, length, 1)), -1), v
    head_dim = channels // num_heads
    if mask is None and head_dim % HEAD_MULTIPLE == 0 and has_flash_attention(kernels, k.dtype):
        return k, v
    k = k.reshape(batch, length, num_heads, head_dim)
    v = v.reshape(batch, length, num_heads, head_dim)
    if mask is not None:
        column = ((1.0 - mask.astype(k.dtype)) * MASKED).reshape(batch, length, 1, 1)
        k = _with_column(k, ops.broadcast_to(column, (batch, length, num_heads, 1)))
    return k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)


def attend(q, k, v, num_heads, kernels):
    """Attention of queries q (N, S, C) over prepared keys and values; returns (N, S, C)."""
    batch, length, channels = q.shape
    head_dim = channels // num_heads
    if is_native(q, kernels):
        return native.attention(q, k, v, num_heads, head_dim**-0.5, k.shape[-1] > channels)
    if is_learning_natively(q, kernels):
        return native_attention(q, k, v, num_heads, head_dim**-0.5, k.shape[-1] > channels)
    if len(k.shape) == 3:
        return flash_attention(q, k, v, num_heads, head_dim**-0.5, kernels)
    q = q.reshape(batch, length, num_heads, head_dim) * head_dim**-0.5
    if k.shape[-1] > head_dim:
        q = _with_column(q, 1.0)
    out = attention(q.transpose(0, 2, 1, 3), k, v, MAX_SCORES)
    return out.transpose(0, 2, 1, 3).reshape(batch, length, channels)


def attend_qkv(qkv, num_heads, kernels):
    """Attention among the rows of qkv (N, T, 3 * C), queries, keys and values side by side; returns (N, T, C)."""
    channels = qkv.shape[-1] // 3
    if is_native(qkv, kernels):
        return native.attention_of_qkv(qkv, num_heads, (channels // num_heads) ** -0.5)
    q, k, v = ops.split(qkv, channels, -1)
    k, v = prepare_keys(k, v, None, num_heads, kernels)
    return attend(q, k, v, num_heads, kernels)


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

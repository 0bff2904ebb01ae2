"""The fused operations that Ascend graphs are made of, each with its stand-in for a host without an NPU.

Every function takes `kernels`: FUSED makes the node that an NPU runs, STAND_IN its documented semantics in operations
that every backend has. Nothing else in the project calls these kernels, so that a graph made of stand-ins differs from
the one that is exported in the insides of these functions alone.
"""

import mindspore as ms
from mindspore import mint, ops

from mindsigma.errors import MindSigmaError
from mindsigma.ops.kernels import FUSED

LARGEST_HEAD = 512
HEAD_MULTIPLE = 16


@ops.constexpr
def check_heads(query, key, value, num_heads):
    """Raise for shapes (N, S, C) that FlashAttentionScore refuses on the device, though an export lets them pass."""
    if len(query) != 3 or query[0] != key[0] or tuple(key) != tuple(value) or query[2] != key[2]:
        raise MindSigmaError(f"attention of queries {query}, keys {key}, values {value}: expected (N, S, C), (N, L, C)")
    width, rest = divmod(query[2], num_heads)
    if rest or width % HEAD_MULTIPLE or width > LARGEST_HEAD:
        raise MindSigmaError(
            f"{num_heads} heads of {query[2]} channels: FlashAttentionScore takes heads of a multiple of "
            f"{HEAD_MULTIPLE} up to {LARGEST_HEAD}"
        )


def flash_attention(q, k, v, num_heads, scale, kernels):
    """softmax(scale * q k^T) v in heads, by FlashAttentionScore in layout BSH, without mask or dropout.

    The stand-in keeps scores, weights and sums in fp32, as the kernel does, and rounds the result once.

    Args:
        q: (N, S, heads * D); k, v: (N, L, heads * D), of q's dtype; D a multiple of 16 up to 512.
        scale: of the products.

    Returns:
        (N, S, heads * D) in q's dtype.
    """
    check_heads(q.shape, k.shape, v.shape, num_heads)
    if kernels == FUSED:
        return ops.flash_attention_score(q, k, v, num_heads, scalar_value=scale, input_layout="BSH")
    batch, length, channels = q.shape
    width = channels // num_heads

    def heads(x):
        return x.astype(ms.float32).reshape(batch, -1, num_heads, width).transpose(0, 2, 1, 3)

    scores = ops.BatchMatMul(transpose_b=True)(heads(q), heads(k)) * scale
    out = ops.BatchMatMul()(ops.softmax(scores), heads(v))
    return out.transpose(0, 2, 1, 3).reshape(batch, length, channels).astype(q.dtype)


def layer_norm(x, gamma, beta, eps, kernels):
    """LayerNorm over the last axis of x (..., C), times gamma (C,) plus beta (C,); statistics in fp32."""
    if kernels == FUSED:
        return mint.nn.functional.layer_norm(x, (x.shape[-1],), gamma, beta, eps)
    wide = x.astype(ms.float32)
    centred = wide - wide.mean(-1, keep_dims=True)
    inverse = ops.rsqrt((centred * centred).mean(-1, keep_dims=True) + eps)
    return (centred * inverse * gamma.astype(ms.float32) + beta.astype(ms.float32)).astype(x.dtype)


def rms_norm(x, gamma, eps, kernels):
    """x / rms(x) * gamma over the last axis of x (..., C); statistics in fp32."""
    if kernels == FUSED:
        return ops.rms_norm(x, gamma, eps)[0]
    wide = x.astype(ms.float32)
    inverse = ops.rsqrt((wide * wide).mean(-1, keep_dims=True) + eps)
    return (wide * inverse * gamma.astype(ms.float32)).astype(x.dtype)


def gelu(x, kernels):
    """GELU in the tanh approximation."""
    if kernels == FUSED:
        return ops.gelu(x, approximate="tanh")
    wide = x.astype(ms.float32)
    scale = 2.0 * (2.0 / 3.141592653589793) ** 0.5  # tanh(u) = 2 sigmoid(2u) - 1, where a CPU's tanh is good to 1e-4
    return (wide * ops.sigmoid(wide * (scale + scale * 0.044715 * wide * wide))).astype(x.dtype)


def multiply_add(x, a, b, kernels):
    """x + a * b in one pass; x and b may be rows that are repeated to a's shape, or the other way round."""
    if kernels == FUSED:
        return ops.addcmul(x, a, b, 1)
    return (x.astype(ms.float32) + a.astype(ms.float32) * b.astype(ms.float32)).astype(a.dtype)


def dense(x, weight, bias, kernels):
    """x weight^T + bias for x (..., in), weight (out, in), bias (out,): one node; sums in fp32."""
    if kernels == FUSED:
        return ops.dense(x, weight, bias)
    product = ops.MatMul(transpose_b=True)(x.reshape(-1, x.shape[-1]), weight)
    return ops.bias_add(product, bias).reshape(x.shape[:-1] + (weight.shape[0],))

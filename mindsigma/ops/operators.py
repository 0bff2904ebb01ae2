"""The operators that networks are made of, each in two insides: Ascend's fused kernel, or portable operations.

This is the only place that tells them apart. A network is composed the same way for both, so what runs on a CPU proves
the composition that an NPU runs. The portable insides follow the documented semantics of the fused kernels: sums,
statistics and softmax in fp32, one rounding at the end.
"""

from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops import auto_generate

from mindsigma.errors import MindSigmaError

LARGEST_HEAD = 512
HEAD_MULTIPLE = 16
# FlashAttentionScore takes fp32, too, by CANN's page; MindSpore's own names half precision alone, and lets it pass. A
# DiT's heads get it, for --fp32-attention; a VAE's of 512 columns is portable, as every picture would hang on it.
LARGEST_FP32_HEAD = 256

# Attention weights of the portable path that are alive at once, in elements.
MAX_SCORES = 1 << 24

_composing_for = []  # devices, the last one counts

# What an NPU launches fast, by its primitives, where MindSpore's functions of the same meaning choose slow ones.
_assign = ops.Assign()
_add_product = auto_generate.AddcmulExt()
_add_product_kept = auto_generate.AddcmulExt()
_add_product_kept.add_prim_attr("recompute", False)
_add_layer_norm = auto_generate.AddLayerNormV2()
_convolve = auto_generate.Conv2DExt()
_embed = auto_generate.Embedding()
_copy_into = auto_generate.InplaceCopy()
_lerp = auto_generate.LerpScalar()
_mean = auto_generate.MeanExt()
_narrow_view = auto_generate.NarrowView()
_split_tensor = auto_generate.SplitTensor()
_split_with_size = auto_generate.SplitWithSize()
_unstack_view = auto_generate.UnstackExtView()

_pool = ops.MaxPool(kernel_size=2, strides=2, pad_mode="valid")  # ops.max_pool2d has a slow gradient on a CPU
_product = ops.BatchMatMul()
_product_transposed = ops.BatchMatMul(transpose_b=True)
_matmul_transposed = ops.MatMul(transpose_b=True)


each = ops.Map()  # a function of each element of tuples: a loop takes several times as long to compile


@contextmanager
def composing_for(device):
    """Compose for "Ascend" or "CPU" in the body, whatever MindSpore runs on: for graphs that are exported."""
    _composing_for.append(device)
    try:
        yield
    finally:
        _composing_for.pop()


@ops.constexpr
def fused():
    """Whether operators are Ascend's fused kernels, decided when a graph is compiled."""
    return (_composing_for[-1] if _composing_for else ms.get_context("device_target")) == "Ascend"


def dense(x, weight, bias=None):
    """x weight^T + bias for x (..., in), weight (out, in), bias (out,) or None; (..., out) in x's dtype."""
    if fused() and bias is not None:
        return ops.dense(x, weight, bias)
    dtype, shape = x.dtype, x.shape[:-1] + (weight.shape[0],)
    x = x.reshape(-1, x.shape[-1])
    if bias is None:
        return _matmul_transposed(x, weight).reshape(shape)
    # The fused kernel rounds once: half precision is multiplied and added to in fp32.
    product = _matmul_transposed(x.astype(ms.float32), weight.astype(ms.float32))
    return (product + bias.astype(ms.float32)).astype(dtype).reshape(shape)


def layer_norm(x, gamma, beta, eps):
    """LayerNorm over the last axis of x (..., C), times gamma (C,) plus beta (C,), each of x's dtype."""
    if fused():
        return mint.nn.functional.layer_norm(x, (x.shape[-1],), gamma, beta, eps)
    wide = ops.LayerNorm(-1, -1, eps)(x.astype(ms.float32), gamma.astype(ms.float32), beta.astype(ms.float32))[0]
    return wide.astype(x.dtype)


def plain_layer_norm(x, eps):
    """`layer_norm` without gamma and beta."""
    return layer_norm(x, filled(x.shape[-1:], 1.0, x.dtype), filled(x.shape[-1:], 0.0, x.dtype), eps)


def add_layer_norm(x, change, gamma, beta, eps):
    """x + change of one shape (..., C), and the `layer_norm` of it."""
    if fused():
        norm, _, _, total = _add_layer_norm(x, change, gamma, beta, eps, True)
        return total, norm
    x = x + change
    return x, layer_norm(x, gamma, beta, eps)


@ops.constexpr
def filled(shape, value, dtype):
    """A tensor of one number, as a constant of the graph."""
    return Tensor(np.full(shape, value, np.float32), dtype)


def rms_norm(x, gamma, eps):
    """x / rms(x) * gamma (C,) over the last axis of x (..., C)."""
    if fused():
        return ops.rms_norm(x, gamma, eps)[0]
    wide = x.astype(ms.float32)
    inverse = ops.rsqrt(mint.mean(wide * wide, -1, True) + eps)
    return (wide * inverse * gamma.astype(ms.float32)).astype(x.dtype)


def group_norm(x, groups, gamma, beta, eps):
    """GroupNorm of x (N, C, H, W), times gamma (C,) plus beta (C,)."""
    if fused():
        return ops.group_norm(x, groups, gamma, beta, eps)
    batch, channels, height, width = x.shape
    rows = x.astype(ms.float32).reshape(batch * groups, -1)
    centred = rows - rows.mean(-1, keep_dims=True)
    inverse = ops.rsqrt((centred * centred).mean(-1, keep_dims=True) + eps)  # (N * groups, 1)
    scale = inverse.reshape(batch, groups, 1) * gamma.astype(ms.float32).reshape(1, groups, -1)
    scaled = centred.reshape(batch, channels, height * width) * scale.reshape(batch, channels, 1)
    return ops.bias_add(scaled.reshape(x.shape), beta.astype(ms.float32)).astype(x.dtype)


def gelu(x):
    """GELU in the tanh approximation, the one that PixArt-Σ and T5 v1.1 were trained with."""
    if fused():
        return ops.gelu(x, approximate="tanh")
    wide = x.astype(ms.float32)
    scale = 2.0 * (2.0 / 3.141592653589793) ** 0.5  # tanh(u) = 2 sigmoid(2u) - 1; a CPU's sigmoid is the faster one
    return (wide * ops.sigmoid(wide * (scale + scale * 0.044715 * wide * wide))).astype(x.dtype)


def silu(x):
    """x * sigmoid(x)."""
    return x * ops.sigmoid(x)


def convolution(x, weight, bias, stride, padding):
    """Convolution of x (N, C, H, W) with weight (O, C, k, k), plus bias (O,).

    padding: zeros around the image: top, bottom, left, right.
    """
    top, bottom, left, right = padding
    if top != bottom or left != right:  # neither kernel takes borders that differ
        pad = mint.nn.functional.pad if fused() else ops.pad
        x, top, left = pad(x, (left, right, top, bottom)), 0, 0
    if fused():
        return _convolve(x, weight, bias, (stride, stride), (top, left), (1, 1), 1)
    return ops.conv2d(x, weight, bias, stride, "pad", (top, left))


def upsample_2x(x):
    """Repeat every pixel of x (N, C, H, W) twice along both axes."""
    return mint.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")


def max_pool_2x(x):
    """Maximum of every 2 x 2 pixels of x (N, C, H, W); a last odd row or column is left out."""
    return mint.nn.functional.max_pool2d(x, 2) if fused() else _pool(x)


def embedding(table, ids):
    """Rows (N, C) of a table (V, C) by their numbers ids (N,), int32."""
    return _embed(ids, table, None, None, 2.0, False) if fused() else ops.gather(table, ids, 0)


def split(x, parts, axis):
    """Tuple of `parts` equal pieces of x along an axis, each in memory of its own."""
    return _split_tensor(x, x.shape[axis] // parts, axis) if fused() else ops.Split(axis, parts)(x)


def divide(x, lengths):
    """Tuple of the pieces of x (K, ...) of these lengths, each in memory of its own."""
    if len(lengths) == 1:
        return (x,)
    if not fused():
        return ops.split(x, lengths, 0)
    table, pieces, begin = x.reshape(x.shape[0], -1), (), 0
    for length in lengths:  # rows of a table, as MindSpore would copy what a view is taken of, by a slow kernel
        pieces += (embedding(table, _numbers(begin, length)).reshape((length,) + x.shape[1:]),)
        begin += length
    return pieces


def split_unevenly(x, lengths, axis):
    """Tuple of the pieces of x of these lengths along an axis; on Ascend each in memory of its own."""
    if fused():
        return _split_with_size(x, lengths, axis)
    pieces, begin = (), 0
    for length in lengths:
        pieces += (narrow(x, axis, begin, length),)
        begin += length
    return pieces


@ops.constexpr
def _numbers(begin, count):
    """int32 (count,) from `begin` on, as a constant of the graph."""
    return Tensor(np.arange(begin, begin + count, dtype=np.int32))


def unstack(x, axis):
    """Tuple of what stands side by side on an axis of x, which goes away. On Ascend a view: nothing is moved."""
    return _unstack_view(x, axis) if fused() else ops.unstack(x, axis)


def stack(tensors, axis):
    """Tensors of one shape side by side on a new axis."""
    return mint.stack(tensors, axis) if fused() else ops.stack(tensors, axis)


def mean(x, axis=None, keep_dims=False):
    """Mean of x over an axis, or axes, or all of it."""
    return _mean(x, axis, keep_dims, None) if fused() else x.mean(axis, keep_dims)


def extend(x, axis, count):
    """x with `count` places of zeros after it along an axis, the last or the one before."""
    if fused():
        return mint.nn.functional.pad(x, (0, count) if axis == len(x.shape) - 1 else (0, 0, 0, count))
    return ops.concat((x, filled(x.shape[:axis] + (count,) + x.shape[axis + 1 :], 0.0, x.dtype)), axis)


def narrow(x, axis, begin, length):
    """`length` places of x from `begin` along an axis. On Ascend a view: nothing is moved.

    MindSpore does not compute views again in a backward pass: all that one is taken of is kept until then.
    Not for `dense`, which in a graph on Ascend reads what the view is taken of from its beginning: `divide` copies.
    """
    if fused():
        return _narrow_view(x, axis, begin, length)
    return x[(slice(None),) * axis + (slice(begin, begin + length),)]


def assign(variable, value):
    """Write a tensor into a Parameter of its shape and dtype."""
    return _copy_into(variable, value) if fused() else ops.assign(variable, value)


def multiply_add(x, a, b):
    """x + a * b in one pass; x and b may be rows that are repeated to a's shape, or the other way round."""
    if fused():
        return _add_product(x, a, b, 1)
    return (x.astype(ms.float32) + a.astype(ms.float32) * b.astype(ms.float32)).astype(a.dtype)


def lerp(start, end, weight):
    """start + weight * (end - start) in one pass, of tensors of one shape; weight: a number."""
    return _lerp(start, end, weight) if fused() else start + weight * (end - start)


def direct(operator):
    """What is `assign`, `lerp` or `mean` on this device: a graph that need not choose each time compiles faster."""
    if fused():
        return {assign: _copy_into, lerp: _lerp, mean: _mean}[operator]
    # MindSpore does not compile a graph where an attribute is a function that writes; a primitive may.
    return _assign if operator is assign else operator


def kept_multiply_add(x, a, b):
    """`multiply_add` at the end of a cell that may be computed again in the backward pass: this result is not.

    Without one such result a cell, MindSpore takes neighbours for one cell, and all are computed again at once.
    """
    return _add_product_kept(x, a, b, 1) if fused() else multiply_add(x, a, b)


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


def attention(q, k, v, num_heads, scale):
    """softmax(scale * q k^T) v in heads, without mask or dropout: FlashAttentionScore in layout BSH.

    Args:
        q: (N, S, heads * D); k, v: (N, L, heads * D), of q's dtype; D a multiple of 16 up to 512.
        scale: of the products.

    Returns:
        (N, S, heads * D) in q's dtype.
    """
    check_heads(q.shape, k.shape, v.shape, num_heads)
    if fused() and (q.dtype != ms.float32 or q.shape[2] // num_heads <= LARGEST_FP32_HEAD):
        return ops.flash_attention_score(q, k, v, num_heads, scalar_value=scale, input_layout="BSH")
    q_heads, k_heads, v_heads = _heads(q, num_heads) * scale, _heads(k, num_heads), _heads(v, num_heads)
    rows = rows_at_once(q_heads.shape, k.shape[1])
    outputs = ()
    for start in range(0, q.shape[1], rows):
        queries = q_heads if rows >= q.shape[1] else narrow(q_heads, 2, start, min(rows, q.shape[1] - start))
        weights = ops.softmax(_product_transposed(queries, k_heads))
        outputs += (_product(weights, v_heads),)
    out = outputs[0] if len(outputs) == 1 else ops.concat(outputs, 2)
    return out.transpose(0, 2, 1, 3).reshape(q.shape).astype(q.dtype)


@ops.constexpr
def rows_at_once(queries, keys):
    """Queries (N, heads, S, D) that are answered at once, so that at most MAX_SCORES weights are alive."""
    batch, heads, length, _ = queries
    pieces = -(-batch * heads * length * keys // MAX_SCORES)
    return -(-length // pieces)


def attention_with_bias(q, k, v, bias, num_heads):
    """T5's attention (N, S, C): unscaled, with an additive bias (N or 1, heads, S, L) fp32; weights in fp32."""
    batch, length, channels = q.shape
    q, k, v = (x.reshape(batch, -1, num_heads, channels // num_heads).transpose(0, 2, 1, 3) for x in (q, k, v))
    weights = ops.softmax(_product_transposed(q, k).astype(bias.dtype) + bias).astype(v.dtype)
    return _product(weights, v).transpose(0, 2, 1, 3).reshape(batch, length, channels)


def _heads(x, num_heads):
    batch, _, channels = x.shape
    return x.astype(ms.float32).reshape(batch, -1, num_heads, channels // num_heads).transpose(0, 2, 1, 3)

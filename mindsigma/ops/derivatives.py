"""Derivatives written by hand, for the portable compositions whose automatic ones are slow on a CPU.

MindSpore differentiates an elementwise chain operation by operation, sums gradients of biases on one core and takes the
derivative of its softmax by a kernel ten times slower than the softmax. Each cell below computes what its name says and
the gradients of its inputs in the fewest passes over memory; inside a graph both are part of it.
"""

import numpy as np
from mindspore import nn, ops

from mindsigma.ops.native import operations as native

GELU_SCALE = 2.0 * (2.0 / np.pi) ** 0.5  # tanh(u) = 2 sigmoid(2u) - 1
GELU_CUBIC = GELU_SCALE * 0.044715

_softmax = ops.Softmax()
_matmul = ops.MatMul()
_product = ops.BatchMatMul()
_product_transposed = ops.BatchMatMul(transpose_b=True)
_transposed_product = ops.BatchMatMul(transpose_a=True)


def row_mean(x):
    """Mean over the last axis of x (rows, columns), kept: a product with a constant column, faster than ReduceMean."""
    columns = x.shape[-1]
    return _matmul(x, ops.fill(x.dtype, (columns, 1), 1.0 / columns))


def spread_column(column, width):
    """column (rows, 1) repeated to (rows, width).

    An outer product instead of broadcasting: a broadcasting operation of the CPU backend keeps index tables of four
    times the size of its output for as long as its graph lives, and is slower.
    """
    return _matmul(column, ops.fill(column.dtype, (1, width), 1.0))


class _AddBias(nn.Cell):
    """x (rows, columns) + bias (columns,)."""

    def construct(self, x, bias):
        return ops.bias_add(x, bias)

    def bprop(self, x, bias, out, gradient):
        ones = ops.fill(gradient.dtype, (1, gradient.shape[0]), 1.0)
        return gradient, _matmul(ones, gradient).reshape(-1)


class _Linear(nn.Cell):
    """x (rows, in) weight (out, in)^T on the native kernels."""

    def construct(self, x, weight):
        return native.linear(x, weight)

    def bprop(self, x, weight, out, gradient):
        return native.gradient_of_input(gradient, weight), native.gradient_of_weight(gradient, x)


class _LinearWithBias(nn.Cell):
    """`_Linear` plus bias (out,)."""

    def construct(self, x, weight, bias):
        return native.linear(x, weight, bias)

    def bprop(self, x, weight, bias, out, gradient):
        of_x, of_weight = native.gradient_of_input(gradient, weight), native.gradient_of_weight(gradient, x)
        return of_x, of_weight, native.gradient_of_bias(gradient)


class _ModulatedLinear(nn.Cell):
    """Linear map of LayerNorm of x (N, T, in), modulated by rows (N or 1, 2, in), shift and scale."""

    def construct(self, x, rows, eps, weight, bias):
        return native.linear(x, weight, bias, rows=rows, shift_row=0, eps=eps)

    def bprop(self, x, rows, eps, weight, bias, out, gradient):
        of_x, of_rows, of_weight, of_bias = native.modulated_linear_gradient(gradient, x, rows, weight, eps)
        return of_x, of_rows, 0.0, of_weight, of_bias


class _NativeAttention(nn.Cell):
    """Attention of q (N, S, C) over k (N, L, C, or a column more) and v (N, L, C), see native.attention."""

    def construct(self, q, k, v, num_heads, scale, masked):
        return native.attention(q, k, v, num_heads, scale, masked)

    def bprop(self, q, k, v, num_heads, scale, masked, out, gradient):
        of_q, of_k, of_v = native.attention_gradient(gradient, q, k, v, num_heads, scale, masked)
        return of_q, of_k, of_v, 0, 0.0, False


class _Gelu(nn.Cell):
    """GELU in the tanh approximation, as x * sigmoid: MindSpore's Tanh is only good to 1e-4 on a CPU."""

    def construct(self, x):
        return x * ops.sigmoid(x * (GELU_SCALE + GELU_CUBIC * (x * x)))

    def bprop(self, x, out, gradient):
        square = x * x
        gate = ops.sigmoid(x * (GELU_SCALE + GELU_CUBIC * square))
        return (gradient * (gate + out * (1.0 - gate) * (GELU_SCALE + (3.0 * GELU_CUBIC) * square)),)


class _Normalise(nn.Cell):
    """Rows (rows, columns) with mean 0 and, but for eps, variance 1."""

    def construct(self, x, eps):
        centred = x - spread_column(row_mean(x), x.shape[-1])
        inverse = ops.rsqrt(row_mean(centred * centred) + eps)  # (rows, 1)
        return centred * spread_column(inverse, x.shape[-1])

    def bprop(self, x, eps, out, gradient):
        width = x.shape[-1]
        centred = x - spread_column(row_mean(x), width)
        inverse = ops.rsqrt(row_mean(centred * centred) + eps)
        mean, product = row_mean(gradient), row_mean(gradient * out)
        rest = gradient - spread_column(mean, width) - out * spread_column(product, width)
        return rest * spread_column(inverse, width), 0.0


def _rows_at_once(q, k, max_scores):
    batch, heads, length, _ = q.shape
    pieces = -(-batch * heads * length * k.shape[2] // max_scores)
    return -(-length // pieces)


class _Attention(nn.Cell):
    """softmax(q k^T) v for (N, heads, S or L, D), in pieces of the queries that hold `max_scores` weights at once.

    The backward pass keeps no weights: it computes those of each piece again, which are most of the memory.
    """

    def construct(self, q, k, v, max_scores):
        rows, outputs = _rows_at_once(q, k, max_scores), []
        for start in range(0, q.shape[2], rows):
            piece = q[:, :, start : start + rows] if rows < q.shape[2] else q
            if start > 0:
                # Without this order the scheduler keeps the weights of all pieces alive together.
                piece = ops.depend(piece, outputs[-1])
            outputs.append(_product(_softmax(_product_transposed(piece, k)), v))
        return outputs[0] if len(outputs) == 1 else ops.concat(outputs, 2)

    def bprop(self, q, k, v, max_scores, out, gradient):
        rows, of_q, of_k, of_v = _rows_at_once(q, k, max_scores), [], None, None
        # sum_j p_j dp_j, which the derivative of softmax takes off dp, is the product of output and gradient; it rides
        # in a further column of both factors of dp.
        width, shape = v.shape[-1], gradient.shape
        sums = _matmul((gradient * out).reshape(-1, width), ops.fill(v.dtype, (width, 1), -1.0))
        wide_gradient = ops.concat((gradient, sums.reshape(shape[:-1] + (1,))), -1)
        wide_v = ops.concat((v, ops.ones(v.shape[:-1] + (1,), v.dtype)), -1)
        for start in range(0, q.shape[2], rows):
            if rows < q.shape[2]:
                piece = q[:, :, start : start + rows]
                piece_gradient, wide = gradient[:, :, start : start + rows], wide_gradient[:, :, start : start + rows]
            else:
                piece, piece_gradient, wide = q, gradient, wide_gradient
            if start > 0:
                piece, piece_gradient, wide = (ops.depend(x, of_k) for x in (piece, piece_gradient, wide))
            weights = _softmax(_product_transposed(piece, k))
            of_scores = weights * _product_transposed(wide, wide_v)
            of_q.append(_product(of_scores, k))
            more_k, more_v = _transposed_product(of_scores, piece), _transposed_product(weights, piece_gradient)
            of_k, of_v = (more_k, more_v) if start == 0 else (of_k + more_k, of_v + more_v)
        return of_q[0] if len(of_q) == 1 else ops.concat(of_q, 2), of_k, of_v, 0


class _TrainingBlock(nn.Cell):
    """A block of a DiT on the native kernels, computed again in the backward pass; see native.training_block."""

    def construct(self, x, modulation, caption, kept, table, plan, weights):
        return native.training_block(x, modulation, caption, kept, table, plan, weights)

    def bprop(self, x, modulation, caption, kept, table, plan, weights, out, gradient):
        found = native.training_block_gradient(gradient, x, modulation, caption, kept, table, plan, weights)
        return found[0], found[1], found[2], ops.zeros_like(kept), found[3], ops.zeros_like(plan), found[4:]


class _Seed(nn.Cell):
    """A scalar of `out` whose gradient with respect to `out` is the tensor `gradient`."""

    def construct(self, out, gradient):
        return out.reshape(-1)[0]

    def bprop(self, out, gradient, value, one):
        return gradient, gradient


add_bias = _AddBias()
native_linear = _Linear()
native_linear_with_bias = _LinearWithBias()
native_modulated_linear = _ModulatedLinear()
native_attention = _NativeAttention()
gelu = _Gelu()
normalise = _Normalise()
attention = _Attention()
training_block = _TrainingBlock()
seed = _Seed()

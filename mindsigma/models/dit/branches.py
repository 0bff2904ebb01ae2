"""What a DiT block computes, as functions of tensors: its branches, and all of it (reference.md 2.5)."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.kv_compression import compress
from mindsigma.ops.attention import attend, attend_qkv, prepare_keys
from mindsigma.ops.functional import layer_norm
from mindsigma.ops.linear_chains import (
    add_gated_linear,
    add_linear,
    modulated_linear,
    modulated_linear_gelu,
    plain_linear,
)

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5

# Added to a block's rows of modulation, so that scales are 1 + scale: shift, scale and gate of attention, of the MLP.
UNIT = np.array([0, 1, 0, 0, 1, 0], np.float32).reshape(1, 6, 1)
SHIFT, GATE, MLP_SHIFT, MLP_GATE = 0, 2, 3, 5  # rows; a scale follows its shift


@ops.constexpr
def unit_rows(dtype):
    """UNIT as a constant of the graph."""
    return Tensor(UNIT, dtype)


def block_rows(modulation, table):
    """Rows (N, 6, C) of a block: its table (6, C), the timestep's modulation (N, 6 * C), and UNIT."""
    rows = table + modulation.reshape(modulation.shape[0], 6, table.shape[1])
    return rows + unit_rows(rows.dtype)


def modulation_parts(modulation, table):
    """`block_rows` in four: shift and scale of attention (N, 2, C), gate (N, 1, C), and those of the MLP."""
    rows = block_rows(modulation, table)
    return rows[:, :GATE], rows[:, GATE:MLP_SHIFT], rows[:, MLP_SHIFT:MLP_GATE], rows[:, MLP_GATE:]


def divide(qkv, height, width, kernels, qk_norm, sampling, factor, *weights):
    """Queries (N, T, C), keys and values (N, K, C) of qkv (N, T, 3 * C), compressed if asked for.

    `weights`: of the q/k norms and of the compression.
    """
    q, k, v = ops.split(qkv, qkv.shape[-1] // 3, -1)
    if qk_norm:
        q = layer_norm(q, QK_NORM_EPS, kernels, weights[0], weights[1])
        k = layer_norm(k, QK_NORM_EPS, kernels, weights[2], weights[3])
    if sampling is not None:
        # The same convolution and the same LayerNorm serve keys and values.
        weights = weights[4:] if qk_norm else weights
        k = compress(k, height, width, sampling, factor, kernels, weights)
        v = compress(v, height, width, sampling, factor, kernels, weights)
    return q, k, v


def attention(q, k, v, num_heads, kernels, fp32_attention):
    """Attention of queries (N, T, C) to keys and values (N, K, C)."""
    dtype = q.dtype
    if fp32_attention:
        q, k, v = q.astype(ms.float32), k.astype(ms.float32), v.astype(ms.float32)
    k, v = prepare_keys(k, v, None, num_heads, kernels)
    return attend(q, k, v, num_heads, kernels).astype(dtype)


def self_attention(qkv, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, *weights):
    """`attention` of what `divide` makes of qkv (N, T, 3 * C)."""
    if not qk_norm and sampling is None and not fp32_attention:
        return attend_qkv(qkv, num_heads, kernels)
    q, k, v = divide(qkv, height, width, kernels, qk_norm, sampling, factor, *weights)
    return attention(q, k, v, num_heads, kernels, fp32_attention)


def queries_keys_values(
    x, rows, height, width, kernels, qk_norm, sampling, factor, qkv_weight, qkv_bias, *norms_and_compression
):  # fmt: skip
    """What self-attention of tokens x (N, T, C) attends with and to; rows as of `block_rows`."""
    qkv = modulated_linear(x, rows, SHIFT, NORM_EPS, kernels, qkv_weight, qkv_bias)
    return divide(qkv, height, width, kernels, qk_norm, sampling, factor, *norms_and_compression)


def attention_sum(x, rows, q, k, v, num_heads, kernels, fp32_attention, proj_weight, proj_bias):
    """x + gate * attention of queries q (N, T, C) to keys k and values v (N, K, C)."""
    out = attention(q, k, v, num_heads, kernels, fp32_attention)
    return add_gated_linear(x, out, rows, GATE, kernels, proj_weight, proj_bias)


def self_attention_branch(
    x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, qkv_weight, qkv_bias,
    proj_weight, proj_bias, *norms_and_compression,
):  # fmt: skip
    """x + gate * self-attention of x (N, T, C); rows (N or 1, 6, C) as of `block_rows`."""
    qkv = modulated_linear(x, rows, SHIFT, NORM_EPS, kernels, qkv_weight, qkv_bias)
    out = self_attention(
        qkv, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, *norms_and_compression
    )
    return add_gated_linear(x, out, rows, GATE, kernels, proj_weight, proj_bias)


def caption_keys(caption, mask, num_heads, kernels, kv_weight, kv_bias):
    """Keys and values of a projected caption (N, L, C) with mask (N, L) or None, in the attention kernel's layout."""
    channels = caption.shape[-1]
    k, v = ops.split(plain_linear(caption, kernels, kv_weight, kv_bias), channels, -1)
    return prepare_keys(k, v, mask, num_heads, kernels)


def cross_attention_branch(x, k, v, num_heads, kernels, q_weight, q_bias, proj_weight, proj_bias):
    """x + cross-attention of x (N, T, C) to prepared caption keys: no norm and no gate."""
    q = plain_linear(x, kernels, q_weight, q_bias)
    return add_linear(x, attend(q, k, v, num_heads, kernels), kernels, proj_weight, proj_bias)


def mlp_branch(x, rows, kernels, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """x + gate * MLP of x (N, T, C); rows as of `block_rows`."""
    h = modulated_linear_gelu(x, rows, MLP_SHIFT, NORM_EPS, kernels, fc1_weight, fc1_bias)
    return add_gated_linear(x, h, rows, MLP_GATE, kernels, fc2_weight, fc2_bias)


def block_of_rows(
    x, rows, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, first_cross, *weights
):  # fmt: skip
    """The three branches in one graph.

    `weights`: of self-attention, from `first_cross` of cross-attention (4 tensors), then of the MLP.
    """
    x = self_attention_branch(
        x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, *weights[:first_cross]
    )
    x = cross_attention_branch(x, k, v, num_heads, kernels, *weights[first_cross : first_cross + 4])
    return mlp_branch(x, rows, kernels, *weights[first_cross + 4 :])


def whole_block(
    x, modulation, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, first_cross,
    table, *weights,
):  # fmt: skip
    """`block_of_rows` with its table: a block in training, whose backward pass computes it again from its inputs."""
    return block_of_rows(
        x, block_rows(modulation, table), k, v, height, width, num_heads, kernels, qk_norm, sampling, factor,
        fp32_attention, first_cross, *weights,
    )  # fmt: skip


def whole_ascend_block(
    x, modulation, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, first_cross, table, *weights
):  # fmt: skip
    """`ascend_block` with its table: a block in training."""
    return ascend.ascend_block(
        x, block_rows(modulation, table), k, v, height, width, num_heads, kernels, qk_norm, sampling, factor,
        first_cross, *weights,
    )  # fmt: skip

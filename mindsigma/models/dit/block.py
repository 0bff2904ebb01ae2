"""One DiT block: modulated self-attention, cross-attention to the caption, modulated MLP (reference.md 2.5)."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Constant

from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.heads import head_width, narrow_columns, narrow_rows, widen_columns, widen_rows
from mindsigma.models.dit.kv_compression import compress
from mindsigma.models.dit.native_training import native_block, native_block_backward, native_block_keeping
from mindsigma.models.layers import Affine, Norm, normal, parameter
from mindsigma.ops.attention import attend, attend_qkv, prepare_keys
from mindsigma.ops.functional import layer_norm
from mindsigma.ops.kernels import NATIVE
from mindsigma.ops.linear_chains import (
    add_gated,
    add_gated_linear,
    add_linear,
    gelu_linear,
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


class SelfAttention(nn.Cell):
    """Weights of self-attention: fused qkv, projection, optional q/k norms, optional KV compression."""

    def __init__(self, channels, qk_norm, compression, dtype):
        super().__init__()
        self.qkv = Affine(channels, 3 * channels, dtype=dtype)
        self.proj = Affine(channels, channels, dtype=dtype)
        self.tensors = None
        extra = ()
        if qk_norm:
            self.q_norm, self.k_norm = Norm(channels, dtype=dtype), Norm(channels, dtype=dtype)
            extra += self.q_norm.tensors + self.k_norm.tensors
        if compression is not None and compression.sampling == "conv":
            r = compression.factor
            average = Constant(1.0 / (r * r))  # "Conv Avg Init"
            self.sr = Affine(r * r, channels, average, (channels, 1, r, r), dtype=dtype)
            self.norm = Norm(channels, dtype=dtype)
            extra += self.sr.tensors + self.norm.tensors
        object.__setattr__(self, "tensors", self.qkv.tensors + self.proj.tensors + extra)


class CrossAttention(nn.Cell):
    """Weights of cross-attention; the projection starts at zero."""

    def __init__(self, channels, dtype):
        super().__init__()
        self.q_linear = Affine(channels, channels, dtype=dtype)
        self.kv_linear = Affine(channels, 2 * channels, dtype=dtype)
        self.proj = Affine(channels, channels, "zeros", dtype=dtype)

    @property
    def tensors(self):
        """Weight and bias of queries, of keys and values, and of the projection."""
        return self.q_linear.tensors + self.kv_linear.tensors + self.proj.tensors


class MLP(nn.Cell):
    """Weights of the two-layer MLP."""

    def __init__(self, in_features, hidden_features, out_features, init=None, dtype=ms.float32):
        super().__init__()
        self.fc1 = Affine(in_features, hidden_features, init, dtype=dtype)
        self.fc2 = Affine(hidden_features, out_features, init, dtype=dtype)

    @property
    def tensors(self):
        """fc1 weight and bias, fc2 weight and bias."""
        return self.fc1.tensors + self.fc2.tensors


class DiTBlock(nn.Cell):
    """Block `layer` of a DiT.

    Every way of computing it is a chain of shared graphs, compiled once for all blocks of a kind. In training it is one
    on the native kernels, which keep what their backward pass needs; for what these do not take nine, and what each of
    them takes is kept, so that the backward pass computes only what is cheap again. After `recompute` it is one, of
    which nothing is kept but the block's inputs. Otherwise three, one a branch, and one on the native and on Ascend's
    kernels.
    """

    def __init__(self, config, layer, execution):
        super().__init__()
        channels, heads, dtype = config.hidden_size, config.num_heads, execution.parameter_dtype
        kernels = execution.kernels
        compression = config.layer_compression(layer)
        self.scale_shift_table = parameter((6, channels), normal(channels**-0.5), dtype)
        self.attn = SelfAttention(channels, config.qk_norm, compression, dtype)
        self.cross_attn = CrossAttention(channels, dtype)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio), channels, dtype=dtype)
        self.heads, self.compressed = (heads, channels // heads), compression is not None
        self.recomputed, self.native = False, None

        table, attention = (self.scale_shift_table,), self.attn.tensors
        cross = self.cross_attn.q_linear.tensors + self.cross_attn.proj.tensors
        weights = attention + cross + self.mlp.tensors
        sampling, factor = (compression.sampling, compression.factor) if compression else (None, 1)
        self.widened = ascend.widened_parts(config.qk_norm, sampling)
        kind = (config.qk_norm, sampling, factor)
        static = (heads, kernels, *kind)
        graph, self.is_ascend = execution.graph, execution.ascend_block
        keys = ascend.caption_keys if self.is_ascend else caption_keys
        self.caption_keys = graph(keys, self.cross_attn.kv_linear.tensors, (heads, kernels))
        # The same in two parts, for tokens that attend to keys from elsewhere, too.
        first, second = self.attn.qkv.tensors + attention[4:], self.attn.proj.tensors
        if self.is_ascend:
            self.ascend = graph(ascend.ascend_block, weights, static + (len(attention),))
            self.ascend_keep = graph(ascend.keep_text, weights, static + (len(attention),))
            self.ascend_take = graph(ascend.take_text, weights, static + (len(attention),))
            self.whole = graph(whole_ascend_block, table + weights, static + (len(attention),))
            self.queries_keys_values = graph(ascend.queries_keys_values, first, static)
            self.attention_sum = graph(ascend.after_keys, second + cross + self.mlp.tensors, (heads, kernels))
            return
        static += (execution.fp32_attention,)
        self.self_attention = graph(self_attention_branch, attention, static)
        self.queries_keys_values = graph(queries_keys_values, first, (kernels, *kind))
        self.attention_sum = graph(attention_sum, second, (heads, kernels, execution.fp32_attention))
        self.cross_attention = graph(cross_attention_branch, cross, (heads, kernels))
        self.feed_forward = graph(mlp_branch, self.mlp.tensors, (kernels,))
        # Calls of native kernels cost more than the little that stays alive longer.
        self.one_graph = graph(block_of_rows, weights, static + (len(attention),)) if kernels == NATIVE else None
        if kernels == NATIVE and execution.native:
            tensors = attention + self.cross_attn.tensors + self.mlp.tensors
            keeping = (native_block_keeping, native_block_backward)
            self.native = graph(native_block, table + tensors, (heads, NORM_EPS, *kind), keeping)
        self.whole = graph(whole_block, table + weights, static + (len(attention),))
        self.parts = graph(modulation_parts, table, ())
        self.qkv = graph(modulated_linear, self.attn.qkv.tensors, (0, NORM_EPS, kernels))
        self.attend = graph(self_attention, attention[4:], static)
        self.attention_output = graph(add_gated_linear, self.attn.proj.tensors, (0, kernels))
        self.mlp_input = graph(modulated_linear, self.mlp.fc1.tensors, (0, NORM_EPS, kernels))
        self.mlp_output = graph(gelu_linear, self.mlp.fc2.tensors, (kernels,))
        self.gated_sum = graph(add_gated, (), (0, kernels))

    def construct(self, x, rows, k, v, height, width, gather=None):
        """Transform tokens x (N, height * width, C).

        Args:
            rows: (N or 1, 6, C), this block's part of `DiT.modulations`; in training (N, 6 * C), the timestep's
                modulation, to which the block adds its table itself.
            k, v: of `keys_of`.
            gather: as in DiT.denoise; None where x is all of the image.
        """
        if not self.compressed:
            height, width = 0, 0  # the graph does not depend on the grid: do not compile one for each
        if gather is not None:
            return self._with_keys_from_elsewhere(x, rows, k, v, height, width, gather)
        if self.learns_natively():
            return self.native(x, rows, k, v, height, width)
        if self.training and (self.recomputed or self.is_ascend):
            return self.whole(x, rows, k, v, height, width)
        if self.training:
            return self._in_pieces(x, rows, k, v, height, width)
        if self.is_ascend:
            return self.ascend(x, rows, k, v, height, width)
        if self.one_graph is not None:
            return self.one_graph(x, rows, k, v, height, width)
        x = self.self_attention(x, rows, height, width)
        x = self.cross_attention(x, k, v)
        return self.feed_forward(x, rows)

    def learns_natively(self):
        """Whether `construct` is one call of the native library, of the caption itself."""
        return self.training and self.native is not None

    def keys_of(self, caption, mask):
        """What the block takes of the projected caption (N, L, C) and its mask (N, L) or None: a pair."""
        return (caption, mask) if self.learns_natively() else self.caption_keys(caption, mask)

    def _with_keys_from_elsewhere(self, x, rows, k, v, height, width, gather):
        queries, keys, values = self.queries_keys_values(x, rows, height, width)
        keys, values = gather(keys, values)
        if self.is_ascend:
            return self.attention_sum(x, rows, queries, keys, values, k, v)
        x = self.cross_attention(self.attention_sum(x, rows, queries, keys, values), k, v)
        return self.feed_forward(x, rows)

    def _in_pieces(self, x, modulation, k, v, height, width):
        before_attention, gate, before_mlp, mlp_gate = self.parts(modulation)
        x = self.attention_output(x, self.attend(self.qkv(x, before_attention), height, width), gate)
        x = self.cross_attention(x, k, v)
        return self.gated_sum(x, self.mlp_output(self.mlp_input(x, before_mlp)), mlp_gate)

    def recompute(self):
        """From now on compute the block again in the backward pass of training, instead of keeping what it needs."""
        self.recomputed = True
        if self.native is not None:
            self.native.keeping = None
        if ms.get_context("mode") == ms.GRAPH_MODE:
            super().recompute()

    def keep_text(self, x, rows, k, v, height, width):
        """`construct` outside training, and what cross-attention added, (N, T, C)."""
        if not self.compressed:
            height, width = 0, 0
        if self.is_ascend:
            return self.ascend_keep(x, rows, k, v, height, width)
        x = self.self_attention(x, rows, height, width)
        attended = self.cross_attention(x, k, v)
        return self.feed_forward(attended, rows), attended - x

    def take_text(self, x, rows, change, height, width):
        """`construct` outside training with what cross-attention added before instead of its work."""
        if not self.compressed:
            height, width = 0, 0
        if self.is_ascend:
            return self.ascend_take(x, rows, change, height, width)
        return self.feed_forward(self.self_attention(x, rows, height, width) + change, rows)

    def align_heads(self, restore=False):
        """Widen the heads of the weights once for all (heads.py), or bring back the published shapes."""
        number, head_dim = self.heads
        own, cross = head_width(head_dim), head_width(head_dim, True)
        rows, columns = (narrow_rows, narrow_columns) if restore else (widen_rows, widen_columns)
        attention, caption = self.attn, self.cross_attn
        qkv = (own, 3, self.widened)
        changes = [(tensor, rows, qkv, 0.0) for tensor in attention.qkv.tensors]
        changes += [(attention.proj.weight, columns, (own,), 0.0), (caption.proj.weight, columns, (cross,), 0.0)]
        changes += [(tensor, rows, (cross, 2), 0.0) for tensor in caption.kv_linear.tensors]
        changes += [(caption.q_linear.weight, rows, (cross,), 0.0), (caption.q_linear.bias, rows, (cross,), 1.0)]
        for tensor, change, arguments, first in changes:
            options = {"first": first} if change is widen_rows else {}
            wide = change(tensor.astype(ms.float32), number, head_dim, *arguments, **options)
            tensor.set_data(wide.astype(tensor.dtype), slice_shape=True)

"""One DiT block: modulated self-attention, cross-attention to the caption, modulated MLP (reference.md 2.5)."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Constant

from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.heads import head_width, narrow_columns, narrow_rows, widen_columns, widen_rows
from mindsigma.models.dit.kv_compression import compress
from mindsigma.models.layers import Affine, Norm, normal, parameter
from mindsigma.ops.attention import attend, prepare_keys
from mindsigma.ops.functional import gelu_tanh, layer_norm, linear, scale_and_shift, spread_rows

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


# Added to a block's rows of modulation, so that scales are 1 + scale: shift, scale and gate of attention, of the MLP.
UNIT = np.array([0, 1, 0, 0, 1, 0], np.float32).reshape(1, 6, 1)


@ops.constexpr
def unit_rows(dtype):
    """UNIT as a constant of the graph."""
    return Tensor(UNIT, dtype)


def block_rows(modulation, table):
    """Rows (N, 6, C) of a block: its table (6, C), the timestep's modulation (N, 6 * C), and UNIT."""
    rows = table + modulation.reshape(modulation.shape[0], 6, table.shape[1])
    return rows + unit_rows(rows.dtype)


def modulated_norm(x, shift, scale, kernels):
    """LayerNorm without affine of x (N, T, C), times scale plus shift, both (N or 1, 1, C)."""
    return scale_and_shift(layer_norm(x, NORM_EPS, kernels), scale, shift, kernels)


def gated_sum(x, gate, branch, kernels):
    """x + gate * branch for x and branch (N, T, C), gate (N or 1, 1, C)."""
    return x + spread_rows(gate, x.shape, kernels) * branch


def self_attention_branch(
    x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, qkv_weight, qkv_bias,
    proj_weight, proj_bias, *norms_and_compression,
):  # fmt: skip
    """x + gate * self-attention of x (N, T, C); rows (N or 1, 6, C) as of `block_rows`."""
    channels = x.shape[-1]
    h = modulated_norm(x, rows[:, 0:1], rows[:, 1:2], kernels)
    qkv = linear(h, qkv_weight, qkv_bias)
    q, k, v = qkv[:, :, :channels], qkv[:, :, channels : 2 * channels], qkv[:, :, 2 * channels :]
    if qk_norm:
        q = layer_norm(q, QK_NORM_EPS, kernels, norms_and_compression[0], norms_and_compression[1])
        k = layer_norm(k, QK_NORM_EPS, kernels, norms_and_compression[2], norms_and_compression[3])
    if sampling is not None:
        # The same convolution and the same LayerNorm serve keys and values.
        weights = norms_and_compression[4:] if qk_norm else norms_and_compression
        k = compress(k, height, width, sampling, factor, kernels, weights)
        v = compress(v, height, width, sampling, factor, kernels, weights)
    if fp32_attention:
        q, k, v = q.astype(ms.float32), k.astype(ms.float32), v.astype(ms.float32)
    k, v = prepare_keys(k, v, None, num_heads, kernels)
    out = linear(attend(q, k, v, num_heads, kernels).astype(x.dtype), proj_weight, proj_bias)
    return gated_sum(x, rows[:, 2:3], out, kernels)


def caption_keys(caption, mask, num_heads, kernels, kv_weight, kv_bias):
    """Keys and values of a projected caption (N, L, C) with mask (N, L) or None, in the attention kernel's layout."""
    channels = caption.shape[-1]
    kv = linear(caption, kv_weight, kv_bias)
    return prepare_keys(kv[:, :, :channels], kv[:, :, channels:], mask, num_heads, kernels)


def cross_attention_branch(x, k, v, num_heads, kernels, q_weight, q_bias, proj_weight, proj_bias):
    """x + cross-attention of x (N, T, C) to prepared caption keys: no norm and no gate."""
    q = linear(x, q_weight, q_bias)
    return x + linear(attend(q, k, v, num_heads, kernels), proj_weight, proj_bias)


def mlp_branch(x, rows, kernels, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """x + gate * MLP of x (N, T, C); rows as of `block_rows`."""
    h = modulated_norm(x, rows[:, 3:4], rows[:, 4:5], kernels)
    h = gelu_tanh(linear(h, fc1_weight, fc1_bias), kernels)
    return gated_sum(x, rows[:, 5:6], linear(h, fc2_weight, fc2_bias), kernels)


def whole_block(
    x, modulation, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, first_cross,
    table, *weights,
):  # fmt: skip
    """The three branches in one graph: faster to differentiate than three, but more is alive at once.

    `weights`: of self-attention, from `first_cross` of cross-attention (4 tensors), then of the MLP.
    """
    rows = block_rows(modulation, table)
    x = self_attention_branch(
        x, rows, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, *weights[:first_cross]
    )
    x = cross_attention_branch(x, k, v, num_heads, kernels, *weights[first_cross : first_cross + 4])
    return mlp_branch(x, rows, kernels, *weights[first_cross + 4 :])


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

    In training it is one shared graph, else three, one a branch: compiled once for all blocks of a kind.
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

        table, attention = (self.scale_shift_table,), self.attn.tensors
        cross = self.cross_attn.q_linear.tensors + self.cross_attn.proj.tensors
        weights = attention + cross + self.mlp.tensors
        sampling, factor = (compression.sampling, compression.factor) if compression else (None, 1)
        self.widened = ascend.widened_parts(config.qk_norm, sampling)
        static = (heads, kernels, config.qk_norm, sampling, factor)
        graph, self.is_ascend = execution.graph, execution.ascend_block
        keys = ascend.caption_keys if self.is_ascend else caption_keys
        self.caption_keys = graph(keys, self.cross_attn.kv_linear.tensors, (heads, kernels))
        if self.is_ascend:
            static += (len(attention),)
            self.ascend = graph(ascend.ascend_block, weights, static)
            self.ascend_keep = graph(ascend.keep_text, weights, static)
            self.ascend_take = graph(ascend.take_text, weights, static)
            self.whole = graph(whole_ascend_block, table + weights, static)
            return
        static += (execution.fp32_attention,)
        self.self_attention = graph(self_attention_branch, attention, static)
        self.cross_attention = graph(cross_attention_branch, cross, (heads, kernels))
        self.feed_forward = graph(mlp_branch, self.mlp.tensors, (kernels,))
        self.whole = graph(whole_block, table + weights, static + (len(attention),))

    def construct(self, x, rows, k, v, height, width):
        """Transform tokens x (N, height * width, C).

        Args:
            rows: (N or 1, 6, C), this block's part of `DiT.modulations`; in training (N, 6 * C), the timestep's
                modulation, to which the block adds its table itself.
            k, v: caption keys and values from `caption_keys`.
        """
        if not self.compressed:
            height, width = 0, 0  # the graph does not depend on the grid: do not compile one for each
        if self.training:
            return self.whole(x, rows, k, v, height, width)
        if self.is_ascend:
            return self.ascend(x, rows, k, v, height, width)
        x = self.self_attention(x, rows, height, width)
        x = self.cross_attention(x, k, v)
        return self.feed_forward(x, rows)

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

"""One DiT block: modulated self-attention, cross-attention to the caption, modulated MLP (reference.md 2.5)."""

import mindspore as ms
from mindspore import nn
from mindspore.common.initializer import Constant

from mindsigma.models.dit.kv_compression import compress
from mindsigma.models.layers import Affine, Norm, normal, parameter
from mindsigma.ops.attention import attend, attend_qkv, prepare_keys
from mindsigma.ops.functional import layer_norm
from mindsigma.ops.kernels import NATIVE
from mindsigma.ops.linear_chains import (
    add_gated_linear,
    add_linear,
    modulated_linear,
    modulated_linear_gelu,
    plain_linear,
)

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5


def self_attention_branch(
    x, modulation, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, table, qkv_weight,
    qkv_bias, proj_weight, proj_bias, *norms_and_compression,
):  # fmt: skip
    """x + gate * self-attention of x (N, T, C); modulation (N, 6 * C) is the timestep's, table (6, C) the block's."""
    batch, _, channels = x.shape
    rows = table + modulation.reshape(batch, 6, channels)  # shift, scale, gate of attention, then of the MLP
    qkv = modulated_linear(x, rows, 0, NORM_EPS, qkv_weight, qkv_bias, kernels)
    if not qk_norm and sampling is None and not fp32_attention:
        return add_gated_linear(x, attend_qkv(qkv, num_heads, kernels), rows, 2, proj_weight, proj_bias, kernels)
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
    attended = attend(q, k, v, num_heads, kernels).astype(x.dtype)
    return add_gated_linear(x, attended, rows, 2, proj_weight, proj_bias, kernels)


def caption_keys(caption, mask, num_heads, kernels, kv_weight, kv_bias):
    """Keys and values of a projected caption (N, L, C) with mask (N, L) or None, in the attention kernel's layout."""
    channels = caption.shape[-1]
    kv = plain_linear(caption, kv_weight, kv_bias, kernels)
    return prepare_keys(kv[:, :, :channels], kv[:, :, channels:], mask, num_heads, kernels)


def cross_attention_branch(x, k, v, num_heads, kernels, q_weight, q_bias, proj_weight, proj_bias):
    """x + cross-attention of x (N, T, C) to prepared caption keys: no norm and no gate."""
    q = plain_linear(x, q_weight, q_bias, kernels)
    return add_linear(x, attend(q, k, v, num_heads, kernels), proj_weight, proj_bias, kernels)


def mlp_branch(x, modulation, kernels, table, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """x + gate * MLP of x (N, T, C)."""
    batch, _, channels = x.shape
    rows = table + modulation.reshape(batch, 6, channels)
    h = modulated_linear_gelu(x, rows, 3, NORM_EPS, fc1_weight, fc1_bias, kernels)
    return add_gated_linear(x, h, rows, 5, fc2_weight, fc2_bias, kernels)


def whole_block(
    x, modulation, k, v, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, first_cross,
    table, *weights,
):  # fmt: skip
    """The three branches in one graph: faster to differentiate than three, but more is alive at once.

    `weights`: of self-attention, from `first_cross` of cross-attention (4 tensors), then of the MLP.
    """
    x = self_attention_branch(
        x, modulation, height, width, num_heads, kernels, qk_norm, sampling, factor, fp32_attention, table,
        *weights[:first_cross],
    )  # fmt: skip
    x = cross_attention_branch(x, k, v, num_heads, kernels, *weights[first_cross : first_cross + 4])
    return mlp_branch(x, modulation, kernels, table, *weights[first_cross + 4 :])


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

    In training and on the native kernels it is one shared graph, else three, one a branch: compiled once for all
    blocks of a kind.
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

        table, attention = (self.scale_shift_table,), self.attn.tensors
        cross = self.cross_attn.q_linear.tensors + self.cross_attn.proj.tensors
        sampling, factor = (compression.sampling, compression.factor) if compression else (None, 1)
        static = (heads, kernels, config.qk_norm, sampling, factor, execution.fp32_attention)
        graph = execution.graph
        self.self_attention = graph(self_attention_branch, table + attention, static)
        self.caption_keys = graph(caption_keys, self.cross_attn.kv_linear.tensors, (heads, kernels))
        self.cross_attention = graph(cross_attention_branch, cross, (heads, kernels))
        self.feed_forward = graph(mlp_branch, table + self.mlp.tensors, (kernels,))
        weights = table + attention + cross + self.mlp.tensors
        self.whole = graph(whole_block, weights, static + (len(attention),))
        self.compressed = compression is not None
        self.one_graph = kernels == NATIVE  # calls cost more than the little that stays alive longer

    def construct(self, x, modulation, k, v, height, width):
        """Transform tokens x (N, height * width, C).

        Args:
            modulation: (N, 6 * C), from the timestep.
            k, v: caption keys and values from `caption_keys`.
        """
        if not self.compressed:
            height, width = 0, 0  # the graph does not depend on the grid: do not compile one for each
        if self.training or self.one_graph:
            return self.whole(x, modulation, k, v, height, width)
        x = self.self_attention(x, modulation, height, width)
        x = self.cross_attention(x, k, v)
        return self.feed_forward(x, modulation)

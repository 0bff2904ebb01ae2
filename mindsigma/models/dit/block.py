"""One DiT block: modulated self-attention, cross-attention to the caption, modulated MLP (reference.md 2.5)."""

import mindspore as ms
from mindspore import nn
from mindspore.common.initializer import Constant

from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.branches import (
    NORM_EPS,
    attention_sum,
    block_of_rows,
    caption_keys,
    cross_attention_branch,
    mlp_branch,
    modulation_parts,
    queries_keys_values,
    self_attention,
    self_attention_branch,
    whole_ascend_block,
    whole_block,
)
from mindsigma.models.dit.heads import head_width, narrow_columns, narrow_rows, widen_columns, widen_rows
from mindsigma.models.dit.native_training import native_block, native_block_backward, native_block_keeping
from mindsigma.models.layers import Affine, Norm, normal, parameter
from mindsigma.ops.kernels import NATIVE
from mindsigma.ops.linear_chains import add_gated, add_gated_linear, gelu_linear, modulated_linear


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

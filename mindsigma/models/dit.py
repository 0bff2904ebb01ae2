"""PixArt-Σ's diffusion transformer (arXiv 2403.04692): noisy latents, timestep and caption in, noise and variance out.

Shapes: N images, T = height * width tokens on the grid of patches, L tokens of the caption, K keys that self-attention
keeps, C channels. Parameter names and shapes are the official checkpoint's. models/README.md has the conventions.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Constant

from mindsigma.models.checks import check_caption, check_latents, check_modulation, check_timestep
from mindsigma.models.dit_config import DiTConfig, KVCompression
from mindsigma.models.embeddings import ScalarEmbedder, position_tensor
from mindsigma.models.linear import FlattenedLinear, LayerNorm, Linear, normal, parameter, xavier_uniform
from mindsigma.ops.heads import head_width, join_heads, mask_column, project, project_heads, project_last, widen_tokens
from mindsigma.ops.operators import (
    add_layer_norm,
    attention,
    divide,
    filled,
    gelu,
    kept_multiply_add,
    layer_norm,
    multiply_add,
    narrow,
    plain_layer_norm,
    silu,
    split,
    unstack,
)
from mindsigma.ops.pieces import at_once, pieces_of

__all__ = ["DiT", "DiTBlock", "DiTConfig", "KVCompression"]

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
COMPRESSION_NORM_EPS = 1e-5

# Added to modulation, so that scales are 1 + scale. Rows: shift, scale, gate of attention, then of the MLP.
UNIT = np.array([0, 1, 0, 0, 1, 0], np.float32).reshape(1, 6, 1)
FINAL_UNIT = np.array([0, 1], np.float32).reshape(1, 2, 1)


class SelfAttention(nn.Cell):
    """Attention among the tokens of an image, whose keys and values a layer may compress (paper section 3.2).

    Args:
        config: DiTConfig.
        compression: KVCompression of this layer, or None.
        dtype: of the weights.
        in_fp32: compute the attention itself in fp32 whatever the dtype.
    """

    def __init__(self, config, compression, dtype, in_fp32):
        super().__init__()
        channels = config.hidden_size
        self.number, self.heads = config.num_heads, (config.num_heads, channels // config.num_heads)
        self.scale, self.width = self.heads[1] ** -0.5, head_width(self.heads[1])
        self.qk_norm, self.in_fp32 = config.qk_norm, in_fp32
        self.sampling, self.factor = (compression.sampling, compression.factor) if compression else (None, 1)
        # What follows the projection, a norm or a compression, must not see the columns that make heads wide.
        self.widened = 0 if self.qk_norm else 1 if compression else 3
        self.qkv = Linear(channels, 3 * channels, dtype=dtype)
        self.proj = Linear(channels, channels, dtype=dtype)
        if self.qk_norm:
            self.q_norm = LayerNorm(channels, QK_NORM_EPS, dtype)
            self.k_norm = LayerNorm(channels, QK_NORM_EPS, dtype)
        if self.sampling == "conv":
            r = self.factor
            average = Constant(1.0 / (r * r))  # "Conv Avg Init"
            self.sr = FlattenedLinear((channels, 1, r, r), average, dtype)
            self.norm = LayerNorm(channels, COMPRESSION_NORM_EPS, dtype)

    def construct(self, x, height, width, gather=None, perturbed=0):
        """x (N, T, C) to (N, T, C).

        `gather`: None, or a function (k, v) from the keys and values (N, K, C) of a band of rows to those of the image.
        `perturbed`: so many images at the end, whose tokens each attend to itself alone (arXiv 2403.17377).
        """
        if perturbed > 0:
            # Copies, as what follows is a linear map (see `narrow`).
            x, alone = divide(x, (x.shape[0] - perturbed, perturbed))
            out = ops.concat((self.attended(x, height, width, gather), self.values(alone)), 0)
        else:
            out = self.attended(x, height, width, gather)
        return join_heads(out, self.proj, self.heads, self.width)

    def attended(self, x, height, width, gather):
        """What the tokens of x (N, T, C) take of each other, before the last linear map: (N, T, heads * width)."""
        q, k, v = project_heads(x, self.qkv, self.heads, self.width, 3, self.widened, apart=self.training)
        if self.widened < 3:
            q, k, v = self.normed_and_compressed(q, k, v, height, width)
        if gather is not None:
            k, v = gather(k, v)
        dtype = ms.float32 if self.in_fp32 else x.dtype
        out = attention(ops.cast(q, dtype), ops.cast(k, dtype), ops.cast(v, dtype), self.number, self.scale)
        return ops.cast(out, x.dtype)

    def normed_and_compressed(self, q, k, v, height, width):
        """Queries (N, T, heads * width), keys and values (N, K, heads * width), of which a layer norms or compresses
        some.
        """
        number, head_dim = self.heads
        if self.qk_norm:
            q, k = widen_tokens(self.q_norm(q), number, head_dim, self.width), self.k_norm(k)
        if self.sampling is not None:
            k, v = self.compress(k, height, width), self.compress(v, height, width)  # (N, K, C)
        return q, widen_tokens(k, number, head_dim, self.width), widen_tokens(v, number, head_dim, self.width)

    def values(self, x):
        """What attention gives where every token of x (N, T, C) attends to itself alone: (N, T, heads * width)."""
        return project_last(x, self.qkv, self.heads, self.width, 3)

    def compress(self, x, height, width):
        """Keep one of r * r of the keys or values x (N, T, C): (N, K, C). Rows and columns left over are dropped.

        K is (height // r) * (width // r); for "uniform_every", which keeps every r-th of the sequence, T // r.
        """
        batch, length, channels = x.shape
        r = self.factor
        if self.sampling == "uniform_every":
            x = narrow(x, 1, 0, length // r * r).reshape(batch, length // r, r, channels)
            return narrow(x, 2, 0, 1).reshape(batch, length // r, channels)
        rows, columns = height // r, width // r
        x = x.reshape(batch, height, width, channels)
        if rows * r != height or columns * r != width:
            x = narrow(narrow(x, 1, 0, rows * r), 2, 0, columns * r)
        x = x.reshape(batch, rows, r, columns, r, channels)
        if self.sampling == "conv":  # depthwise, its stride is its kernel: a weighted sum inside each cell
            weight, bias = self.sr.weights(x.dtype)
            weight = weight.reshape(channels, r * r).transpose(1, 0).reshape(1, 1, r, 1, r, channels)
            return self.norm((x * weight).sum((2, 4)).reshape(batch, rows * columns, channels) + bias)
        if self.sampling == "pool":
            return (x.sum((2, 4)) * (1.0 / r**2)).reshape(batch, rows * columns, channels)
        return narrow(narrow(x, 2, 0, 1), 4, 0, 1).reshape(batch, rows * columns, channels)


class CrossAttention(nn.Cell):
    """Attention of the tokens of an image to those of the caption; the projection starts at zero."""

    def __init__(self, config, dtype):
        super().__init__()
        channels = config.hidden_size
        self.number, self.heads = config.num_heads, (config.num_heads, channels // config.num_heads)
        self.scale, self.width = self.heads[1] ** -0.5, head_width(self.heads[1], masked=True)
        self.q_linear = Linear(channels, channels, dtype=dtype)
        self.kv_linear = Linear(channels, 2 * channels, dtype=dtype)
        self.proj = Linear(channels, channels, "zeros", dtype=dtype)

    def text_kv(self, caption, mask):
        """Keys and values (N, L, heads * width) of a projected caption (N, L, C) with mask (N, L) or None."""
        k, v = project_heads(caption, self.kv_linear, self.heads, self.width, 2, 2)
        return (k, v) if mask is None else (mask_column(k, mask, self.heads, self.width), v)

    def construct(self, x, k, v):
        """x (N, T, C) to (N, T, C); k and v of `text_kv`."""
        q = project(x, self.q_linear, self.heads, self.width, first=1.0)
        out = attention(q, k, v, self.number, self.scale)
        return join_heads(out, self.proj, self.heads, self.width)


class MLP(nn.Cell):
    """Two linear maps with GELU (tanh) between."""

    def __init__(self, in_features, hidden_features, out_features, init=None, dtype=ms.float32):
        super().__init__()
        self.hidden = hidden_features
        self.fc1 = Linear(in_features, hidden_features, init, dtype=dtype)
        self.fc2 = Linear(hidden_features, out_features, init, dtype=dtype)

    def construct(self, x):
        """x (..., in) to (..., out)."""
        if self.training or at_once(x, self.hidden):
            return self.whole(x)
        pieces = ()
        for piece in pieces_of(x, self.hidden):
            pieces += (self.whole(piece),)
        return ops.concat(pieces, 0).reshape(x.shape[:-1] + (-1,))

    def whole(self, x):
        """`construct` of all tokens at once."""
        return self.fc2(gelu(self.fc1(x)))


class DiTBlock(nn.Cell):
    """Block `layer`: modulated self-attention, cross-attention to the caption, modulated MLP."""

    def __init__(self, config, layer, dtype, fp32_attention):
        super().__init__()
        channels = config.hidden_size
        self.scale_shift_table = parameter((6, channels), normal(channels**-0.5), dtype)
        self.attn = SelfAttention(config, config.layer_compression(layer), dtype, fp32_attention)
        self.cross_attn = CrossAttention(config, dtype)
        self.mlp = MLP(channels, int(channels * config.mlp_ratio), channels, dtype=dtype)

    def modulation(self, t6):
        """What `construct` takes: (N, 6, C), from the timestep's modulation (N, 6 * C), which all blocks share."""
        table = ops.cast(self.scale_shift_table, t6.dtype)
        return table + t6.reshape(-1, 6, table.shape[1]) + constant(UNIT, t6.dtype)

    def text_kv(self, caption, mask):
        """What `construct` takes of a projected caption (N, L, C) and its mask (N, L) or None: a pair of tensors."""
        return self.cross_attn.text_kv(caption, mask)

    def construct(self, x, modulation, text_k, text_v, height, width, gather=None, text_change=None, perturbed=0):
        """Transform tokens x (N, T, C).

        Args:
            modulation: (N or 1, 6, C).
            text_k, text_v: of `text_kv`.
            height, width: of the grid of tokens.
            gather: None, or a function (k, v) from the keys and values (N, K, C) of a band of rows of the image, after
                their compression, to those of the whole image.
            text_change: (N, T, C), what cross-attention adds, where it is known from a call before.
            perturbed: so many images at the end have the identity for a map of self-attention, with all their values
                also in a layer that compresses them (sampling/perturbed.py).

        Returns:
            the tokens (N, T, C), and what cross-attention added.
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = rows_of(modulation, self.training)
        h = modulated_norm(x, shift, scale)
        x = multiply_add(x, self.attn(h, height, width, gather, perturbed), gate)
        if text_change is None:
            text_change = self.cross_attn(x, text_k, text_v)
        x, h = add_modulated_norm(x, text_change, mlp_shift, mlp_scale)
        return kept_multiply_add(x, self.mlp(h), mlp_gate), text_change


class FinalLayer(nn.Cell):
    """Modulated norm and a linear map to the patches of the prediction, which starts at zero."""

    def __init__(self, config, dtype):
        super().__init__()
        self.patch_size = config.patch_size
        self.linear = Linear(config.hidden_size, config.patch_size**2 * config.out_channels, "zeros", dtype=dtype)
        self.scale_shift_table = parameter((2, config.hidden_size), normal(config.hidden_size**-0.5), dtype)

    def modulation(self, t):
        """What `construct` takes: (N, 2, C), shift and 1 + scale, from the timestep's embedding (N, C)."""
        table = ops.cast(self.scale_shift_table, t.dtype)
        return table + t.reshape(-1, 1, t.shape[-1]) + constant(FINAL_UNIT, t.dtype)

    def construct(self, x, modulation, height, width):
        """Tokens x (N, T, C) to (N, out_channels, h, w)."""
        shift, scale = rows_of(modulation, self.training)
        x = self.linear(modulated_norm(x, shift, scale))  # (N, T, p * p * out_channels)
        batch, p = x.shape[0], self.patch_size
        x = x.reshape(batch, height, width, p, p, -1)
        return x.transpose(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * p, width * p)


class PatchEmbedding(nn.Cell):
    """Latents to tokens: the patch convolution, as a linear map of flattened patches."""

    def __init__(self, config, dtype):
        super().__init__()
        self.patch_size, channels = config.patch_size, config.in_channels
        p = self.patch_size
        init = xavier_uniform(channels * p * p, config.hidden_size)
        self.proj = FlattenedLinear((config.hidden_size, channels, p, p), init, dtype)

    def construct(self, latents, position):
        """Latents (N, c, h, w) and position (1, T, C) to tokens (N, T, C), row by row."""
        batch, channels, height, width = latents.shape
        p = self.patch_size
        x = latents.reshape(batch, channels, height // p, p, width // p, p)
        x = x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)
        return self.proj(x) + position


class CaptionEmbedding(nn.Cell):
    """Caption states (N, L, caption_channels) to (N, L, C)."""

    def __init__(self, config, dtype):
        super().__init__()
        self.y_proj = MLP(config.caption_channels, config.hidden_size, config.hidden_size, normal(0.02), dtype)

    def construct(self, caption):
        return self.y_proj(caption)


class DiT(nn.Cell):
    """PixArt-Σ's transformer.

    Args:
        config: DiTConfig.
        dtype: MindSpore dtype of activations.
        parameter_dtype: of the weights, cast to `dtype` where they are used; by default `dtype`.
        fp32_attention: compute self-attention in fp32 whatever the dtype.
    """

    def __init__(self, config, dtype=ms.float32, parameter_dtype=None, fp32_attention=False):
        super().__init__()
        self.config, self.dtype = config, dtype
        dtype, channels = parameter_dtype or dtype, config.hidden_size
        self.x_embedder = PatchEmbedding(config, dtype)
        self.t_embedder = ScalarEmbedder(channels, dtype)
        self.t_block = nn.CellList([nn.Identity(), Linear(channels, 6 * channels, normal(0.02), dtype=dtype)])
        self.y_embedder = CaptionEmbedding(config, dtype)
        if config.micro_condition:
            self.csize_embedder = ScalarEmbedder(channels // 3, dtype)
            self.ar_embedder = ScalarEmbedder(channels // 3, dtype)
        self.blocks = nn.CellList([DiTBlock(config, layer, dtype, fp32_attention) for layer in range(config.depth)])
        self.final_layer = FinalLayer(config, dtype)

    def construct(self, latents, timestep, caption, caption_mask=None, image_size=None, aspect_ratio=None):
        """Predict noise and variance.

        Args:
            latents: (N, in_channels, h, w); h and w multiples of patch_size.
            timestep: (N,), in training steps 0 ... 999; fractions are kept.
            caption: (N, L, caption_channels), T5 states.
            caption_mask: (N, L), 1 for tokens that count, or None for all.
            image_size: (N, 2), height and width in pixels, and aspect_ratio: (N, 1), height / width; both with
                `micro_condition` only.

        Returns:
            (N, out_channels, h, w) in the model's dtype.
        """
        position = self.position(latents.shape)
        has_conditions = image_size is not None and aspect_ratio is not None
        check_timestep(self.config, timestep.shape, latents.shape[0], has_conditions)
        text_kv = self.text_kv(caption, caption_mask)
        return self.run(latents, self.modulations(timestep, image_size, aspect_ratio), text_kv, position)

    def text_kv(self, caption, caption_mask=None):
        """What the blocks take of the caption, which does not change from step to step: a tuple, one pair a block."""
        caption = self.embed_caption(caption, caption_mask)
        pairs = ()
        for block in self.blocks:
            pairs += (block.text_kv(caption, caption_mask),)
        return pairs

    def embed_caption(self, caption, caption_mask=None):
        """The caption (N, L, caption_channels) as (N, L, C), its shape and the mask's checked."""
        check_caption(self.config, caption.shape, None if caption_mask is None else caption_mask.shape)
        return self.y_embedder(caption.astype(self.dtype))

    def modulations(self, timestep, image_size=None, aspect_ratio=None):
        """What the blocks and the final layer take of timesteps (N,): a tuple of (N, 6, C), the last one (N, 2, C)."""
        t, t6 = self.embed_timestep(timestep, image_size, aspect_ratio)
        rows = ()
        for block in self.blocks:
            rows += (block.modulation(t6),)
        return rows + (self.final_layer.modulation(t),)

    def embed_timestep(self, timestep, image_size=None, aspect_ratio=None):
        """The embedding (N, C) of timesteps (N,), and what all blocks share of it, (N, 6 * C).

        Micro conditions are one for each timestep, or one for all.
        """
        t = self.t_embedder(timestep, self.dtype)
        if self.config.micro_condition:
            size = self.csize_embedder(image_size, self.dtype)  # (N, 2 C / 3)
            t = t + ops.concat((size, self.ar_embedder(aspect_ratio, self.dtype)), -1)
        return t, self.t_block[1](silu(t))

    def position(self, shape, band=None):
        """Position embedding (1, T, C) for latents of a shape (N, c, h, w), or for a band of its rows of tokens.

        Args:
            band: (first row, number of rows) or None for all.
        """
        check_latents(self.config, shape)
        config = self.config
        height, width = shape[2] // config.patch_size, shape[3] // config.patch_size
        first, count = (0, height) if band is None else band
        return position_tensor(
            height, width, config.hidden_size, config.base_size, config.pe_interpolation, self.dtype, first, count
        )

    def denoise(self, latents, modulation, text_kv, position, gather=None, control=None):
        """`construct` in parts that sampling makes once, for an image or a band of its rows.

        Args:
            modulation: (N or 1, 6 * depth + 2, C), the `modulations` side by side.
            text_kv: of the method of this name.
            position: of `position`, which checks the shape, too.
            gather: function (k, v) of a layer's keys and values (N, K, C) of the band, compressed, to those of the
                whole image; None if the latents are all of it.
            control: of `run`.
        """
        check_modulation(modulation.shape, latents.shape[0])
        return self.run(latents, self.split_modulation(modulation), text_kv, position, gather, control)

    def split_modulation(self, modulation):
        """`modulations` of `denoise`'s argument."""
        rows, depth = (), self.config.depth
        for i in range(depth):
            rows += (narrow(modulation, 1, 6 * i, 6),)
        return rows + (narrow(modulation, 1, 6 * depth, 2),)

    def run(self, latents, modulations, text_kv, position, gather=None, control=None):
        """The network itself.

        `control`: None, or a function from the tokens (N, T, C) after block 0 to a tuple of what is added to them
        before blocks 1, 2, ..., one for each as far as it goes (controlnet.py).
        """
        p = self.config.patch_size
        height, width = latents.shape[2] // p, latents.shape[3] // p
        x = self.x_embedder(latents.astype(self.dtype), position)
        added = ()
        for i, block in enumerate(self.blocks):
            if i == 1 and control is not None:
                added = control(x)
            if 1 <= i <= len(added):
                x = x + added[i - 1]
            x, _ = block(x, modulations[i], text_kv[i][0], text_kv[i][1], height, width, gather)
        return self.final_layer(x, modulations[self.config.depth], height, width)


def modulated_norm(x, shift, scale):
    """LayerNorm of x (N, T, C) times scale plus shift, both (C,) or (N, 1, C)."""
    if len(scale.shape) == 1:  # one timestep for the batch, as in sampling: LayerNorm's own weight and bias
        return layer_norm(x, scale, shift, NORM_EPS)
    return multiply_add(shift, plain_layer_norm(x, NORM_EPS), scale)


def add_modulated_norm(x, change, shift, scale):
    """x + change of one shape (N, T, C), and the `modulated_norm` of it."""
    if len(scale.shape) == 1:
        return add_layer_norm(x, change, scale, shift, NORM_EPS)
    channels = x.shape[-1:]
    x, norm = add_layer_norm(x, change, filled(channels, 1.0, x.dtype), filled(channels, 0.0, x.dtype), NORM_EPS)
    return x, multiply_add(shift, norm, scale)


def rows_of(modulation, training):
    """The rows of (N, K, C): K of (C,) where one holds for the batch in sampling, else of (N, 1, C).

    A norm's own weight would get its gradient in fp32 whatever the dtype, so in training it is none of ours.
    """
    if modulation.shape[0] == 1 and not training:
        return unstack(modulation.reshape(modulation.shape[1:]), 0)
    return split(modulation, modulation.shape[1], 1)


@ops.constexpr
def constant(array, dtype):
    """An array as a constant of the graph."""
    return Tensor(array, dtype)

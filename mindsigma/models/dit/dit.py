"""The diffusion transformer: noisy latents, timestep and caption in, noise and variance out."""

from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import ascend_block as ascend
from mindsigma.models.dit.block import MLP, NORM_EPS, UNIT, DiTBlock
from mindsigma.models.dit.embeddings import ScalarEmbedder, embed_scalars, position_tensor
from mindsigma.models.dit.execution import Execution
from mindsigma.models.dit.native_blocks import NativeBlocks
from mindsigma.models.layers import Affine, normal, parameter, xavier_uniform
from mindsigma.ops.functional import linear, silu
from mindsigma.ops.kernels import NATIVE, for_ascend, resolve_kernels
from mindsigma.ops.linear_chains import linear_gelu, modulated_linear, plain_linear, takes_natively
from mindsigma.ops.native import operations as native

FINAL_UNIT = np.array([0, 1], np.float32).reshape(1, 2, 1)


def project_caption(caption, kernels, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Caption states (N, L, caption_channels) to (N, L, C)."""
    return plain_linear(linear_gelu(caption, kernels, fc1_weight, fc1_bias), kernels, fc2_weight, fc2_bias)


def embed_latents(latents, position, patch_size, kernels, weight, bias):
    """Tokens (N, T, C) of latents (N, c, h, w), with position (1, T, C)."""
    if takes_natively(latents, weight, kernels):
        return native.patch_embedding(latents, position, weight, bias)
    x = patchify(latents, patch_size)
    if for_ascend(kernels):
        return ascend.dense(x, weight.reshape(weight.shape[0], -1), bias, kernels) + position
    tokens = linear(x, weight, bias)
    return tokens + ops.tile(position, (tokens.shape[0], 1, 1))


def embed_conditions(timestep, image_size, aspect_ratio, dtype, weight, bias, *embedders):
    """Timestep embedding (N, C), with micro conditions unless these are None, and its modulation (N, 6 * C)."""
    t = embed_scalars(timestep, dtype, *embedders[:4])
    if image_size is not None:
        size = embed_scalars(image_size, dtype, *embedders[4:8])  # (N, 2 C / 3)
        ratio = embed_scalars(aspect_ratio, dtype, *embedders[8:12])  # (N, C / 3)
        t = t + ops.concat((size, ratio), -1)
    return t, linear(silu(t), weight, bias)


@ops.constexpr
def unit_of_all(depth, channels, dtype):
    """((6 * depth + 2) * C,): what is added to the rows of `all_rows`, so that scales are 1 + scale."""
    unit = np.concatenate([np.tile(UNIT, (1, depth, 1)), FINAL_UNIT], 1)
    return Tensor(np.tile(unit, (1, 1, channels)).reshape(-1), dtype)


@ops.constexpr
def final_unit(dtype):
    """FINAL_UNIT as a constant of the graph."""
    return Tensor(FINAL_UNIT, dtype)


def all_rows(timestep, image_size, aspect_ratio, dtype, depth, weight, bias, *rest):
    """Rows (S, 6 * depth + 2, C) of timesteps (S,): of each block (block.block_rows), and of the final layer.

    `rest`: the tables of the blocks and of the final layer, then the embedders' weights as of `embed_conditions`.
    """
    t, modulation = embed_conditions(timestep, image_size, aspect_ratio, dtype, weight, bias, *rest[depth + 1 :])
    steps, channels = t.shape
    blocks = ops.tile(modulation.reshape(steps, 6, channels), (1, depth, 1))
    final = ops.tile(t.reshape(steps, 1, channels), (1, 2, 1))
    rows = ops.concat((blocks, final), 1).reshape(steps, -1)
    # Additions that broadcast would keep 16 bytes for each element of their result on a CPU.
    rows = ops.bias_add(rows, ops.concat(rest[: depth + 1], 0).reshape(-1))
    rows = ops.bias_add(rows, unit_of_all(depth, channels, rows.dtype))
    return rows.reshape(steps, 6 * depth + 2, channels)


def split_rows(rows, depth):
    """The result of `all_rows` as a tuple: (S, 6, C) for each block, (S, 2, C) for the final layer."""
    result = ()
    for i in range(depth):
        result += (rows[:, 6 * i : 6 * i + 6],)
    return result + (rows[:, 6 * depth :],)


def final_rows(t, table):
    """Rows (N, 2, C) of the final layer in training, from the timestep's embedding (N, C)."""
    rows = table + t.reshape(-1, 1, t.shape[-1])
    return rows + final_unit(rows.dtype)


def predict(x, rows, height, width, shift_row, patch_size, kernels, weight, bias):
    """Output (N, out, h, w) of tokens x (N, height * width, C), modulated by two of the rows (N or 1, R, C)."""
    if for_ascend(kernels):
        shift, scale = ascend.rows_of(rows[:, shift_row : shift_row + 2])
        x = ascend.dense(ascend.modulated_norm(x, shift, scale, kernels), weight, bias, kernels)
    else:
        x = modulated_linear(x, rows, shift_row, NORM_EPS, kernels, weight, bias)
    return unpatchify(x, height, width, patch_size)


def predict_like(x, rows, latents, shift_row, patch_size, kernels, weight, bias):
    """`predict` for the patches of latents (N, c, h, w)."""
    if takes_natively(x, weight, kernels):
        return native.patch_prediction(x, rows, latents, shift_row, NORM_EPS, weight, bias)
    height, width = latents.shape[2] // patch_size, latents.shape[3] // patch_size
    return predict(x, rows, height, width, shift_row, patch_size, kernels, weight, bias)


def patchify(latents, patch_size):
    """(N, c, h, w) to (N, T, c * p * p), tokens row by row, channels in the order of a convolution's kernel."""
    batch, channels, height, width = latents.shape
    p = patch_size
    x = latents.reshape(batch, channels, height // p, p, width // p, p)
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(x, height, width, patch_size):
    """(N, height * width, p * p * c), channel last, to (N, c, height * p, width * p)."""
    batch, p = x.shape[0], patch_size
    x = x.reshape(batch, height, width, p, p, -1)
    return x.transpose(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * p, width * p)


@ops.constexpr
def check_latents(config, shape):
    """Raise MindSigmaError for shapes of latents that the model cannot take."""
    p, side = config.patch_size, config.input_size
    if len(shape) != 4 or shape[1] != config.in_channels:
        raise MindSigmaError(f"latents of shape {tuple(shape)}: expected (N, {config.in_channels}, h, w)")
    if shape[2] % p or shape[3] % p:
        raise MindSigmaError(f"latents of {shape[2]} x {shape[3]}: both sides must be multiples of {p}")
    if not config.multi_scale and tuple(shape[2:]) != (side, side):
        raise MindSigmaError(
            f"latents of {shape[2]} x {shape[3]}: this single-scale model takes {side} x {side}; "
            "multi_scale=True allows other sizes"
        )
    rows, columns = shape[2] // p, shape[3] // p
    compression = config.kv_compression
    if compression is not None:
        smallest = rows * columns if compression.sampling == "uniform_every" else min(rows, columns)
        if smallest < compression.factor:
            raise MindSigmaError(f"latents of {shape[2]} x {shape[3]} are too small for {compression}")


@ops.constexpr
def check_timestep(config, shape, batch, has_micro_condition):
    """Raise MindSigmaError for a timestep that is not one for each of the latents, or for missing conditions."""
    if len(shape) != 1 or shape[0] != batch:
        raise MindSigmaError(f"timestep of shape {tuple(shape)}: expected ({batch},), one for each of the latents")
    if config.micro_condition and not has_micro_condition:
        raise MindSigmaError("this model needs image_size and aspect_ratio (micro_condition)")


@ops.constexpr
def check_rows(shape, batch):
    """Raise MindSigmaError for rows of modulation that are neither one for each of the latents nor one for all.

    The native kernels read as many as there are latents.
    """
    if shape[0] not in (1, batch):
        raise MindSigmaError(
            f"rows of shape {tuple(shape)} for {batch} latents: expected one for each, or one for all; "
            "image_size and aspect_ratio are one for each timestep, or one for all"
        )


@ops.constexpr
def check_caption(config, shape, mask):
    """Raise MindSigmaError for shapes of a caption and its mask that the model cannot take."""
    if len(shape) != 3 or shape[2] != config.caption_channels:
        raise MindSigmaError(f"caption of shape {tuple(shape)}: expected (N, L, {config.caption_channels})")
    if mask is not None and tuple(mask) != tuple(shape[:2]):
        raise MindSigmaError(f"caption_mask of shape {tuple(mask)}: expected {tuple(shape[:2])}")


class PatchEmbedding(nn.Cell):
    """Weights of the patch convolution, initialised as a linear map of flattened patches."""

    def __init__(self, config, dtype):
        super().__init__()
        p, channels = config.patch_size, config.in_channels
        fan_in = channels * p * p
        init = xavier_uniform(fan_in, config.hidden_size)
        self.proj = Affine(fan_in, config.hidden_size, init, (config.hidden_size, channels, p, p), dtype=dtype)


class CaptionEmbedding(nn.Cell):
    """Weights of the caption MLP."""

    def __init__(self, config, dtype):
        super().__init__()
        self.y_proj = MLP(config.caption_channels, config.hidden_size, config.hidden_size, normal(0.02), dtype)


class FinalLayer(nn.Cell):
    """Weights of the last modulation and linear map; the map starts at zero."""

    def __init__(self, config, dtype):
        super().__init__()
        features = config.patch_size**2 * config.out_channels
        self.linear = Affine(config.hidden_size, features, "zeros", dtype=dtype)
        self.scale_shift_table = parameter((2, config.hidden_size), normal(config.hidden_size**-0.5), dtype)


class DiT(nn.Cell):
    """PixArt-Σ's transformer. Parameter names and shapes are the official checkpoint's.

    Called from PyNative it runs one compiled block n times (see SharedGraph); in graph mode, under `mindspore.jit` and
    in `mindspore.export` it is one graph. (A graph made with `mindspore.jit` keeps the memory its weights had when it
    was compiled: change them in place, with `ops.assign`, not with `set_data`.)

    Args:
        config: DiTConfig.
        dtype: MindSpore dtype of activations.
        kernels: see ops/kernels.py; by default what the device target offers.
        parameter_dtype: of the weights, cast to `dtype` where they are used; by default `dtype`.
        fp32_attention: compute self-attention in fp32 whatever the dtype.
    """

    def __init__(self, config, dtype=ms.float32, kernels=None, parameter_dtype=None, fp32_attention=False):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.kernels = resolve_kernels(kernels)
        execution = Execution(dtype, self.kernels, parameter_dtype or dtype, fp32_attention and dtype != ms.float32)
        graph, dtype = execution.graph, execution.parameter_dtype
        channels = config.hidden_size
        self.x_embedder = PatchEmbedding(config, dtype)
        self.t_embedder = ScalarEmbedder(channels, dtype)
        self.t_block = nn.CellList([nn.Identity(), Affine(channels, 6 * channels, normal(0.02), dtype=dtype)])
        self.y_embedder = CaptionEmbedding(config, dtype)
        if config.micro_condition:
            self.csize_embedder = ScalarEmbedder(channels // 3, dtype)
            self.ar_embedder = ScalarEmbedder(channels // 3, dtype)
        self.blocks = nn.CellList([DiTBlock(config, i, execution) for i in range(config.depth)])
        self.final_layer = FinalLayer(config, dtype)

        p, final, table = config.patch_size, self.final_layer, self.final_layer.scale_shift_table
        self.embed_latents = graph(embed_latents, self.x_embedder.proj.tensors, (p, self.kernels), of_operations=True)
        embedders = self.t_embedder.tensors
        if config.micro_condition:
            embedders += self.csize_embedder.tensors + self.ar_embedder.tensors
        conditions, tables = self.t_block[1].tensors, tuple(block.scale_shift_table for block in self.blocks)
        self.embed_conditions = graph(embed_conditions, conditions + embedders, (self.dtype,))
        self.all_rows = graph(all_rows, conditions + tables + (table,) + embedders, (self.dtype, config.depth))
        self.split_rows = graph(split_rows, (), (config.depth,))
        self.final_rows = graph(final_rows, (table,), ())
        self.predict = graph(predict, final.linear.tensors, (0, p, self.kernels))
        one_call = self.kernels == NATIVE and execution.native
        self.native_blocks = NativeBlocks(self, 0, config.depth) if one_call else None
        last = (6 * config.depth, p, self.kernels)
        self.predict_of_all = graph(predict_like, final.linear.tensors, last, of_operations=True)
        self.project_caption = graph(project_caption, self.y_embedder.y_proj.tensors, (self.kernels,))
        self.aligns_heads, self.aligned = execution.ascend_block, False

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
        keys = self.encode_caption(caption, caption_mask)
        if not self.training:
            return self.denoise(latents, self.modulations(timestep, image_size, aspect_ratio), keys, position)
        if not self.config.micro_condition:
            image_size, aspect_ratio = None, None
        t, modulation = self.embed_conditions(timestep, image_size, aspect_ratio)
        rows = ()
        for _ in self.blocks:
            rows += (modulation,)
        return self.run(latents, rows + (self.final_rows(t),), keys, position)

    def encode_caption(self, caption, caption_mask=None):
        """Return what the blocks derive from the caption alone: a tuple of (keys, values), one pair a block."""
        check_caption(self.config, caption.shape, None if caption_mask is None else caption_mask.shape)
        caption = self.project_caption(caption.astype(self.dtype))
        keys = ()
        for block in self.blocks:
            keys += (block.keys_of(caption, caption_mask),)
        return keys

    def modulations(self, timestep, image_size=None, aspect_ratio=None):
        """Return what the blocks derive from timesteps (S,) alone: (S, 6 * depth + 2, C).

        Micro conditions are one for each timestep, or one for all.
        """
        if not self.config.micro_condition:
            image_size, aspect_ratio = None, None
        return self.all_rows(timestep, image_size, aspect_ratio)

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

    def denoise(self, latents, rows, keys, position, gather=None):
        """`construct` in parts that sampling makes once, for an image or a band of its rows.

        Args:
            rows: of `modulations`, for each of the latents (N, ...) or one for all (1, ...).
            keys: of `encode_caption`.
            position: of `position`, which checks the shape, too.
            gather: function (k, v) of a layer's keys and values (N, K, C) of the band, compressed, to those of the
                whole image; None if the latents are all of it.
        """
        check_rows(rows.shape, latents.shape[0])
        if gather is not None or not self.takes_one_call():
            return self.run(latents, self.split_rows(rows), keys, position, gather)
        p = self.config.patch_size
        height, width = latents.shape[2] // p, latents.shape[3] // p
        latents = latents.astype(self.dtype)
        x = self.native_blocks(self.embed_latents(latents, position), rows, keys, height, width)
        return self.predict_of_all(x, rows, latents)

    def takes_one_call(self):
        """Whether all blocks are one call of the native library outside training."""
        return self.native_blocks is not None and self.native_blocks.graph.layout is None

    def run(self, latents, rows, keys, position, gather=None):
        """The network itself; rows: for each block what it takes, and those of the final layer."""
        p, depth = self.config.patch_size, self.config.depth
        height, width = latents.shape[2] // p, latents.shape[3] // p
        x = self.embed_latents(latents.astype(self.dtype), position)
        for i, block in enumerate(self.blocks):
            x = block(x, rows[i], keys[i][0], keys[i][1], height, width, gather)
        return self.predict(x, rows[depth], height, width)

    def align_heads(self):
        """Widen attention's weights for Ascend's kernel, once; sampling then does it no more. Not for training."""
        if self.aligns_heads and not self.aligned:
            for block in self.blocks:
                block.align_heads()
            self.aligned = True

    @contextmanager
    def published_shapes(self):
        """The weights as checkpoints hold them, while the body runs."""
        aligned, self.aligned = self.aligned, False
        for block in self.blocks if aligned else ():
            block.align_heads(restore=True)
        try:
            yield self
        finally:
            if aligned:
                self.align_heads()

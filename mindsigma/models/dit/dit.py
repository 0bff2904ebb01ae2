"""The diffusion transformer: noisy latents, timestep and caption in, noise and variance out."""

from contextlib import contextmanager

import mindspore as ms
from mindspore import nn

from mindsigma.models.dit.block import MLP, DiTBlock
from mindsigma.models.dit.checks import check_caption, check_latents, check_rows, check_timestep
from mindsigma.models.dit.embeddings import ScalarEmbedder, position_tensor
from mindsigma.models.dit.execution import Execution
from mindsigma.models.dit.modulation import all_rows, embed_conditions, final_rows, split_rows
from mindsigma.models.dit.native_blocks import NativeBlocks
from mindsigma.models.dit.patches import FinalLayer, PatchEmbedding, embed_latents, predict, predict_like
from mindsigma.models.layers import Affine, normal
from mindsigma.ops.kernels import NATIVE, resolve_kernels
from mindsigma.ops.linear_chains import linear_gelu, plain_linear


def project_caption(caption, kernels, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """Caption states (N, L, caption_channels) to (N, L, C)."""
    return plain_linear(linear_gelu(caption, kernels, fc1_weight, fc1_bias), kernels, fc2_weight, fc2_bias)


class CaptionEmbedding(nn.Cell):
    """Weights of the caption MLP."""

    def __init__(self, config, dtype):
        super().__init__()
        self.y_proj = MLP(config.caption_channels, config.hidden_size, config.hidden_size, normal(0.02), dtype)


class DiT(nn.Cell):
    """PixArt-Σ's transformer. Parameter names and shapes are the official checkpoint's.

    Called from PyNative it runs one compiled block n times (see SharedGraph), on the native kernels all blocks in one
    call; in graph mode, under `mindspore.jit` and
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

"""SDXL's AutoencoderKL: images to latents and back (models/README.md, "VAE"). Parameter names are diffusers'."""

import mindspore as ms
from mindspore import nn, ops

from mindsigma.models.linear import Linear, parameter, xavier_uniform
from mindsigma.ops.operators import attention, convolution, group_norm, narrow, silu, upsample_2x

NORM_EPS = 1e-6


class Conv(nn.Cell):
    """Convolution of x (N, C, H, W) that keeps its size or, with `halve`, halves it.

    Args:
        side: of the kernel, 1 or 3.
        halve: take every second place, padded at the bottom and right only.
    """

    def __init__(self, in_channels, out_channels, side=3, halve=False, dtype=ms.float32):
        super().__init__()
        fan, border = side * side, side // 2
        init = xavier_uniform(in_channels * fan, out_channels * fan)
        self.weight = parameter((out_channels, in_channels, side, side), init, dtype)
        self.bias = parameter((out_channels,), "zeros", dtype)
        self.padding = (0, 1, 0, 1) if halve else (border, border, border, border)  # top, bottom, left, right
        self.stride = 2 if halve else 1

    def construct(self, x):
        return convolution(x, self.weight, self.bias, self.stride, self.padding)


class GroupNorm(nn.Cell):
    """GroupNorm of x (N, C, H, W)."""

    def __init__(self, channels, groups, dtype=ms.float32):
        super().__init__()
        self.weight, self.bias = parameter((channels,), "ones", dtype), parameter((channels,), "zeros", dtype)
        self.groups = groups

    def construct(self, x):
        return group_norm(x, self.groups, self.weight, self.bias, NORM_EPS)


class ResnetBlock(nn.Cell):
    """Two norm-silu-convolutions with a residual."""

    def __init__(self, in_channels, out_channels, groups, dtype):
        super().__init__()
        self.norm1 = GroupNorm(in_channels, groups, dtype)
        self.conv1 = Conv(in_channels, out_channels, dtype=dtype)
        self.norm2 = GroupNorm(out_channels, groups, dtype)
        self.conv2 = Conv(out_channels, out_channels, dtype=dtype)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = Conv(in_channels, out_channels, side=1, dtype=dtype)

    def construct(self, x):
        """(N, in_channels, H, W) to (N, out_channels, H, W)."""
        h = self.conv1(silu(self.norm1(x)))
        if self.conv_shortcut is not None:  # now, as x takes more memory than what becomes of it
            x = self.conv_shortcut(x)
        return x + self.conv2(silu(self.norm2(h)))


class PixelAttention(nn.Cell):
    """Attention with a single head among the pixels of the middle block."""

    def __init__(self, channels, groups, dtype):
        super().__init__()
        self.group_norm = GroupNorm(channels, groups, dtype)
        self.to_q = Linear(channels, channels, dtype=dtype)
        self.to_k = Linear(channels, channels, dtype=dtype)
        self.to_v = Linear(channels, channels, dtype=dtype)
        self.to_out = nn.CellList([Linear(channels, channels, dtype=dtype)])

    def construct(self, x):
        """(N, C, H, W) to the same."""
        batch, channels, height, width = x.shape
        h = self.group_norm(x).reshape(batch, channels, height * width).transpose(0, 2, 1)  # (N, H * W, C)
        h = attention(self.to_q(h), self.to_k(h), self.to_v(h), 1, channels**-0.5)
        return x + self.to_out[0](h).transpose(0, 2, 1).reshape(x.shape)


class MidBlock(nn.Cell):
    """Two resnet blocks with attention between."""

    def __init__(self, channels, config, dtype):
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.CellList([ResnetBlock(channels, channels, groups, dtype) for _ in range(2)])
        self.attentions = None
        if config.mid_block_add_attention:
            self.attentions = nn.CellList([PixelAttention(channels, groups, dtype)])

    def construct(self, x):
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Downsampler(nn.Cell):
    """Halves the resolution."""

    def __init__(self, channels, dtype):
        super().__init__()
        self.conv = Conv(channels, channels, halve=True, dtype=dtype)

    def construct(self, x):
        return self.conv(x)


class Upsampler(nn.Cell):
    """Doubles the resolution."""

    def __init__(self, channels, dtype):
        super().__init__()
        self.conv = Conv(channels, channels, dtype=dtype)

    def construct(self, x):
        return self.conv(upsample_2x(x))


class Level(nn.Cell):
    """The resnet blocks of one resolution, and what leads to the next: "down", "up" or None."""

    def __init__(self, in_channels, out_channels, num_layers, resample, config, dtype):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.CellList(
            [ResnetBlock(a, b, config.norm_num_groups, dtype) for a, b in zip(widths, widths[1:])]
        )
        self.resample = resample
        if resample == "down":
            self.downsamplers = nn.CellList([Downsampler(out_channels, dtype)])
        elif resample == "up":
            self.upsamplers = nn.CellList([Upsampler(out_channels, dtype)])

    def construct(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            x = self.downsamplers[0](x)
        elif self.resample == "up":
            x = self.upsamplers[0](x)
        return x


class Encoder(nn.Cell):
    """Image to moments: levels of growing width, a middle block, a convolution to mean and log variance."""

    def __init__(self, config, dtype):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], dtype=dtype)
        levels = []
        for i, width in enumerate(widths):
            resample = "down" if i + 1 < len(widths) else None
            levels.append(Level(widths[max(i - 1, 0)], width, config.layers_per_block, resample, config, dtype))
        self.down_blocks = nn.CellList(levels)
        self.mid_block = MidBlock(widths[-1], config, dtype)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, dtype=dtype)

    def construct(self, x):
        """(N, 3, H, W) to (N, 2 * c, H / 8, W / 8)."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Cell):
    """Latents to image: a middle block, levels of shrinking width, a convolution to colours."""

    def __init__(self, config, dtype):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], dtype=dtype)
        self.mid_block = MidBlock(widths[0], config, dtype)
        levels = []
        for i, width in enumerate(widths):
            resample = "up" if i + 1 < len(widths) else None
            levels.append(Level(widths[max(i - 1, 0)], width, config.layers_per_block + 1, resample, config, dtype))
        self.up_blocks = nn.CellList(levels)
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, dtype=dtype)

    def construct(self, z):
        """(N, c, h, w) to (N, 3, 8 * h, 8 * w)."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(silu(self.conv_norm_out(x)))


class _Moments(nn.Cell):
    """The encoding half of a VAE, so that in graph mode it is one graph."""

    def __init__(self, encoder, quant_conv):
        super().__init__(auto_prefix=False)
        self.encoder, self.quant_conv = encoder, quant_conv

    def construct(self, images):
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)


class VAE(nn.Cell):
    """AutoencoderKL.

    Args:
        config: VAEConfig.
        dtype: dtype of weights and activations.
    """

    def __init__(self, config, dtype=ms.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.encoder = Encoder(config, dtype)
        self.decoder = Decoder(config, dtype)
        channels = config.latent_channels
        self.quant_conv, self.post_quant_conv = None, None
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, side=1, dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, side=1, dtype=dtype)
        # Not of this VAE: in a circle of references both would outlive their use, and so would what was compiled.
        object.__setattr__(self, "_moments", _Moments(self.encoder, self.quant_conv))

    def construct(self, latents):
        """Decode scaled latents, as the DiT handles them: (N, c, h, w) to images (N, 3, 8h, 8w), about [-1, 1]."""
        return self.decode(latents.astype(self.dtype) / self.config.scaling_factor + self.config.shift_factor)

    def encode(self, images):
        """Moments of images (N, 3, H, W) in [-1, 1]: (N, 2 * c, H / 8, W / 8), mean and then log variance, unscaled."""
        return self._moments(images.astype(self.dtype))

    def decode(self, z):
        """Images (N, 3, 8h, 8w) of unscaled latents (N, c, h, w)."""
        z = z.astype(self.dtype)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


def sample_posterior(moments, noise, config):
    """Scaled latents mean + std * noise from moments (N, 2 * c, h, w) and noise (N, c, h, w); noise None: the mean."""
    channels = config.latent_channels
    z = narrow(moments, 1, 0, channels)
    if noise is not None:
        log_variance = ops.clip_by_value(narrow(moments, 1, channels, channels), -30.0, 20.0)
        z = z + ops.exp(0.5 * log_variance) * noise
    return (z - config.shift_factor) * config.scaling_factor

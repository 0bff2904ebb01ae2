"""SDXL's AutoencoderKL: images to latents and back (reference.md 2.11, 2.14). Parameter names are diffusers'.

Called from PyNative it runs as a chain of small graphs, one for each norm-activation-convolution of a given shape, so
memory is bounded by the largest activation and not by their sum; on the native kernels these are not even compiled.
"""

import mindspore as ms
from mindspore import nn, ops

from mindsigma.models.layers import Affine, Holder, Norm, xavier_uniform
from mindsigma.ops.attention import attend, prepare_keys
from mindsigma.ops.functional import group_norm, group_norm_silu, upsample_nearest_2x
from mindsigma.ops.kernels import is_native, resolve_kernels
from mindsigma.ops.linear_chains import plain_linear
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph

NORM_EPS = 1e-6


def convolve(x, kernel, stride, padding, weight, bias):
    """Convolution of x (N, C, H, W); padding (top, bottom, left, right)."""
    mode = "valid" if padding == (0, 0, 0, 0) else "pad"
    conv = ops.Conv2D(weight.shape[0], kernel, pad_mode=mode, pad=padding, stride=stride)
    return ops.bias_add(conv(x, weight), bias)


def convolve_same(x, kernels, weight, bias, residual=None, enlarge=False):
    """1x1 or 3x3 convolution of x (N, C, H, W) that keeps its size, plus the residual if there is one.

    With `enlarge` of x enlarged twofold.
    """
    if is_native(x, kernels):
        return native.convolution(x, weight, bias, residual, enlarge)
    side = weight.shape[-1]
    border = side // 2
    y = convolve(upsample_nearest_2x(x) if enlarge else x, side, 1, (border, border, border, border), weight, bias)
    return y if residual is None else residual + y


def norm_silu_conv(x, groups, kernels, norm_weight, norm_bias, weight, bias):
    """3x3 convolution of silu(GroupNorm(x)), the unit that most of a VAE is made of."""
    x = group_norm_silu(x, groups, norm_weight, norm_bias, NORM_EPS, kernels)
    return convolve_same(x, kernels, weight, bias)


def norm_silu_conv_add(x, residual, groups, kernels, norm_weight, norm_bias, weight, bias):
    """`norm_silu_conv` plus the residual; x may be overwritten."""
    x = group_norm_silu(x, groups, norm_weight, norm_bias, NORM_EPS, kernels, last_use=True)
    return convolve_same(x, kernels, weight, bias, residual)


def upsample_conv(x, kernels, weight, bias):
    """3x3 convolution of the image enlarged twofold."""
    return convolve_same(x, kernels, weight, bias, enlarge=True)


def pixel_attention(x, groups, kernels, norm_weight, norm_bias, *projections):
    """x (N, C, H, W) plus single-head attention among its pixels; projections: weight and bias of q, k, v, out."""
    batch, channels, height, width = x.shape
    h = group_norm(x, groups, norm_weight, norm_bias, NORM_EPS, kernels)
    h = h.reshape(batch, channels, height * width).transpose(0, 2, 1)  # (N, H * W, C)
    q, k, v = (plain_linear(h, kernels, projections[i], projections[i + 1]) for i in (0, 2, 4))
    k, v = prepare_keys(k, v, None, 1, kernels)
    h = plain_linear(attend(q, k, v, 1, kernels), kernels, projections[6], projections[7])
    return x + h.transpose(0, 2, 1).reshape(x.shape)


class Conv(Holder):
    """A convolution that runs as a shared graph of its own.

    Args:
        function, static: what runs and its options; by default `convolve_same`.
    """

    def __init__(self, in_channels, out_channels, kernels, side=3, dtype=ms.float32, function=convolve_same, static=()):
        super().__init__()
        fan = side * side
        init = xavier_uniform(in_channels * fan, out_channels * fan)
        holder = Affine(in_channels, out_channels, init, (out_channels, in_channels, side, side), dtype=dtype)
        self.weight, self.bias = holder.weight, holder.bias
        self.run = SharedGraph(function, self.tensors, static or (kernels,), of_operations=True)

    def construct(self, x):
        return self.run(x)


class ResnetBlock(nn.Cell):
    """Two norm-silu-convolutions with a residual."""

    def __init__(self, in_channels, out_channels, groups, dtype, kernels):
        super().__init__()
        self.norm1 = Norm(in_channels, dtype=dtype)
        self.conv1 = Conv(in_channels, out_channels, kernels, dtype=dtype)
        self.norm2 = Norm(out_channels, dtype=dtype)
        self.conv2 = Conv(out_channels, out_channels, kernels, dtype=dtype)
        static = (groups, kernels)
        self.first = SharedGraph(norm_silu_conv, self.norm1.tensors + self.conv1.tensors, static, of_operations=True)
        self.second = SharedGraph(
            norm_silu_conv_add, self.norm2.tensors + self.conv2.tensors, static, of_operations=True
        )
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = Conv(in_channels, out_channels, kernels, side=1, dtype=dtype)

    def construct(self, x):
        h = self.first(x)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        return self.second(h, x)


class PixelAttention(nn.Cell):
    """The attention of the middle block."""

    def __init__(self, channels, groups, dtype, kernels):
        super().__init__()
        self.group_norm = Norm(channels, dtype=dtype)
        self.to_q = Affine(channels, channels, dtype=dtype)
        self.to_k = Affine(channels, channels, dtype=dtype)
        self.to_v = Affine(channels, channels, dtype=dtype)
        self.to_out = nn.CellList([Affine(channels, channels, dtype=dtype)])
        weights = self.group_norm.tensors + self.to_q.tensors + self.to_k.tensors + self.to_v.tensors
        self.run = SharedGraph(pixel_attention, weights + self.to_out[0].tensors, (groups, kernels))

    def construct(self, x):
        return self.run(x)


class MidBlock(nn.Cell):
    """Two resnet blocks with attention between."""

    def __init__(self, channels, config, dtype, kernels):
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.CellList([ResnetBlock(channels, channels, groups, dtype, kernels) for _ in range(2)])
        self.attentions = None
        if config.mid_block_add_attention:
            self.attentions = nn.CellList([PixelAttention(channels, groups, dtype, kernels)])

    def construct(self, x):
        x = self.resnets[0](x)
        if self.attentions is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class _Resampler(nn.Cell):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv


class Level(nn.Cell):
    """The resnet blocks of one resolution, and the convolution that leads to the next."""

    def __init__(self, in_channels, out_channels, num_layers, resample, config, dtype, kernels):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.CellList(
            [ResnetBlock(a, b, config.norm_num_groups, dtype, kernels) for a, b in zip(widths, widths[1:])]
        )
        self.resample = resample
        if resample == "down":
            halving = (3, 2, (0, 1, 0, 1))  # padded at the bottom and right only
            conv = Conv(out_channels, out_channels, kernels, dtype=dtype, function=convolve, static=halving)
            self.downsamplers = nn.CellList([_Resampler(conv)])
        elif resample == "up":
            conv = Conv(out_channels, out_channels, kernels, dtype=dtype, function=upsample_conv)
            self.upsamplers = nn.CellList([_Resampler(conv)])

    def construct(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        if self.resample == "down":
            x = self.downsamplers[0].conv(x)
        elif self.resample == "up":
            x = self.upsamplers[0].conv(x)
        return x


class Encoder(nn.Cell):
    """Image to moments: levels of growing width, a middle block, a convolution to mean and log variance."""

    def __init__(self, config, dtype, kernels):
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = Conv(config.in_channels, widths[0], kernels, dtype=dtype)
        levels = []
        for i, width in enumerate(widths):
            resample = "down" if i + 1 < len(widths) else "none"
            before = widths[max(i - 1, 0)]
            levels.append(Level(before, width, config.layers_per_block, resample, config, dtype, kernels))
        self.down_blocks = nn.CellList(levels)
        self.mid_block = MidBlock(widths[-1], config, dtype, kernels)
        self.conv_norm_out = Norm(widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, kernels, dtype=dtype)
        weights = self.conv_norm_out.tensors + self.conv_out.tensors
        self.last = SharedGraph(norm_silu_conv, weights, (config.norm_num_groups, kernels), of_operations=True)

    def construct(self, x):
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.last(self.mid_block(x))


class Decoder(nn.Cell):
    """Latents to image: a middle block, levels of shrinking width, a convolution to colours."""

    def __init__(self, config, dtype, kernels):
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = Conv(config.latent_channels, widths[0], kernels, dtype=dtype)
        self.mid_block = MidBlock(widths[0], config, dtype, kernels)
        levels = []
        for i, width in enumerate(widths):
            resample = "up" if i + 1 < len(widths) else "none"
            before = widths[max(i - 1, 0)]
            levels.append(Level(before, width, config.layers_per_block + 1, resample, config, dtype, kernels))
        self.up_blocks = nn.CellList(levels)
        self.conv_norm_out = Norm(widths[-1], dtype=dtype)
        self.conv_out = Conv(widths[-1], config.out_channels, kernels, dtype=dtype)
        weights = self.conv_norm_out.tensors + self.conv_out.tensors
        self.last = SharedGraph(norm_silu_conv, weights, (config.norm_num_groups, kernels), of_operations=True)

    def construct(self, z):
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.last(x)


class _Moments(nn.Cell):
    """The encoding half of a VAE, so that in graph mode it is one graph."""

    def __init__(self, vae):
        super().__init__(auto_prefix=False)
        self.vae = vae

    def construct(self, images):
        moments = self.vae.encoder(images)
        return moments if self.vae.quant_conv is None else self.vae.quant_conv(moments)


class VAE(nn.Cell):
    """AutoencoderKL.

    Args:
        config: VAEConfig.
        dtype: dtype of weights and activations.
        kernels: "math" or "fused"; by default what the device target offers.
    """

    def __init__(self, config, dtype=ms.float32, kernels=None):
        super().__init__()
        self.config = config
        self.dtype = dtype
        kernels = resolve_kernels(kernels)
        self.encoder = Encoder(config, dtype, kernels)
        self.decoder = Decoder(config, dtype, kernels)
        channels = config.latent_channels
        self.quant_conv, self.post_quant_conv = None, None
        if config.use_quant_conv:
            self.quant_conv = Conv(2 * channels, 2 * channels, kernels, side=1, dtype=dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv(channels, channels, kernels, side=1, dtype=dtype)

        object.__setattr__(self, "_moments", _Moments(self))

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
    z = moments[:, :channels]
    if noise is not None:
        log_variance = ops.clip_by_value(moments[:, channels:], -30.0, 20.0)
        z = z + ops.exp(0.5 * log_variance) * noise
    return (z - config.shift_factor) * config.scaling_factor

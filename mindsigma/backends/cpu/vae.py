"""Parts of a VAE on the native kernels."""

from mindspore import Tensor

from mindsigma.backends.cpu import kernels
from mindsigma.models.vae import NORM_EPS, VAE, Conv, Decoder, Encoder, PixelAttention, ResnetBlock, Upsampler


def norm_silu(norm, x, out=None):
    """SiLU of a GroupNorm."""
    return kernels.group_norm(x, norm.groups, norm.weight, norm.bias, NORM_EPS, True, out)


def convolve(conv, x, residual=None, enlarge=False, out=None):
    """A Conv that keeps the size, plus the residual; with `enlarge` of x enlarged twofold."""
    return kernels.convolution(x, conv.weight, conv.bias, residual, enlarge, out)


class FastConv(Conv):
    """A convolution that keeps the size."""

    @staticmethod
    def takes(conv):
        """Whether the kernels compute a Conv."""
        return conv.stride == 1

    def construct(self, x):
        """See Conv."""
        return convolve(self, x)


class FastResnet(ResnetBlock):
    """A resnet block whose images between lie in memory that the next one uses again."""

    def construct(self, x):
        """See ResnetBlock."""
        between = kernels.spare("between", *x.shape)
        h = norm_silu(self.norm1, x, out=between)
        h = convolve(
            self.conv1, h, out=kernels.spare("convolved", x.shape[0], self.conv1.weight.shape[0], *x.shape[2:])
        )
        h = norm_silu(self.norm2, h, out=h)
        if self.conv_shortcut is not None:
            x = convolve(self.conv_shortcut, x, out=kernels.spare("shortcut", *h.shape))
        return convolve(self.conv2, h, x)


class FastPixelAttention(PixelAttention):
    """Attention among pixels."""

    def construct(self, x):
        """See PixelAttention."""
        norm, (batch, channels, height, width) = self.group_norm, x.shape
        h = kernels.spare("between", *x.shape)
        kernels.group_norm(x, norm.groups, norm.weight, norm.bias, NORM_EPS, False, h)
        h = kernels.array(h).reshape(batch, channels, height * width).transpose(0, 2, 1).copy()  # (N, H * W, C)
        q, k, v = (kernels.linear(h, map.weight, map.bias) for map in (self.to_q, self.to_k, self.to_v))
        h = kernels.attention(q, k, v, 1, channels**-0.5)
        h = kernels.linear(h, self.to_out[0].weight, self.to_out[0].bias)
        out = kernels.empty(*x.shape)
        kernels.array(out)[:] = kernels.array(x) + kernels.array(h).transpose(0, 2, 1).reshape(x.shape)
        return out


class FastUpsampler(Upsampler):
    """A convolution of the image enlarged twofold, which is not made."""

    def construct(self, x):
        """See Upsampler."""
        return convolve(self.conv, x, enlarge=True)


class FastEncoder(Encoder):
    """An encoder with its last norm, activation and convolution in one."""

    def construct(self, x):
        """See Encoder."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return convolve(self.conv_out, norm_silu(self.conv_norm_out, x, kernels.spare("between", *x.shape)))


class FastDecoder(Decoder):
    """A decoder with its last norm, activation and convolution in one."""

    def construct(self, z):
        """See Decoder."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return convolve(self.conv_out, norm_silu(self.conv_norm_out, x, kernels.spare("between", *x.shape)))


class FastVAE(VAE):
    """A VAE that brings latents to its own scale on arrays."""

    def construct(self, latents):
        """See VAE."""
        z = kernels.array(latents.float()) / self.config.scaling_factor + self.config.shift_factor
        return self.decode(Tensor(z))

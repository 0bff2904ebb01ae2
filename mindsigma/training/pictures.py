"""How different the pictures are that a VAE makes of two sets of latents, by LPIPS: DMD's regression."""

from math import prod

import mindspore as ms
from mindspore import nn, ops
from mindspore.nn.utils import no_init_parameters

from mindsigma.models.lpips import LPIPS
from mindsigma.models.vae import VAE
from mindsigma.ops.operators import mean, split, stack
from mindsigma.training.needed import frozen
from mindsigma.weights.loading import Pending
from mindsigma.weights.lpips_weights import load_lpips


class PictureDistance(nn.Cell):
    """Mean LPIPS of decoded pictures, clamped to [-1, 1] as the official trainer does.

    Args:
        vae: VAE that has gradients, frozen.
        lpips: LPIPS, frozen.
    """

    def __init__(self, vae, lpips):
        super().__init__(auto_prefix=False)
        self.one = _OnePicture(vae, lpips)

    def construct(self, latents, wanted):
        """fp32 scalar for latents and those wanted (N, c, h, w), scaled; the latter get no gradient.

        One picture after the other, so that `one` may be recomputed for each.
        """
        count, distances = latents.shape[0], ()
        ones, others = split(latents, count, 0), split(ops.stop_gradient(wanted), count, 0)
        for i in range(count):
            distances += (self.one(ones[i], others[i]),)
        return mean(stack(distances, 0))


class _OnePicture(nn.Cell):
    """LPIPS of one pair of latents (1, c, h, w): (1,)."""

    def __init__(self, vae, lpips):
        super().__init__(auto_prefix=False)
        self.vae, self.lpips = vae, lpips

    def construct(self, latents, wanted):
        return self.lpips(self.picture(latents), ops.stop_gradient(self.picture(wanted)))

    def picture(self, latents):
        """(1, 3, 8h, 8w) in [-1, 1], fp32."""
        return ops.clamp(self.vae(latents).astype(ms.float32), -1.0, 1.0)


def open_pictures(vae, files):
    """PictureDistance by a Pending VAE, whose weights are read once more, and LPIPS' weight files.

    A VAE that draws is computed by kernels without gradients on a CPU; this one has the operators that have them.
    """
    decoder = Pending(vae.tensors, lambda: VAE(vae.config, vae.dtype), lambda cell: cell).load()
    return pictures_of(decoder, load_lpips(files))


def pictures_of(vae, lpips):
    """PictureDistance by a VAE, of which only the decoder is kept, and LPIPS; both are frozen."""
    vae.encoder = vae.quant_conv = None
    object.__setattr__(vae, "_moments", None)
    for network, beginning in (vae, "vae"), (lpips, "lpips"):
        for name, weight in network.set_train(False).parameters_and_names():
            weight.name, weight.requires_grad = f"{beginning}.{name}", False
    return PictureDistance(vae, lpips)


def needed_of_pictures(vae):
    """Needed for the weights of a PictureDistance by a Pending VAE."""
    names = [name for name in vae.tensors.names() if not name.startswith(("encoder.", "quant_conv."))]
    with no_init_parameters():
        numbers = sum(weight.size for weight in LPIPS().get_parameters())
    return frozen(numbers, ms.float32) + frozen(sum(prod(vae.tensors.shape(name)) for name in names), vae.dtype)

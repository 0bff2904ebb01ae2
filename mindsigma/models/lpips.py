"""LPIPS: how different two pictures look to people (Zhang et al. 2018, arXiv 1801.03924), by the features of VGG16.

    d(x, x0) = sum over taps l of the mean over places of  w_l · (y_l - y0_l)²          (equation 1 of the paper)

y_l are the activations of VGG16 at tap l, the vector of each place divided by its length; w_l has a learnt weight for
each channel. This is version 0.1 of the official code, which scales the pictures first.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from mindsigma.models.linear import parameter
from mindsigma.models.vae import Conv
from mindsigma.ops.operators import max_pool_2x, mean

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)  # of VGG16
TAPS = (3, 8, 15, 22, 29)  # places in `features` behind which it is listened to: relu1_2, 2_2, 3_3, 4_3, 5_3
CHANNELS = (64, 128, 256, 512, 512)  # there
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of red, green, blue, for pictures in [-1, 1]
EPS = 1e-10


class ReLU(nn.Cell):
    """What is above zero."""

    def construct(self, x):
        return ops.relu(x)


class Pool(nn.Cell):
    """Maximum of 2 x 2; a last odd row or column is left out."""

    def construct(self, x):
        return max_pool_2x(x)


class Head(nn.Cell):
    """Sum over the channels of x (N, C, H, W), each with its weight: (N, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.weight = parameter((1, channels, 1, 1), "zeros", ms.float32)

    def construct(self, x):
        return (x * self.weight).sum(1)


class LPIPS(nn.Cell):
    """The distance, in fp32. `features` are numbered as torchvision's, so that parameters have its names."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in WIDTHS:
            if width == "pool":
                layers.append(Pool())
            else:
                layers += [Conv(channels, width), ReLU()]
                channels = width
        self.features = nn.CellList(layers)
        self.heads = nn.CellList([Head(channels) for channels in CHANNELS])
        self.shift, self.scale = (Tensor(values, ms.float32).reshape(1, 3, 1, 1) for values in (SHIFT, SCALE))

    def construct(self, one, other):
        """Distances (N,) of pictures (N, 3, H, W) in [-1, 1], H and W at least 16."""
        total = 0.0
        for distance in self.distances(one, other):
            total = total + distance
        return total

    def distances(self, one, other):
        """Tuple of what each tap adds, (N,)."""
        ones, others, result = self.activations(one), self.activations(other), ()
        for k in range(len(ones)):
            difference = unit(ones[k]) - unit(others[k])
            result += (mean(self.heads[k](difference * difference), (1, 2)),)
        return result

    def activations(self, pictures):
        """Tuple of what is heard at the taps: (N, 64, H, W), (N, 128, H / 2, W / 2), ... (N, 512, H / 16, W / 16)."""
        x, result = (pictures.astype(ms.float32) - self.shift) / self.scale, ()
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS:
                result += (x,)
        return result


def unit(x):
    """x (N, C, H, W) with the vector of each place brought to length 1.

    Where all channels are zero the official code's gradient is NaN. The bound leaves it zero, and values as they are.
    """
    length = ops.sqrt(ops.maximum((x * x).sum(1, keepdims=True), EPS**2))
    return x / (length + EPS)

"""Inception v3 up to its 2048 pooled features: the network of FID, and torchvision's, which TextAtlas uses.

They differ in the pools of the mixed blocks alone. FID's was converted from TensorFlow's (2015-12-05): its average
pools leave out the padding, and its last block has a maximum pool. Weights are `pt_inception-2015-12-05-6726825d.pth`
of pytorch-fid and `inception_v3_google-0cc3c7bd.pth` of torchvision, both with torchvision's names. Images are
(N, 3, 299, 299) in [-1, 1]; `inception_inputs.py` makes them.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.evaluation.weights import open_weights

FEATURES = 2048
BATCH_NORM_EPS = 1e-3
VARIANTS = ("fid", "torchvision")
SOURCES = {
    "fid": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "torchvision": "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth",
}


class Conv(nn.Cell):
    """Convolution and ReLU; the batch norm between them is folded into the convolution's weights when they are read."""

    def __init__(self, in_channels, out_channels, kernel, stride=1, padding=(0, 0)):
        super().__init__()
        rows, columns = padding
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride,
            pad_mode="pad",
            padding=(rows, rows, columns, columns),
            has_bias=True,
        )

    def construct(self, x):
        return ops.relu(self.conv(x))


class AveragePool(nn.Cell):
    """Mean of 3 x 3 with a padding of 1, which counts as zeros or not at all."""

    def __init__(self, side, count_padding):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, pad_mode="valid")
        self.pad = ops.Pad(((0, 0), (0, 0), (1, 1), (1, 1)))
        inside = np.full(side, 3.0)
        inside[[0, -1]] = 2.0  # rows, or columns, that are not padding
        count = np.full((side, side), 9.0) if count_padding else np.outer(inside, inside)
        self.correction = Tensor((9.0 / count).astype(np.float32)[None, None])

    def construct(self, x):
        return self.pool(self.pad(x)) * self.correction


class MaximumPool(nn.Cell):
    """Maximum of 3 x 3 with a padding of 1; the values are no less than 0."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, pad_mode="valid")
        self.pad = ops.Pad(((0, 0), (0, 0), (1, 1), (1, 1)))

    def construct(self, x):
        return self.pool(self.pad(x))


class MixedA(nn.Cell):
    """35 x 35: 1 x 1, 5 x 5, twice 3 x 3, pool."""

    def __init__(self, channels, pooled, count_padding):
        super().__init__()
        self.branch1x1 = Conv(channels, 64, 1)
        self.branch5x5_1 = Conv(channels, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=(2, 2))
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=(1, 1))
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=(1, 1))
        self.pool = AveragePool(35, count_padding)
        self.branch_pool = Conv(channels, pooled, 1)

    def construct(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return ops.concat((self.branch1x1(x), five, three, self.branch_pool(self.pool(x))), 1)


class MixedB(nn.Cell):
    """35 x 35 to 17 x 17."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = Conv(channels, 384, 3, 2)
        self.branch3x3dbl_1 = Conv(channels, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=(1, 1))
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, pad_mode="valid")

    def construct(self, x):
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return ops.concat((self.branch3x3(x), three, self.pool(x)), 1)


class MixedC(nn.Cell):
    """17 x 17: 1 x 1, 7 x 7 in two halves, twice, pool."""

    def __init__(self, channels, width, count_padding):
        super().__init__()
        row, column = {"kernel": (1, 7), "padding": (0, 3)}, {"kernel": (7, 1), "padding": (3, 0)}
        self.branch1x1 = Conv(channels, 192, 1)
        self.branch7x7_1 = Conv(channels, width, 1)
        self.branch7x7_2 = Conv(width, width, **row)
        self.branch7x7_3 = Conv(width, 192, **column)
        self.branch7x7dbl_1 = Conv(channels, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, **column)
        self.branch7x7dbl_3 = Conv(width, width, **row)
        self.branch7x7dbl_4 = Conv(width, width, **column)
        self.branch7x7dbl_5 = Conv(width, 192, **row)
        self.pool = AveragePool(17, count_padding)
        self.branch_pool = Conv(channels, 192, 1)

    def construct(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return ops.concat((self.branch1x1(x), seven, twice, self.branch_pool(self.pool(x))), 1)


class MixedD(nn.Cell):
    """17 x 17 to 8 x 8."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = Conv(channels, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, 2)
        self.branch7x7x3_1 = Conv(channels, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2)
        self.pool = nn.MaxPool2d(3, 2, pad_mode="valid")

    def construct(self, x):
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return ops.concat((self.branch3x3_2(self.branch3x3_1(x)), seven, self.pool(x)), 1)


class MixedE(nn.Cell):
    """8 x 8: 1 x 1, 3 x 3 in two halves side by side, twice, pool."""

    def __init__(self, channels, pool):
        super().__init__()
        row, column = {"kernel": (1, 3), "padding": (0, 1)}, {"kernel": (3, 1), "padding": (1, 0)}
        self.branch1x1 = Conv(channels, 320, 1)
        self.branch3x3_1 = Conv(channels, 384, 1)
        self.branch3x3_2a = Conv(384, 384, **row)
        self.branch3x3_2b = Conv(384, 384, **column)
        self.branch3x3dbl_1 = Conv(channels, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=(1, 1))
        self.branch3x3dbl_3a = Conv(384, 384, **row)
        self.branch3x3dbl_3b = Conv(384, 384, **column)
        self.pool = pool
        self.branch_pool = Conv(channels, 192, 1)

    def construct(self, x):
        three = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return ops.concat(
            (
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(twice),
                self.branch3x3dbl_3b(twice),
                self.branch_pool(self.pool(x)),
            ),
            1,
        )


class Inception(nn.Cell):
    """Inception v3 without its classifier.

    Args:
        variant: "fid" or "torchvision".
    """

    def __init__(self, variant="fid"):
        super().__init__()
        counted = variant == "torchvision"
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=(1, 1))
        self.pool = nn.MaxPool2d(3, 2, pad_mode="valid")
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = MixedA(192, 32, counted)
        self.Mixed_5c = MixedA(256, 64, counted)
        self.Mixed_5d = MixedA(288, 64, counted)
        self.Mixed_6a = MixedB(288)
        self.Mixed_6b = MixedC(768, 128, counted)
        self.Mixed_6c = MixedC(768, 160, counted)
        self.Mixed_6d = MixedC(768, 160, counted)
        self.Mixed_6e = MixedC(768, 192, counted)
        self.Mixed_7a = MixedD(768)
        self.Mixed_7b = MixedE(1280, AveragePool(8, counted))
        self.Mixed_7c = MixedE(2048, AveragePool(8, counted) if counted else MaximumPool())

    def stages(self, x):
        """The first pool's output (N, 64, 73, 73), the second's (N, 192, 35, 35), the last of 17 x 17, the last."""
        first = self.pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        second = self.pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(first)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(second)))
        third = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # (N, 768, 17, 17)
        return first, second, third, self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(third)))  # (N, 2048, 8, 8)

    def construct(self, x):
        """Features (N, 2048) of images (N, 3, 299, 299) in [-1, 1]."""
        return self.stages(x)[-1].mean((2, 3))


def load_inception(path, variant="fid"):
    """Inception with the weights of a file (Path), its batch norms folded in.

    Raises:
        MindSigmaError: a tensor is missing or of another shape, or the file is of the other network.
    """
    source = open_weights(path, f"curl -LO {SOURCES[variant]}")
    classes = source.shape("fc.weight")[0] if "fc.weight" in source else None
    if classes not in (None, {"fid": 1008, "torchvision": 1000}[variant]):
        raise MindSigmaError(
            f"{path}: has {one_line(classes)} classes, and so is not the Inception of "
            f"{'FID, which has 1008' if variant == 'fid' else 'torchvision, which has 1000'}; give that of "
            f"{SOURCES[variant]}"
        )
    network = Inception(variant)
    network.set_train(False)
    for name, cell in network.cells_and_names():
        if isinstance(cell, Conv):
            weight, bias = _folded(source, name, tuple(cell.conv.weight.shape))
            cell.conv.weight.set_data(Tensor(weight))
            cell.conv.bias.set_data(Tensor(bias))
    return network


def _folded(source, name, shape):
    """Weight and bias of a convolution with its batch norm behind it."""

    def read(tensor, wanted):
        full = f"{name}.{tensor}"
        if full not in source or source.shape(full) != wanted:
            found = f"is of shape {source.shape(full)}" if full in source else "is missing"
            raise MindSigmaError(f"{source.path}: {full} {found}, expected {wanted}; give Inception v3's weights")
        return np.asarray(source.read(full), np.float64)

    gain, shift, mean, variance = (
        read(f"bn.{part}", shape[:1]) for part in ("weight", "bias", "running_mean", "running_var")
    )
    if not (variance > -BATCH_NORM_EPS).all():
        raise MindSigmaError(f"{source.path}: {name}.bn.running_var holds no variances; download the file again")
    scale = gain / np.sqrt(variance + BATCH_NORM_EPS)
    weight = read("conv.weight", shape) * scale[:, None, None, None]
    return weight.astype(np.float32), (shift - mean * scale).astype(np.float32)


def features(network, images):
    """float32 (N, 2048) of float32 images (N, 3, 299, 299); the network's dtype is fp32."""
    return network(Tensor(images, ms.float32)).asnumpy()

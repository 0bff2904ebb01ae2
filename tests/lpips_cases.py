"""LPIPS with drawn weights: the tensors of golden/lpips.npz under the official names, and files of them."""

import re
import zlib
from functools import cache

import numpy as np
from conftest import GOLDEN
from mindspore import Tensor

from mindsigma.models.lpips import LPIPS
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.formats.torch_writer import write_torch

SEED = 16


@cache
def golden():
    """The case's arrays: what the package lpips 0.1.4 gives for the drawn weights and pictures."""
    return dict(np.load(GOLDEN / "lpips.npz"))


@cache
def drawn_weights():
    """dict official name -> float32 array, of VGG16 as torchvision names it and of the heads as lpips does."""
    with_ours = LPIPS().parameters_and_names()
    shapes = {re.sub(r"heads\.(\d)", r"lin\1.model.1", name): tuple(weight.shape) for name, weight in with_ours}
    return {name: _drawn(name, shape) for name, shape in shapes.items()}


def _drawn(name, shape):
    z = np.random.default_rng([SEED, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    if name.startswith("lin"):
        return np.abs(z)
    return np.float32(0.1) * z if len(shape) == 1 else z * np.float32((2 / np.prod(shape[1:])) ** 0.5)


def drawn_pictures(key, shape):
    """float32 pictures in [-1, 1]."""
    return np.random.default_rng([SEED, key]).uniform(-1, 1, shape).astype(np.float32)


def drawn_lpips():
    """LPIPS with the drawn weights."""
    network = LPIPS()
    for name, weight in network.parameters_and_names():
        weight.set_data(Tensor(drawn_weights()[re.sub(r"heads\.(\d)", r"lin\1.model.1", name)]))
    return network.set_train(False)


def write_weights(path, tensors):
    """A .pth or .safetensors file of a dict of arrays; its path."""
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    if path.suffix == ".pth":
        write_torch(path, specs, lambda name: tensors[name], flat=True)
    else:
        write_safetensors(path, specs, lambda name: tensors[name], {})
    return path


def two_files(folder):
    """Paths of the two files that people have: of VGG16, its classifier cut short, and of the heads."""
    tensors = drawn_weights()
    vgg = {name: array for name, array in tensors.items() if name.startswith("features.")}
    vgg["classifier.6.bias"] = np.zeros(1000, np.float32)
    heads = {name: array for name, array in tensors.items() if name.startswith("lin")}
    return [write_weights(folder / "vgg16.pth", vgg), write_weights(folder / "vgg.pth", heads)]

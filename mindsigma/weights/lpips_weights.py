"""Weights of LPIPS from the files that people have: torchvision's VGG16 and the linear heads of the package lpips."""

import re
from pathlib import Path

import mindspore as ms
from mindspore.nn.utils import no_init_parameters

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.models.lpips import LPIPS
from mindsigma.weights.formats.finite import finite
from mindsigma.weights.formats.floats import is_float
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.tensors import weight_tensor

VGG = "vgg16-397923af.pth, which torchvision.models.vgg16(weights='IMAGENET1K_V1') fetches"
HEADS = "weights/v0.1/vgg.pth of the Python package lpips"
WHERE = f"LPIPS takes two files: {VGG}, and {HEADS}"

# Names in these files, and in a state dict of lpips.LPIPS(net="vgg") as a whole, to ours.
NAMES = (
    (r"features\.(\d+)\.(weight|bias)", r"features.\1.\2"),
    (r"net\.slice[1-5]\.(\d+)\.(weight|bias)", r"features.\1.\2"),
    (r"lin(\d)\.model\.1\.weight", r"heads.\1.weight"),
)
# The classifier; heads a second time; numbers that the network has as constants.
LEFT_OUT = r"classifier\..*|lins\.\d\.model\.1\.weight|scaling_layer\.(shift|scale)"


def load_lpips(paths):
    """LPIPS with the weights of files; `paths` and errors as of `open_lpips`."""
    with no_init_parameters():
        network = LPIPS()
    found = open_lpips(paths)
    for name, weight in network.parameters_and_names():
        source, stored = found[name]
        array = finite(source.path, stored, source.read(stored))
        weight.set_data(weight_tensor(source.path, stored, array, ms.float32))
    return network.set_train(False)


def open_lpips(paths):
    """Where each of LPIPS' weights is: dict of its name to (TensorSource, name there). No weight is read.

    Args:
        paths: one file or several, as torchvision and lpips have them (.pth) or with the same names in safetensors.

    Raises:
        MindSigmaError: a file is missing or damaged; a weight is missing, there twice, of another shape, or none of it.
    """
    with no_init_parameters():
        shapes = {name: tuple(weight.shape) for name, weight in LPIPS().parameters_and_names()}
    found = {}
    for path in paths:
        path = Path(path).expanduser()
        if not path.is_file():
            raise MindSigmaError(f"{path}: no such file; {WHERE}")
        source = open_checkpoint(path)
        for stored in source.names():
            if re.fullmatch(LEFT_OUT, stored):
                continue
            name = _own_name(stored)
            if name not in shapes:
                raise MindSigmaError(f"{path}: tensor '{one_line(stored)}' is no part of LPIPS with VGG16; {WHERE}")
            if name in found:
                raise MindSigmaError(f"{path}: tensor '{stored}' is in {found[name][0].path}, too; give one of the two")
            if source.shape(stored) != shapes[name]:
                remedy = VGG if name.startswith("features.") else HEADS
                raise MindSigmaError(
                    f"{path}: tensor '{stored}' has shape {source.shape(stored)}, LPIPS with VGG16 needs "
                    f"{shapes[name]}; give {remedy}"
                )
            if not is_float(source.dtype(stored)):
                raise MindSigmaError(
                    f"{path}: tensor '{stored}' holds {source.dtype(stored)}, no floating-point numbers; {WHERE}"
                )
            found[name] = source, stored
    missing = next((name for name in shapes if name not in found), None)
    if missing is not None:
        part, wanted = ("VGG16", VGG) if missing.startswith("features.") else ("the linear heads", HEADS)
        listed = " and ".join(map(str, paths))
        raise MindSigmaError(f"{listed}: '{_official_name(missing)}' is missing, of {part}; give {wanted}")
    return found


def _own_name(stored):
    """Our name of a tensor of these files, or None."""
    for pattern, ours in NAMES:
        match = re.fullmatch(pattern, stored)
        if match:
            return match.expand(ours)
    return None


def _official_name(name):
    return re.sub(r"heads\.(\d)\.weight", r"lin\1.model.1.weight", name)

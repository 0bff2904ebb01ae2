"""Images as each FID wants them: (3, 299, 299) in [-1, 1]. Their numbers differ, so a FID tells which it is."""

import numpy as np
from PIL import Image

from mindsigma.evaluation.resizing import resized

SIDE = 299
RESIZES = ("pytorch-fid", "clean", "textatlas")


def prepared(image, resize):
    """float32 (3, 299, 299) of an RGB image.

    Args:
        image: PIL image or uint8 array (H, W, 3).
        resize: "pytorch-fid": bilinear without antialiasing, the aspect ratio not kept. "clean": clean-fid's, Pillow's
            bicubic of each channel as floats, antialiased, not rounded. "textatlas": torchvision's, the short side to
            299 with Pillow's bilinear, then the centre.
    """
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    return {"pytorch-fid": _pytorch_fid, "clean": _clean, "textatlas": _textatlas}[resize](image)


def _pytorch_fid(image):
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
    rows, columns = _bilinear(pixels.shape[1]), _bilinear(pixels.shape[2])
    return (2 * (rows @ pixels @ columns.T) - 1).astype(np.float32)


def _bilinear(side):
    """Matrix (299, side) of linear interpolation at the pixels' centres, corners not aligned."""
    place = np.maximum((np.arange(SIDE) + 0.5) * (side / SIDE) - 0.5, 0.0)
    low = np.minimum(place.astype(int), side - 1)
    high, share = np.minimum(low + 1, side - 1), place - low
    matrix = np.zeros((SIDE, side))
    np.add.at(matrix, (np.arange(SIDE), low), 1 - share)
    np.add.at(matrix, (np.arange(SIDE), high), share)
    return matrix


def clean_resized(image):
    """float32 (299, 299, 3), 0 ... 255, not rounded, of a PIL image, as clean-fid resizes."""
    pixels = np.asarray(image, np.float32)
    channels = [
        np.asarray(Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return np.clip(np.stack(channels, -1), 0, 255)


def _clean(image):
    return ((clean_resized(image) - 128) / 128).transpose(2, 0, 1).astype(np.float32)


def _textatlas(image):
    short = min(image.size)
    image = resized(image, tuple(SIDE * side // short for side in image.size), Image.Resampling.BILINEAR)
    left, top = (round((side - SIDE) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE)), np.float32)
    # Normalised by ImageNet's mean and deviation, then by transform_input back to [-1, 1].
    return (pixels / np.float32(127.5) - 1).transpose(2, 0, 1)

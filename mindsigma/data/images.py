"""Image files to arrays: decoding whatever mode, covering a size and cropping its centre, scaling to [-1, 1]."""

import numpy as np
from PIL import ExifTags, Image, ImageOps

from mindsigma.errors import MindSigmaError

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jp2", ".avif")

_ORIENTATION = ExifTags.Base.Orientation
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width

_SCALED = ((np.arange(256, dtype=np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)


def read_size(file):
    """(height, width) of an image as `decode` gives it, from its header. Raises MindSigmaError as `decode` does."""
    with _explained(), Image.open(file) as image:
        width, height = image.size
        sideways = image.getexif().get(_ORIENTATION) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def decode(file):
    """RGB image, 8 bits a channel, of a binary file: upright as its EXIF says, transparency on white, first frame.

    16-bit grey keeps its upper 8 bits. Raises MindSigmaError, without the name of the file, for what is damaged, no
    image, of floating-point pixels or beyond pillow's limit of pixels.
    """
    with _explained(), Image.open(file) as image:
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)


def cover_and_crop(image, height, width, resampling):
    """Resize a PIL image to cover height x width, its shape kept, and cut out the centre (reference.md 2.11).

    Roundings are those of torchvision's Resize and CenterCrop, as the official loaders use them.
    """
    full_width, full_height = image.size
    if height * full_width > width * full_height:
        size = height, max(full_width * height // full_height, width)
    else:
        size = max(full_height * width // full_width, height), width
    if size != (full_height, full_width):
        image = image.resize((size[1], size[0]), FILTERS[resampling])
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return image.crop((left, top, left + width, top + height))


def to_array(image, out=None):
    """float32 (3, H, W) in [-1, 1] of an RGB image; written into `out` if given."""
    pixels = np.asarray(image).transpose(2, 0, 1)
    return np.take(_SCALED, pixels, out=out, mode="clip")  # "clip" lets NumPy write into out without a buffer


def training_array(image, height, width, resampling):
    """float32 (3, height, width) in [-1, 1] of a decoded image, as it is trained on and as features are made of it."""
    return to_array(cover_and_crop(image, height, width, resampling))


def _to_rgb(image):
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        # Pillow opens 16-bit grey as I;16 or, by format and version, as I; its own conversion would clip at 255.
        pixels = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip(pixels >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise MindSigmaError("floating-point pixels of unknown range")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class _explained:
    """Turns whatever pillow raises for a bad file into a MindSigmaError."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        # Its decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and more for hostile files.
        if isinstance(error, Exception) and not isinstance(error, MindSigmaError):
            text = " ".join(str(error).split()) or kind.__name__
            raise MindSigmaError("not an image" if "cannot identify" in text else text) from error

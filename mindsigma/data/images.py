"""Image files to arrays: decoding whatever mode, covering a size and cropping its centre, scaling to [-1, 1]."""

import ctypes
import logging
import threading
import warnings
from contextlib import suppress
from functools import cache

import numpy as np
from PIL import Image

from mindsigma.data.pixels_only import MAX_PIXELS, orientation_of, pixels_only, require_pixels
from mindsigma.errors import MindSigmaError, one_line

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

# Pillow's formats that are decoded, and the suffixes of their files. Left out are those that start a program (EPS) or
# hand over to another library, those whose header hides an image of another size (ICO, ICNS, BLP), and those that are
# decoded in Python, pixel by pixel (DDS). TGA has no magic number, so it comes last.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "AVIF": (".avif", ".avifs"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "PCX": (".pcx",),
    "PSD": (".psd",),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "SUN": (".ras",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
_HUNGRY = ("WEBP", "JPEG2000", "AVIF")  # take about 16 bytes for each pixel, where the others take 8
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap height and width

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # MAX_PIXELS takes its place

_BAND = 1 << 20  # pixels converted at once
_LARGE = 1 << 24  # pixels; images beyond are decoded one after the other, whatever the number of threads
_one_large = threading.Lock()

_SCALED = ((np.arange(256, dtype=np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)


def read_size(file):
    """(height, width) of an image as `decode` gives it, from its header. Raises MindSigmaError as `decode` does."""
    with _explained():
        source, orientation = pixels_only(file, header=True)
        with Image.open(source, formats=_formats()) as image:
            width, height = _checked(image).size
            sideways = (orientation or _orientation(image)) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def decode(file):
    """RGB image, 8 bits a channel, of a binary file: upright as its EXIF says, transparency on white, first frame.

    The file must be seekable and small enough to be read whole. 16-bit grey keeps its upper 8 bits. Beside the file,
    the image takes at most about 8 bytes for each of MAX_PIXELS pixels, and large ones wait for each other.

    Raises MindSigmaError, without the name of the file, for what is damaged, no image, of floating-point pixels, of a
    format that is not in FORMATS or of more than MAX_PIXELS pixels.
    """
    with _explained():
        source, orientation = pixels_only(file)
        with Image.open(source, formats=_formats()) as image:
            if _checked(image).width * image.height <= _LARGE:
                return _decoded(image, orientation)
            with _one_large:
                return _decoded(image, orientation)


def of_pil(image):
    """`decode` of a PIL image that somebody opened or made; it stays as it is."""
    with _explained():
        _checked(image).load()
        upright, orientation = _to_rgb(image), _orientation(image)
    return upright.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else upright


def cover_and_crop(image, height, width, resampling):
    """Resize a PIL image to cover height x width, its shape kept, and cut out the centre.

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


@cache
def _formats():
    Image.init()
    _silence()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF is not in every Pillow


def _silence():
    """Keep Pillow and libtiff from printing what they find in a damaged file, beside the error that is raised."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(Image.core.__file__)  # which finds what it is linked with
        for setter in (library.TIFFSetErrorHandler, library.TIFFSetWarningHandler):
            setter.argtypes, setter.restype = (ctypes.c_void_p,), ctypes.c_void_p
            setter(None)


def _checked(image):
    """The opened image, if its header tells nothing that is not decoded."""
    require_pixels(*image.size, MAX_PIXELS // 2 if image.format in _HUNGRY else MAX_PIXELS)
    if image.mode == "F":
        raise MindSigmaError("floating-point pixels of unknown range")
    return image


def _orientation(image):
    """What a format tells that is not taken apart by `pixels_only`: WebP, AVIF."""
    exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
    return orientation_of(exif if isinstance(exif, bytes) else b"", xmp if isinstance(xmp, bytes) else b"")


def _decoded(image, orientation):
    orientation = orientation or _orientation(image)
    image.load()
    upright = _to_rgb(image)
    image.close()  # frees what is not needed any more
    return upright.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else upright


def _to_rgb(image):
    """A new RGB image of a loaded one, made band by band: at most twice its memory is in use."""
    target = Image.new("RGB", image.size)
    rows = max(1, _BAND // image.width)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        target.paste(_band_to_rgb(band), (0, top))
    return target


def _band_to_rgb(band):
    if band.mode == "RGB" and "transparency" not in band.info:
        return band
    if band.mode.startswith("I"):
        # Pillow opens 16-bit grey as I;16 or, by format and version, as I; its own conversion would clip at 255.
        return Image.fromarray(np.clip(np.asarray(band) >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if "transparency" in band.info or band.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        band = band.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", band.size, "white"), band).convert("RGB")
    return band.convert("RGB")


class _explained:
    """Turns whatever pillow raises for a bad file into a MindSigmaError."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        # Its decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and more for hostile files.
        if isinstance(error, Exception) and not isinstance(error, MindSigmaError):
            text = one_line(" ".join(str(error).split()) or kind.__name__)
            raise MindSigmaError("not an image" if "cannot identify" in text else text) from error

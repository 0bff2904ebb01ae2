"""A picture to draw from, and a mask of where: opened, laid on the canvas that the model draws, and put back after."""

import io
import os
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np
from PIL import Image

from mindsigma.arguments import array
from mindsigma.data import images
from mindsigma.data.records import LARGEST_IMAGE
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import read_bytes
from mindsigma.pipeline.pictures import to_pil

WHITE = 128  # grey from there on is drawn anew; of a mask in [0, 1] from 0.5 on


def open_picture(name, value):
    """RGB PIL image, upright, of a path, a PIL image, or an array (H, W, 3) of bytes or of floats in [0, 1].

    `name`: of the argument, for MindSigmaError. Transparency lies on white.
    """
    if isinstance(value, (str, os.PathLike)):
        name, made, source = value, images.decode, io.BytesIO(read_bytes(value, LARGEST_IMAGE))
    elif isinstance(value, Image.Image):
        made, source = images.of_pil, value
    else:
        return _of_array(name, value)
    try:
        return made(source)
    except MindSigmaError as error:
        raise MindSigmaError(f"{name}: {error}") from None


def open_mask(value):
    """PIL image of mode L, 255 where to draw anew and 0 elsewhere, of what `open_picture` takes or an array (H, W)."""
    grey = np.asarray(open_picture("mask", value).convert("L"))
    return Image.fromarray(np.where(grey >= WHITE, 255, 0).astype(np.uint8))


def _of_array(name, value):
    pixels = array(name, value, "fiub")
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 1):
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, 2)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise MindSigmaError(f"{name} must be an array (height, width, 3), not one of shape {pixels.shape}")
    if pixels.dtype.kind in "fb":
        pixels = pixels.astype(np.float32)
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # also NaN
            raise MindSigmaError(f"{name}: an array of floats must lie in [0, 1]; one of bytes in 0 ... 255")
        pixels = np.round(pixels * 255)
    elif not (pixels.min() >= 0 and pixels.max() <= 255):
        raise MindSigmaError(f"{name}: an array of whole numbers must lie in 0 ... 255")
    return Image.fromarray(pixels.astype(np.uint8))


@dataclass(frozen=True)
class Placement:
    """How an image lies on the canvas that is drawn: a box of the image fills a box of the canvas.

    Attributes:
        image, canvas: (height, width) in pixels.
        of_image, of_canvas: the boxes: left, top, right, bottom.
    """

    image: Tuple[int, int]
    canvas: Tuple[int, int]
    of_image: Tuple[int, int, int, int]
    of_canvas: Tuple[int, int, int, int]

    @classmethod
    def of(cls, image, canvas, fit):
        """`fit`: "crop": the image covers the canvas; "pad": it fits into the canvas, whose rest repeats its edges."""
        if fit == "crop":
            return cls(image, canvas, _centred(image, canvas), (0, 0, canvas[1], canvas[0]))
        return cls(image, canvas, (0, 0, image[1], image[0]), _centred(canvas, image))

    def told(self, name="image"):
        """What happens to the image of that name, in a line; None if nothing does."""
        if self.image == self.canvas:
            return None
        text = f"{name}: {_size(self.image)} (height x width), drawn at {_size(self.canvas)}"
        left, top, right, bottom = self.of_image
        if (bottom - top, right - left) != self.image:
            return f"{text}: cropped to {bottom - top} x {right - left}, then resized"
        left, top, right, bottom = self.of_canvas
        if (bottom - top, right - left) != self.canvas:
            return f"{text}: resized to {bottom - top} x {right - left}, the rest of it repeats its edges"
        return f"{text}: resized"

    def lay(self, picture):
        """The canvas with a PIL image of the image's size on it."""
        left, top, right, bottom = self.of_canvas
        size = right - left, bottom - top
        if self.of_image != (0, 0, *self.image[::-1]) or size != picture.size:
            picture = picture.resize(size, Image.Resampling.LANCZOS, self.of_image)
        if size == self.canvas[::-1]:
            return picture
        around = ((top, self.canvas[0] - bottom), (left, self.canvas[1] - right))
        pixels = np.asarray(picture)
        return Image.fromarray(np.pad(pixels, around + ((0, 0),) * (pixels.ndim - 2), "edge"))

    def drawn(self, canvas):
        """The part of a canvas, a PIL image, that the image filled."""
        return canvas if self.of_canvas == (0, 0, *canvas.size) else canvas.crop(self.of_canvas)

    def put_back(self, canvas, picture):
        """A PIL image of the image's size: `picture`, where it was laid on the canvas replaced by what was drawn."""
        left, top, right, bottom = self.of_image
        drawn, size = self.drawn(canvas), (right - left, bottom - top)
        result = picture.copy()
        result.paste(drawn if drawn.size == size else drawn.resize(size, Image.Resampling.LANCZOS), (left, top))
        return result


def _centred(outer, inner):
    """The largest box (left, top, right, bottom) of the shape of `inner`, (height, width), in the middle of `outer`."""
    scale = min(outer[0] / inner[0], outer[1] / inner[1])
    height, width = (max(1, min(round(side * scale), most)) for side, most in zip(inner, outer))
    top, left = (outer[0] - height) // 2, (outer[1] - width) // 2
    return left, top, left + width, top + height


def _size(pair):
    return f"{pair[0]} x {pair[1]}"


@dataclass(frozen=True)
class GivenImage:
    """One picture to draw from.

    Attributes:
        picture: PIL image, RGB.
        mask: PIL image, L, of the same size, 255 where to draw anew; None to draw all of it anew.
    """

    picture: Any
    mask: Any = None

    @classmethod
    def open(cls, picture, mask=None):
        """Of what `open_picture` and `open_mask` take. Raises MindSigmaError."""
        picture = open_picture("image", picture)
        if mask is None:
            return cls(picture)
        mask = open_mask(mask)
        if mask.size != picture.size:
            raise MindSigmaError(
                f"mask: {_size(mask.size[::-1])} pixels (height x width), but the image has "
                f"{_size(picture.size[::-1])}; give a mask of the image's size"
            )
        if mask.getextrema()[1] == 0:
            raise MindSigmaError("mask: all of it is black, so nothing would be drawn; paint white what is to change")
        return cls(picture, mask)

    @property
    def size(self):
        """(height, width) in pixels."""
        return self.picture.size[::-1]

    def resized(self, height, width):
        """The image made to cover height x width, and cropped."""
        if self.size == (height, width):
            return self
        picture = images.cover_and_crop(self.picture, height, width, "lanczos")
        if self.mask is None:
            return GivenImage(picture)
        grey = images.cover_and_crop(self.mask, height, width, "bilinear")
        return GivenImage(picture, grey.point(lambda value: 255 if value >= WHITE else 0))

    def pixels(self, placement):
        """float32 (3, h, w) in [-1, 1], as laid on the canvas."""
        return np.asarray(placement.lay(self.picture), np.float32).transpose(2, 0, 1) / 127.5 - 1.0

    def latent_mask(self, placement, downsampling):
        """float32 (1, h, w), 1 where the latents are drawn anew: what the mask is at each one's first pixel."""
        grey = np.asarray(placement.lay(self.mask))[::downsampling, ::downsampling]
        result = (grey >= WHITE).astype(np.float32)[None]
        if not result.any():
            raise MindSigmaError(
                f"mask: what is white is too small beside the latents, of which one is {downsampling} x {downsampling} "
                f"pixels of {_size(placement.canvas)}; enlarge it"
            )
        return result

    def masked_outside(self, placement):
        """Which part of the mask's white lies outside of what is drawn, 0 ... 1."""
        if self.mask is None:
            return 0.0
        inside, whole = (np.count_nonzero(mask) for mask in (self.mask.crop(placement.of_image), self.mask))
        return 1 - inside / whole

    def pasted(self, placement, canvas):
        """The image itself, in its own size, where the mask is white replaced by what a drawn canvas has there."""
        whole = placement.put_back(canvas, self.picture)
        whole.paste(self.picture, mask=self.mask.point(lambda value: 255 - value))
        return whole


class GivenImages:
    """Pictures to draw from that are laid on canvases of one size.

    Args:
        images: list of GivenImage.
        canvas: (height, width) that is drawn.
        fit: of Placement.
        size: (height, width) that was asked for, which the images have by now, or None.
    """

    def __init__(self, images, canvas, fit, size=None):
        self.images, self.canvas, self.size = images, canvas, size
        self.placements = [Placement.of(one.size, canvas, fit) for one in images]

    def __len__(self):
        return len(self.images)

    def told(self, name="image"):
        """What happens to the images of that name: a list of lines, each once."""
        lines = [placement.told(name) for placement in self.placements]
        for one, placement in zip(self.images, self.placements):
            lost = one.masked_outside(placement)
            if lost > 0:
                lines.append(
                    f"mask: {lost:.1%} of its white lies in what is cropped and stays as it is; image_fit pad "
                    "(--image-fit pad) draws all of it"
                )
        return list(dict.fromkeys(filter(None, lines)))

    def pixels(self):
        """float32 (N, 3, h, w) in [-1, 1] of the canvases."""
        return np.stack([one.pixels(placement) for one, placement in zip(self.images, self.placements)])

    def latent_masks(self, downsampling):
        """float32 (N, 1, h, w) of the latents, see GivenImage; None without masks."""
        if self.images[0].mask is None:
            return None
        pairs = zip(self.images, self.placements)
        return np.stack([one.latent_mask(placement, downsampling) for one, placement in pairs])

    def finished(self, drawn, paste, output_type):
        """What the caller gets of drawn canvases (M, h, w, 3) in [0, 1], M a multiple of N: PIL images or an array.

        With masks and `paste` an image is as it was given, but where its mask is white; else it is the part of the
        canvas that it filled, or that in the size that was asked for.
        """
        pasted = paste and self.images[0].mask is not None
        alone = all(placement.image == placement.canvas for placement in self.placements)
        if alone and not pasted and output_type == "np":
            return drawn
        results = []
        for i, canvas in enumerate(to_pil(drawn)):
            one, placement = self.images[i % len(self)], self.placements[i % len(self)]
            if pasted:
                results.append(one.pasted(placement, canvas))
                continue
            result = placement.drawn(canvas)
            results.append(result if self.size is None else images.cover_and_crop(result, *self.size, "lanczos"))
        if output_type == "pil":
            return results
        if len({result.size for result in results}) > 1:
            raise MindSigmaError("the pictures have several sizes, which one array cannot hold; take output_type pil")
        return np.stack([np.asarray(result, np.float32) / 255 for result in results])


def control_images(value, count):
    """List of a list of GivenImage, or None, for each of `count` ControlNets.

    Args:
        value: for one ControlNet a picture, or a list of one for each image that is drawn; for several a list of such
            things, one for each ControlNet, None for one that is left out.
    """
    if value is None:
        raise MindSigmaError(
            "control_image: give the picture that the ControlNet takes (--control-image), "
            f"{[None] * min(count, 8)} to leave it out of this call, or open the model without --controlnet"
        )
    values = [value] if count == 1 and not _holds_none(value) else value
    if not isinstance(values, (list, tuple)) or len(values) != count:
        found = len(values) if isinstance(values, (list, tuple)) else 1
        raise MindSigmaError(f"{found} control images for {count} ControlNets; give one for each (--control-image)")
    return [None if one is None else [_control_image(picture) for picture in _each(one)] for one in values]


def _holds_none(value):
    return isinstance(value, (list, tuple)) and len(value) == 1 and value[0] is None


def _control_image(value):
    return GivenImage(open_picture("control_image", value))


def given_images(image, mask):
    """List of GivenImage of one picture or a list of them, and of one mask, or one for each, or None."""
    pictures, masks = _each(image), _each(mask, grey=True)
    if not pictures:
        raise MindSigmaError("image: give at least one")
    if len(masks) not in (1, len(pictures)):
        raise MindSigmaError(f"{len(masks)} masks for {len(pictures)} images; give one mask, or one for each image")
    return [GivenImage.open(picture, masks[i % len(masks)]) for i, picture in enumerate(pictures)]


def _each(value, grey=False):
    """The pictures of a list or of an array (N, H, W, 3), or (N, H, W) where they may be grey; else the one picture."""
    shape = getattr(value, "shape", ())
    several = len(shape) == 4 or (grey and len(shape) == 3 and shape[2] not in (1, 3))
    return list(value) if several or isinstance(value, (list, tuple)) else [value]

"""Pictures that a ControlNet is guided by: edges, blur, low resolution of an image; or anything, from a folder."""

import os
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np
from PIL import Image, ImageFilter

from mindsigma.choices import CONDITIONS
from mindsigma.data.images import SUFFIXES, cover_and_crop
from mindsigma.data.record import Record, RowError, below
from mindsigma.data.records import read_image
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.extras import extra

FOLDER = "folder"
SHAPE_TOLERANCE = 0.02  # by which the aspect ratios of an image and of its condition may differ


@dataclass(frozen=True)
class Condition:
    """What a condition picture is made of.

    Attributes:
        kind: "canny", "edges", "blur", "tile"; or "folder": pictures of any kind, such as depth, pose or segmentation.
        numbers: of the kind, see choices.CONDITIONS.
        folder: of the pictures, where each has the name of its image, with any suffix.
    """

    kind: str
    numbers: Tuple[float, ...] = ()
    folder: Optional[str] = None

    @classmethod
    def of(cls, kind, folder=None):
        """From a text, "canny" or with its numbers "canny:100:200", or from a folder of pictures; None of neither.

        Raises MindSigmaError.
        """
        if kind and folder:
            raise MindSigmaError("--condition is computed of the image, --condition-folder holds pictures: give one")
        if folder:
            if not os.path.isdir(folder):
                raise MindSigmaError(f"--condition-folder {folder}: no such folder")
            return cls(FOLDER, folder=str(folder))
        return cls._computed(kind) if kind else None

    @classmethod
    def _computed(cls, text):
        kind, *given = text.split(":")
        if kind not in CONDITIONS:
            raise MindSigmaError(f"--condition must be one of {', '.join(CONDITIONS)}, not {one_line(kind, 40)}")
        ranges = CONDITIONS[kind]
        form = ":".join([kind, *ranges])
        if len(given) not in (0, len(ranges)):
            raise MindSigmaError(f"--condition {one_line(text, 40)}: write {kind}, or {form}")
        numbers = []
        for part, (name, (default, least, most)) in zip(given or [None] * len(ranges), ranges.items()):
            try:
                number = float(default if part is None else part)
            except ValueError:
                number = float("nan")
            if not least <= number <= most:
                raise MindSigmaError(f"--condition {one_line(text, 40)}: {name} must lie in {least} ... {most}")
            numbers.append(number)
        if kind == "canny" and numbers[0] > numbers[1]:
            raise MindSigmaError(f"--condition {one_line(text, 40)}: LOW must not be above HIGH")
        if kind == "canny":
            extra("cv2", "the condition canny")  # here, in the main thread, and before the work
        return cls(kind, tuple(numbers))

    def as_dict(self):
        """What features tell of their conditions. A folder may be moved; what its pictures are is told for each."""
        return {"kind": self.kind, "numbers": list(self.numbers)}

    def __str__(self):
        return FOLDER if self.kind == FOLDER else ":".join([self.kind, *(f"{number:g}" for number in self.numbers)])

    def computed(self, picture):
        """PIL image, RGB, of the size of `picture`, an RGB PIL image."""
        return _COMPUTED[self.kind](picture, *self.numbers)

    def picture(self, record, image, height, width, resampling):
        """The condition of a record: PIL image, RGB, height x width.

        Args:
            record: Record.
            image: PIL image of it, as it was decoded; it is cut to that size, and so is a picture of the folder.
            resampling: name of the filter.

        Raises:
            MindSigmaError: the picture cannot be read, or has another shape than the image.
        """
        if self.kind != FOLDER:
            return self.computed(cover_and_crop(image, height, width, resampling))
        companion = self.companion(record)
        picture = read_image(companion)
        ratios = [one.width / one.height for one in (image, picture)]
        if abs(ratios[0] / ratios[1] - 1) > SHAPE_TOLERANCE:
            sizes = " is ".join(f"{one.height} x {one.width}" for one in (picture, image))
            raise MindSigmaError(f"{companion.file}: {sizes.replace(' is ', ', its image ')}, which is another shape")
        return cover_and_crop(picture, height, width, resampling)

    def companion(self, record):
        """Record of the picture in the folder that belongs to a record. Raises MindSigmaError if there is none."""
        try:
            path, name = below(self.folder, record.key)
        except RowError:
            raise MindSigmaError(f"{record.where}: its name leads out of {self.folder}") from None
        stem = os.path.splitext(path)[0]
        for candidate in (path, *(f"{stem}{suffix}" for suffix in sorted(SUFFIXES))):
            if os.path.isfile(candidate):
                return Record(name, "", "", 0, 0, candidate)
        raise MindSigmaError(f"{stem}: no picture of this name is the condition of {record.where}")

    def companions(self, record):
        """Tuple of the Records of the files that its picture of a record is read from; empty where it is computed."""
        return (self.companion(record),) if self.kind == FOLDER else ()


def _canny(picture, low, high):
    """White lines, a pixel wide, on black: OpenCV's Canny of the channel that changes most."""
    import cv2

    return _grey(cv2.Canny(np.asarray(picture), low, high))


def _edges(picture, sigma):
    """Soft edges, white on black: the norm of Sobel's gradient, after a Gaussian; half of the largest is white.

    In each pixel the channel counts that changes most.
    """
    smooth = np.asarray(picture.filter(ImageFilter.GaussianBlur(sigma)), np.float32)
    x = np.pad(smooth, ((1, 1), (1, 1), (0, 0)), "edge")
    down = x[2:] - x[:-2]  # (H, W + 2, 3)
    right = x[:, 2:] - x[:, :-2]  # (H + 2, W, 3)
    down = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    right = right[:-2] + 2 * right[1:-1] + right[2:]
    magnitude = np.hypot(down, right).max(-1) / 2
    return _grey(np.round(np.minimum(magnitude, 255)).astype(np.uint8))


def _blur(picture, radius):
    return picture.filter(ImageFilter.GaussianBlur(radius))


def _tile(picture, factor):
    """Low resolution: the means of cells of `factor` pixels a side, enlarged bilinearly."""
    width, height = (max(1, round(side / factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BOX).resize(picture.size, Image.Resampling.BILINEAR)


def _grey(pixels):
    """RGB PIL image of uint8 (H, W)."""
    return Image.fromarray(pixels).convert("RGB")


_COMPUTED = {"canny": _canny, "edges": _edges, "blur": _blur, "tile": _tile}

"""Which size an image is trained at: a square, or the nearest of a table of aspect ratios."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from mindsigma.choices import TABLE_NAMES
from mindsigma.data.aspect_ratio import inference_bins, official_test_bins, training_bins
from mindsigma.errors import MindSigmaError

TABLES = dict(zip(TABLE_NAMES, (training_bins, inference_bins, official_test_bins)))

PATCH_PIXELS = 16  # the VAE's 8 times the DiT's patch of 2
LARGEST = 8192

# Bases from which on the official loaders resample by LANCZOS.
SHARP_BASE = 2048


class Bucket(NamedTuple):
    """A size that images are trained at: `aspect_ratio`, the table's key, and `height`, `width` in pixels."""

    aspect_ratio: float
    height: int
    width: int


@dataclass(frozen=True)
class Resolution:
    """The sizes of a training stage.

    Args:
        base: pixels a side of the square size, a multiple of 16.
        multi_scale: cut images to the nearest size of a table instead of to the square; base is then one of 256, 512,
            1024, 2048, 2880, 4096.
        table: "training" (40 sizes, as the official training), "inference" (diffusers' and mindone's), "test" (the
            official test tables).

    Raises:
        MindSigmaError: no such table or base.
    """

    base: int
    multi_scale: bool = False
    table: str = "training"

    def __post_init__(self):
        if self.table not in TABLES:
            raise MindSigmaError(f"table {self.table!r} of sizes is unknown; choose from {', '.join(TABLES)}")
        if self.multi_scale:
            TABLES[self.table](self.base)
        elif not 0 < self.base <= LARGEST or self.base % PATCH_PIXELS:
            raise MindSigmaError(
                f"resolution {self.base}: must be a multiple of {PATCH_PIXELS} pixels, at most {LARGEST}"
            )

    def buckets(self):
        """List of all Bucket of this resolution, by ascending aspect ratio."""
        if not self.multi_scale:
            return [Bucket(1.0, self.base, self.base)]
        return [Bucket(float(key), *size) for key, size in TABLES[self.table](self.base).items()]

    @property
    def resampling(self):
        """Name of the filter that images are resized with: "bilinear", "bicubic" or "lanczos"."""
        if self.base >= SHARP_BASE:
            return "lanczos"
        return "bicubic" if self.multi_scale else "bilinear"

    def assign(self, sizes):
        """Index in `buckets()` of the nearest key for each row of sizes (n, 2), height and width; int64 (n,)."""
        sizes = np.asarray(sizes, np.float64)
        if not self.multi_scale:
            return np.zeros(len(sizes), np.int64)
        keys = np.array([bucket.aspect_ratio for bucket in self.buckets()])
        nearest = np.empty(len(sizes), np.int64)
        for start in range(0, len(sizes), 2**18):  # bounds the table of distances
            part = sizes[start : start + 2**18]
            nearest[start : start + len(part)] = np.abs(keys - (part[:, 0] / part[:, 1])[:, None]).argmin(1)
        return nearest

    def condition(self, sizes):
        """What the size condition of a model is told, float32 (n, 2), of images of these heights and widths (n, 2).

        The official multi-scale loader gives the image's own size, the single-scale one the resolution.
        """
        if self.multi_scale:
            return np.asarray(sizes, np.float32)
        return np.full((len(sizes), 2), self.base, np.float32)

    def as_dict(self):
        """The fields, for a file that has to tell what it was made for."""
        return asdict(self)

"""The image sizes PixArt-Sigma was trained on, by aspect ratio, and the choice of the nearest."""

from mindsigma.errors import MindSigmaError

# Key: height / width as published, rounded; value: height, width. The other bases are this table scaled.
_BINS_1024 = {
    "0.25": (512, 2048),
    "0.26": (512, 1984),
    "0.27": (512, 1920),
    "0.28": (512, 1856),
    "0.32": (576, 1792),
    "0.33": (576, 1728),
    "0.35": (576, 1664),
    "0.4": (640, 1600),
    "0.42": (640, 1536),
    "0.48": (704, 1472),
    "0.5": (704, 1408),
    "0.52": (704, 1344),
    "0.57": (768, 1344),
    "0.6": (768, 1280),
    "0.68": (832, 1216),
    "0.72": (832, 1152),
    "0.78": (896, 1152),
    "0.82": (896, 1088),
    "0.88": (960, 1088),
    "0.94": (960, 1024),
    "1.0": (1024, 1024),
    "1.07": (1024, 960),
    "1.13": (1088, 960),
    "1.21": (1088, 896),
    "1.29": (1152, 896),
    "1.38": (1152, 832),
    "1.46": (1216, 832),
    "1.67": (1280, 768),
    "1.75": (1344, 768),
    "2.0": (1408, 704),
    "2.09": (1472, 704),
    "2.4": (1536, 640),
    "2.5": (1600, 640),
    "2.89": (1664, 576),
    "3.0": (1728, 576),
    "3.11": (1792, 576),
    "3.62": (1856, 512),
    "3.75": (1920, 512),
    "3.88": (1984, 512),
    "4.0": (2048, 512),
}

# Multiples of 64, where scaling would have given multiples of 180.
_BINS_2880 = {
    "0.25": (1408, 5760),
    "0.26": (1408, 5568),
    "0.27": (1408, 5376),
    "0.28": (1408, 5184),
    "0.32": (1600, 4992),
    "0.33": (1600, 4800),
    "0.34": (1600, 4672),
    "0.4": (1792, 4480),
    "0.42": (1792, 4288),
    "0.47": (1920, 4096),
    "0.49": (1920, 3904),
    "0.51": (1920, 3776),
    "0.55": (2112, 3840),
    "0.59": (2112, 3584),
    "0.68": (2304, 3392),
    "0.72": (2304, 3200),
    "0.78": (2496, 3200),
    "0.83": (2496, 3008),
    "0.89": (2688, 3008),
    "0.93": (2688, 2880),
    "1.0": (2880, 2880),
    "1.07": (2880, 2688),
    "1.12": (3008, 2688),
    "1.21": (3008, 2496),
    "1.28": (3200, 2496),
    "1.39": (3200, 2304),
    "1.47": (3392, 2304),
    "1.7": (3584, 2112),
    "1.82": (3840, 2112),
    "2.03": (3904, 1920),
    "2.13": (4096, 1920),
    "2.39": (4288, 1792),
    "2.5": (4480, 1792),
    "2.92": (4672, 1600),
    "3.0": (4800, 1600),
    "3.12": (4992, 1600),
    "3.68": (5184, 1408),
    "3.82": (5376, 1408),
    "3.95": (5568, 1408),
    "4.0": (5760, 1408),
}

TRAINING_BASES = (256, 512, 1024, 2048, 2880, 4096)

# Keys that the tables for inference leave out.
_RARE = {"0.27", "2.89", "3.11", "3.62", "3.75", "3.88"}
_LEFT_OUT = {
    256: _RARE | {"0.26"},
    512: _RARE | {"0.26"},
    1024: _RARE | {"0.26"},
    2048: set(),
    4096: _RARE | {"0.28"},
}

_LATENT_PIXEL = 8

# Official ASPECT_RATIO_{base}_TEST; it differs from what diffusers samples at 2048 alone.
_LEFT_OUT_OF_TEST = {**_LEFT_OUT, 2048: _RARE | {"0.28"}}

# Latent sides that have inference bins.
INPUT_SIZES = tuple(base // _LATENT_PIXEL for base in _LEFT_OUT)


def training_bins(base):
    """All 40 sizes trained on at a base of 256, 512, 1024, 2048, 2880 or 4096 pixels.

    Returns:
        dict from height / width, as published (e.g. "0.25", "4.0"), to (height, width) in pixels, ascending.

    Raises:
        MindSigmaError: no table for this base.
    """
    if base not in TRAINING_BASES:
        raise MindSigmaError(f"no training sizes for base {base}: give one of {_listed(TRAINING_BASES)}")
    if base == 2880:
        return dict(_BINS_2880)
    return {key: (height * base // 1024, width * base // 1024) for key, (height, width) in _BINS_1024.items()}


def inference_bins(base):
    """The sizes sampled at a base of 256, 512, 1024 (33, as diffusers), 2048 (40, as diffusers) or 4096 (33) pixels.

    The 33 of 4096 have the keys of the official ASPECT_RATIO_2048_TEST and the values of its ASPECT_RATIO_2880_TEST.
    Returns and raises as `training_bins`.
    """
    if base not in _LEFT_OUT:
        raise MindSigmaError(f"no inference sizes for base {base}: give one of {_listed(_LEFT_OUT)}")
    return {key: size for key, size in training_bins(base).items() if key not in _LEFT_OUT[base]}


def official_test_bins(base):
    """The 33 sizes of the official ASPECT_RATIO_{base}_TEST: 256, 512, 1024, 2048, and 4096, misnamed 2880 there.

    Returns and raises as `training_bins`.
    """
    if base not in _LEFT_OUT_OF_TEST:
        raise MindSigmaError(f"no test sizes for base {base}: give one of {_listed(_LEFT_OUT_OF_TEST)}")
    return {key: size for key, size in training_bins(base).items() if key not in _LEFT_OUT_OF_TEST[base]}


def closest_bin(height, width, bins):
    """The bin whose key is nearest to height / width, the first of equals.

    Returns:
        (key as a float, which is the model's aspect-ratio micro condition, (height, width) in pixels).

    Raises:
        MindSigmaError: height or width is not positive.
    """
    if height <= 0 or width <= 0:
        raise MindSigmaError(f"image size {height}x{width}: height and width must be positive")
    key = min(bins, key=lambda key: abs(float(key) - height / width))
    return float(key), bins[key]


def bin_base(input_size):
    """Base in pixels of the `inference_bins` of a model whose square latents have `input_size` pixels a side.

    Raises:
        MindSigmaError: no table for this size.
    """
    base = input_size * _LATENT_PIXEL
    if base not in _LEFT_OUT:
        sides = _listed(known // _LATENT_PIXEL for known in _LEFT_OUT)
        raise MindSigmaError(f"no aspect-ratio table for latent side {input_size}: known are {sides}")
    return base


def _listed(numbers):
    return ", ".join(map(str, numbers))

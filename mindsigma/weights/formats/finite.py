"""Weights that are no numbers: told when they are read, not by what they make of an image."""

import numpy as np

from mindsigma.errors import MindSigmaError, one_line

CHUNK = 1 << 18  # numbers looked at once, in a processor's cache

# Of each size of a float: its bits without the sign, and the least of them that are infinity or no number.
BITS = {
    2: {"float16": (np.uint16, 0x7FFF, 0x7C00), "bfloat16": (np.uint16, 0x7FFF, 0x7F80)},
    4: {"float32": (np.uint32, 0x7FFFFFFF, 0x7F800000)},
}


def all_finite(array):
    """Whether an array, of any shape, dtype and strides, holds neither NaN nor infinity."""
    known = BITS.get(array.dtype.itemsize, {}).get(array.dtype.name)
    if known is None:
        if array.dtype.kind in "biu" or not array.size:
            return True
        return bool(np.isfinite(np.asarray(array, np.float64)).all())
    bits, mask, least = known
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    return not any((flat[i : i + CHUNK] & bits(mask)).max() >= least for i in range(0, flat.size, CHUNK))


def finite(path, name, array):
    """`array`, if it is all finite; else raises MindSigmaError that names the file and the tensor."""
    if not all_finite(array):
        raise MindSigmaError(
            f"{path}: tensor '{one_line(name)}' is not finite (NaN or infinity); copy, download or make the file again"
        )
    return array

"""Operands of the Ascend host's kernels: an array in a dtype, what it is in float64, and how an output is compared."""

import ctypes

import numpy as np
from ascend_kernels import BF16, Tensor, from_bfloat, library, to_bfloat

DTYPES = ("float32", "float16", BF16)
LAST_PLACE = {"float32": 2.0**-23, "float16": 2.0**-10, BF16: 2.0**-7, "float64": 2.0**-52}  # relative


class Numbers:
    """Values rounded to a dtype: `wide` in float64, `tensor` for a kernel, which may see it otherwise.

    Args:
        values: anything that NumPy makes an array of.
        dtype: "bfloat16" or a NumPy name.
        see: what the kernel gets of the array, as array -> view.
    """

    def __init__(self, values, dtype, see=lambda array: array):
        self.dtype = dtype
        values = np.asarray(values)
        self.held = to_bfloat(values).reshape(values.shape) if dtype == BF16 else np.array(values, dtype)
        self.seen = see(self.held)
        self.tensor = Tensor(self.seen, dtype == BF16)

    @property
    def wide(self):
        """What the kernel sees, in float64."""
        if self.dtype != BF16:
            return self.seen.astype(np.float64)
        return from_bfloat(np.atleast_1d(self.seen)).astype(np.float64).reshape(self.seen.shape)


def drawn(rng, shape, dtype, see=lambda array: array):
    """Normal numbers of a dtype."""
    return Numbers(rng.standard_normal(shape), dtype, see)


def room(shape, dtype, see=lambda array: array):
    """An output, full of what a kernel must overwrite."""
    return Numbers(np.full(shape, 77.0), dtype, see)


def close(found, expected, roundings=1.0, absolute=None):
    """Assert that an output is what float64 gives, to some roundings of its dtype and fp32's sums.

    Args:
        found: Numbers.
        roundings: how many halves of a last place.
        absolute: error of values near 0; None is 3e-6 times the largest value.
    """
    expected = np.broadcast_to(expected, found.wide.shape)
    if absolute is None:
        absolute = 3e-6 * max(np.abs(expected).max(initial=0), 1e-3)
    relative = max(roundings * LAST_PLACE[found.dtype] / 2 * 1.01, 3e-6)
    np.testing.assert_allclose(found.wide, expected, rtol=relative, atol=absolute)


def bools(*values):
    """Truth values as an aclBoolArray."""
    return ctypes.c_void_p(
        library().aclCreateBoolArray((ctypes.c_bool * len(values))(*values), ctypes.c_uint64(len(values)))
    )

"""Which dtypes are floating point: NumPy's own, bfloat16, and float8, which NumPy does not count among them."""

import ml_dtypes
import numpy as np

FLOAT8 = {
    np.dtype(kind)
    for kind in (
        ml_dtypes.float8_e4m3fn,
        ml_dtypes.float8_e5m2,
        ml_dtypes.float8_e4m3fnuz,
        ml_dtypes.float8_e5m2fnuz,
    )
}  # every value of theirs is exact in float16
_FLOATS = FLOAT8 | {np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)}


def is_float(dtype):
    """Whether a NumPy dtype is a floating-point one that a weight may have."""
    return np.dtype(dtype) in _FLOATS


def is_float8(dtype):
    """Whether a NumPy dtype is one of eight bits, too coarse to hold the result of a computation."""
    return np.dtype(dtype) in FLOAT8


def computed_dtype(dtype):
    """The dtype for values that are computed beside, or from, weights of `dtype`: theirs, float32 beside float8."""
    return np.dtype(np.float32) if is_float8(dtype) else np.dtype(dtype)


def common_dtype(dtypes):
    """The dtype that holds tensors of these dtypes, joined: theirs if it is one, else float32, or float64 if needed."""
    kinds = {np.dtype(dtype) for dtype in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in kinds else np.float32)

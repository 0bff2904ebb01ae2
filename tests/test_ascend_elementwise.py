"""Kernels of the Ascend host that compute element by element, held to NumPy in float64."""

import numpy as np
import pytest
from ascend_kernels import Refused, Tensor, call, from_bfloat, to_bfloat

RNG = np.random.default_rng(0)
ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # one last place, relative


def make(shape, dtype):
    """Random numbers of a dtype: the array as the host sees it, its values in float64."""
    wide = RNG.standard_normal(shape).astype(np.float32)
    if dtype == "bfloat16":
        held = to_bfloat(wide)
        return held, from_bfloat(held).astype(np.float64)
    held = wide.astype(dtype)
    return held, held.astype(np.float64)


def close(found, expected, dtype):
    """Whether an array of a dtype is `expected` to one rounding."""
    found = from_bfloat(found) if dtype == "bfloat16" else found
    np.testing.assert_allclose(
        found.astype(np.float64), expected, rtol=2 * ROUNDING[dtype], atol=1e-6 if dtype == "float32" else 1e-4
    )


@pytest.mark.parametrize("dtype", ROUNDING)
def test_silu(dtype):
    x, wide = make((3, 5), dtype)
    out = np.zeros_like(x)
    call("aclnnSilu", Tensor(x.T, dtype == "bfloat16"), Tensor(out.T, dtype == "bfloat16"))
    close(out, wide / (1 + np.exp(-wide)), dtype)


def test_a_dtype_that_cann_refuses():
    with pytest.raises(Refused, match="aclnnSilu: self is int32"):
        call("aclnnSilu", Tensor(np.zeros(3, np.int32)), Tensor(np.zeros(3, np.int32)))

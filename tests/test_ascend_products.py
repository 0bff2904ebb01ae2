"""Products of the Ascend host, held to NumPy in float64."""

from ctypes import c_int8

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, Tensor, call, scalar
from ascend_numbers import DTYPES, close, drawn, room

KEEP, DOWN, FP16, HF32 = map(c_int8, (0, 1, 2, 3))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def turn(array):
    return array.swapaxes(-1, -2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("a", ["plain", "turned", "strided"])
@pytest.mark.parametrize("b", ["plain", "turned"])
def test_mm_of_views(a, b, dtype, rng):
    shapes = {"plain": (9, 70), "turned": (70, 9), "strided": (18, 70)}
    sees = {"plain": lambda array: array, "turned": turn, "strided": lambda array: array[::2]}
    x = drawn(rng, shapes[a], dtype, sees[a])
    y = drawn(rng, (70, 11) if b == "plain" else (11, 70), dtype, sees[b])
    out = room((11, 9), dtype, turn)
    call("aclnnMm", x.tensor, y.tensor, out.tensor, KEEP)
    close(out, x.wide @ y.wide)


@pytest.mark.parametrize("a,b", [
    ((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,)), ((2, 4, 5), (5, 3)), ((4, 5), (2, 5, 3)), ((2, 1, 4, 5), (3, 5, 6)),
    ((2, 3, 4, 5), (2, 3, 5, 6)), ((0, 5), (5, 3)), ((4, 0), (0, 3)), ((2, 4, 5), (2, 5)), ((1, 4, 5), (3, 5, 2)),
])  # fmt: skip
def test_matmul_of_any_shapes(a, b, rng):
    if b == (2, 5):
        with pytest.raises(Refused, match="common side is 5 .* and 2"):
            call("aclnnMatmul", drawn(rng, a, "float32").tensor, drawn(rng, b, "float32").tensor,
                 room((2, 4), "float32").tensor, KEEP)  # fmt: skip
        return
    x, y = drawn(rng, a, "float16"), drawn(rng, b, "float16")
    out = room(np.matmul(x.wide, y.wide).shape, "float16")
    call("aclnnMatmul", x.tensor, y.tensor, out.tensor, KEEP)
    close(out, np.matmul(x.wide, y.wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(dtype, rng):
    x, y = drawn(rng, (3, 4, 5), dtype), drawn(rng, (3, 6, 5), dtype, turn)
    out = room((3, 4, 6), dtype)
    call("aclnnBatchMatMul", x.tensor, y.tensor, out.tensor, KEEP)
    close(out, x.wide @ y.wide)
    one = drawn(rng, (1, 5, 6), dtype)
    call("aclnnBatchMatMul", x.tensor, one.tensor, out.tensor, KEEP)
    close(out, x.wide @ one.wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", [(11,), (9, 1), (9, 11), (1,)])
def test_addmm(base, dtype, rng):
    x, y, c, out = (
        drawn(rng, (9, 70), dtype),
        drawn(rng, (11, 70), dtype, turn),
        drawn(rng, base, dtype),
        room((9, 11), dtype),
    )
    call("aclnnAddmm", c.tensor, x.tensor, y.tensor, scalar(0.5), scalar(2, "int64"), out.tensor, KEEP)
    close(out, 0.5 * c.wide + 2 * (x.wide @ y.wide))


def test_what_a_beta_of_0_leaves_out(rng):
    x, y, out = drawn(rng, (2, 3), "float32"), drawn(rng, (3, 4), "float32"), room((2, 4), "float32")
    c = drawn(rng, (4,), "float32")
    c.held[:] = np.nan
    call("aclnnAddmm", c.tensor, x.tensor, y.tensor, scalar(0.0), scalar(1.0), out.tensor, KEEP)
    close(out, x.wide @ y.wide)
    call("aclnnInplaceAddmm", out.tensor, x.tensor, y.tensor, scalar(1.0), scalar(1.0), KEEP)
    close(out, 2 * (x.wide @ y.wide))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_with_batches_and_vectors(dtype, rng):
    x, y = drawn(rng, (3, 4, 5), dtype), drawn(rng, (3, 5, 6), dtype)
    c, out, summed = drawn(rng, (4, 6), dtype), room((3, 4, 6), dtype), room((4, 6), dtype)
    call("aclnnBaddbmm", c.tensor, x.tensor, y.tensor, scalar(3.0), scalar(0.5), out.tensor, KEEP)
    close(out, 3 * c.wide + 0.5 * (x.wide @ y.wide))
    call("aclnnAddbmm", c.tensor, x.tensor, y.tensor, scalar(3.0), scalar(0.5), summed.tensor, KEEP)
    close(summed, 3 * c.wide + 0.5 * (x.wide @ y.wide).sum(0))
    matrix, vector, line = drawn(rng, (4, 5), dtype), drawn(rng, (5,), dtype), room((4,), dtype)
    call("aclnnMv", matrix.tensor, vector.tensor, line.tensor, KEEP)
    close(line, matrix.wide @ vector.wide)
    start = drawn(rng, (4,), dtype)
    call("aclnnAddmv", start.tensor, matrix.tensor, vector.tensor, scalar(2.0), scalar(3.0), line.tensor, KEEP)
    close(line, 3 * start.wide + 2 * (matrix.wide @ vector.wide))
    number = room((), dtype)
    call("aclnnDot", vector.tensor, vector.tensor, number.tensor)
    close(number, vector.wide @ vector.wide)


def test_sums_are_in_float32(rng):
    """4096 products of 0.1 in bf16: summed in bf16 they would stop at 8."""
    x, y, out = room((1, 4096), BF16), room((4096, 1), BF16), room((1, 1), BF16)
    x.held[:] = y.held[:] = np.uint16(0x3DCD)
    call("aclnnMm", x.tensor, y.tensor, out.tensor, KEEP)
    close(out, x.wide @ y.wide)
    assert out.wide > 40


@pytest.mark.parametrize("math,places", [(KEEP, 24), (DOWN, 12), (HF32, 12), (FP16, 11)])
def test_what_cube_math_does_to_float32(math, places, rng):
    """The operands lose their last places, fp16 also its range."""
    x, y, out = drawn(rng, (4, 5), "float32"), drawn(rng, (5, 3), "float32"), room((4, 3), "float32")
    call("aclnnMm", x.tensor, y.tensor, out.tensor, math)

    def narrowed(wide):
        fraction, exponent = np.frexp(wide)
        return np.ldexp(np.rint(np.ldexp(fraction, places)), exponent - places)

    close(out, narrowed(x.wide) @ narrowed(y.wide))
    assert places == 24 or np.abs(out.wide - x.wide @ y.wide).max() > 1e-5


def test_what_cann_refuses(rng):
    half, brain, single = (drawn(rng, (2, 2), dtype) for dtype in ("float16", BF16, "float32"))
    whole = Tensor(np.ones((2, 2), np.int32))
    with pytest.raises(Refused, match="aclnnMm: self is int32; CANN takes"):
        call("aclnnMm", whole, half.tensor, half.tensor, KEEP)
    with pytest.raises(Refused, match="bfloat16 meets float32"):
        call("aclnnMm", brain.tensor, single.tensor, single.tensor, KEEP)
    with pytest.raises(Refused, match="self has 3 dimensions"):
        call("aclnnMm", drawn(rng, (1, 2, 2), "float16").tensor, half.tensor, half.tensor, KEEP)
    with pytest.raises(Refused, match="cubeMathType is 9"):
        call("aclnnMm", half.tensor, half.tensor, half.tensor, c_int8(9))
    with pytest.raises(Refused, match="out has the shape"):
        call("aclnnMm", half.tensor, half.tensor, room((2, 3), "float16").tensor, KEEP)
    with pytest.raises(Refused, match="does not broadcast|do not broadcast"):
        call("aclnnAddmm", drawn(rng, (3,), "float16").tensor, half.tensor, half.tensor, scalar(1.0), scalar(1.0),
             half.tensor, KEEP)  # fmt: skip

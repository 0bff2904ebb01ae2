"""Reductions of the Ascend host, held to NumPy in float64."""

from ctypes import c_int

import numpy as np
import pytest
from ascend_kernels import CODES, Refused, call, ints, scalar
from ascend_numbers import DTYPES, Numbers, close, drawn, room


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def turn(array):
    return array.transpose(2, 0, 1)


def code(dtype):
    return c_int(CODES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dims", [(), (1,), (0, -1), (0, 1, 2)])
def test_sums_and_means(dims, keep, dtype, rng):
    x = drawn(rng, (5, 6, 7), dtype, turn)
    axis = dims or None
    expected = x.wide.sum(axis, keepdims=keep)
    out = room(expected.shape, dtype)
    call("aclnnReduceSum", x.tensor, ints(*dims), keep, code(dtype), out.tensor)
    close(out, expected)
    call("aclnnMean", x.tensor, ints(*dims), keep, code(dtype), out.tensor)
    close(out, x.wide.mean(axis, keepdims=keep))
    for name, reduced in (("Amax", x.wide.max), ("Amin", x.wide.min)):
        call(f"aclnn{name}", x.tensor, ints(*dims), keep, out.tensor)
        close(out, reduced(axis, keepdims=keep))


def test_sums_are_wider_than_their_dtype():
    """2,048 in fp16 would stay there with every further one."""
    out = room((), "float16")
    call("aclnnReduceSum", Numbers(np.ones(4096), "float16").tensor, ints(), False, code("float16"), out.tensor)
    assert out.seen == 4096
    call("aclnnReduceSum", Numbers(np.full(1 << 20, 0.1), "float32").tensor, ints(), False, code("float32"),
         (wide := room((), "float32")).tensor)  # fmt: skip
    np.testing.assert_allclose(wide.wide, float(np.float32(0.1)) * (1 << 20), rtol=1e-6)


def test_sums_of_whole_numbers_and_nothing():
    out = room((2,), "int64")
    call("aclnnReduceSum", Numbers([[2**40, 1], [5, -9]], "int64").tensor, ints(1), False, code("int64"), out.tensor)
    np.testing.assert_array_equal(out.seen, [2**40 + 1, -4])
    empty = room((3,), "float32")
    call("aclnnReduceSum", Numbers(np.zeros((3, 0)), "float32").tensor, ints(1), False, code("float32"), empty.tensor)
    np.testing.assert_array_equal(empty.seen, [0, 0, 0])
    call("aclnnMean", Numbers(np.zeros((3, 0)), "float32").tensor, ints(1), False, code("float32"), empty.tensor)
    assert np.isnan(empty.seen).all()


def test_what_is_refused(rng):
    x = drawn(rng, (2, 3), "float32")
    with pytest.raises(Refused, match="aclnnReduceSum: dim 2 of a tensor with 2 dimensions"):
        call("aclnnReduceSum", x.tensor, ints(2), False, code("float32"), room((2,), "float32").tensor)
    with pytest.raises(Refused, match="dim 1 comes twice|dim -1 comes twice"):
        call("aclnnReduceSum", x.tensor, ints(1, -1), False, code("float32"), room((2,), "float32").tensor)
    with pytest.raises(Refused, match="out has the shape"):
        call("aclnnMean", x.tensor, ints(1), True, code("float32"), room((2,), "float32").tensor)
    with pytest.raises(Refused, match="dtype says float16"):
        call("aclnnMean", x.tensor, ints(1), False, code("float16"), room((2,), "float32").tensor)


@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
def test_extremes_and_their_places(dtype, rng):
    x = Numbers(rng.integers(-3, 4, (6, 8)), dtype)
    out, places = room((6,), dtype), room((6,), "int64")
    for name, extreme, place in (("Max", np.max, np.argmax), ("Min", np.min, np.argmin)):
        call(f"aclnn{name}Dim", x.tensor, 1, False, out.tensor, places.tensor)
        np.testing.assert_array_equal(out.wide, extreme(x.wide, 1))
        np.testing.assert_array_equal(places.seen, place(x.wide, 1))
        call(f"aclnnArg{name}", x.tensor, -1, False, places.tensor)
        np.testing.assert_array_equal(places.seen, place(x.wide, 1))
        whole = room((), dtype)
        call(f"aclnn{name}", x.tensor, whole.tensor)
        assert whole.wide == extreme(x.wide)


def test_not_a_number_is_the_extreme():
    x, out = Numbers([[1, np.nan, 3]], "float32"), room((1,), "float32")
    call("aclnnAmax", x.tensor, ints(1), False, out.tensor)
    assert np.isnan(out.seen[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", [0, 1, 2, 3, np.inf, -np.inf])
def test_norms(order, dtype, rng):
    x, out = drawn(rng, (4, 9), dtype), room((4,), dtype)
    call("aclnnNorm", x.tensor, scalar(order), ints(1), False, out.tensor)
    close(out, np.linalg.norm(x.wide, order, 1))
    call("aclnnLinalgVectorNorm", x.tensor, scalar(order), ints(1), False, code(dtype), out.tensor)
    close(out, np.linalg.norm(x.wide, order, 1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_spreads_and_running_sums(dtype, rng):
    x, out = drawn(rng, (4, 9), dtype), room((4,), dtype)
    call("aclnnProdDim", x.tensor, 1, False, code(dtype), out.tensor)
    close(out, x.wide.prod(1))
    call("aclnnVarCorrection", x.tensor, ints(1), 1, False, out.tensor)
    close(out, x.wide.var(1, ddof=1))
    call("aclnnStd", x.tensor, ints(1), 0, False, out.tensor)
    close(out, x.wide.std(1))
    for axis in (0, 1):
        running = room((4, 9), dtype)
        call("aclnnCumsum", x.tensor, axis, code(dtype), running.tensor)
        close(running, x.wide.cumsum(axis))


def test_all_and_any():
    x, out = Numbers([[1, 0], [0, 0], [2, 3]], "float32"), room((3,), "bool")
    call("aclnnAll", x.tensor, ints(1), False, out.tensor)
    np.testing.assert_array_equal(out.seen, [False, False, True])
    call("aclnnAny", x.tensor, ints(1), False, out.tensor)
    np.testing.assert_array_equal(out.seen, [True, False, True])

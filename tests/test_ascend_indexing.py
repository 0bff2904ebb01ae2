"""Kernels of the Ascend host that index, scatter, sort, draw and optimise, held to NumPy."""

from ctypes import c_float, c_int

import numpy as np
import pytest
from ascend_kernels import Refused, call, scalar, tensors
from ascend_numbers import DTYPES, Numbers, close, drawn, room


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def turn(array):
    return array.T


@pytest.mark.parametrize("dtype", [*DTYPES, "int64"])
def test_rows(dtype, rng):
    x = Numbers(rng.integers(0, 99, (5, 6)), dtype, turn)
    places = Numbers([4, 0, -1, 4], "int64")
    for axis in (0, 1):
        expected = x.wide.take([4, 0, x.wide.shape[axis] - 1, 4], axis)
        out = room(expected.shape, dtype)
        call("aclnnIndexSelect", x.tensor, axis, places.tensor, out.tensor)
        np.testing.assert_array_equal(out.wide, expected)
    words, out = Numbers([[1, 5], [0, 1]], "int32"), room((2, 2, 5), dtype)
    call("aclnnEmbedding", x.tensor, words.tensor, out.tensor)
    np.testing.assert_array_equal(out.wide, x.wide[words.seen])
    with pytest.raises(Refused, match="aclnnEmbedding: index 6 of 6"):
        call("aclnnEmbedding", x.tensor, Numbers([6], "int32").tensor, room((1, 5), dtype).tensor)


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_and_scatter(axis, rng):
    x = drawn(rng, (4, 5), "float32", turn)
    places = Numbers(rng.integers(0, 4, (3, 4)), "int64")
    out = room((3, 4), "float32")
    call("aclnnGather", x.tensor, axis, places.tensor, out.tensor)
    np.testing.assert_array_equal(
        out.wide, np.take_along_axis(x.wide[:3] if axis else x.wide[:, :4], places.seen, axis)
    )
    source = drawn(rng, (3, 4), "float32")
    expected, out = x.wide.copy(), room((5, 4), "float32")
    at = [places.seen, np.arange(4)] if axis == 0 else [np.arange(3)[:, None], places.seen]
    np.add.at(expected, tuple(at), source.wide)
    call("aclnnScatterAdd", x.tensor, axis, places.tensor, source.tensor, out.tensor)
    close(out, expected)
    expected = x.wide.copy()
    expected[tuple(at)] = 2.5
    call("aclnnScatterValue", x.tensor, axis, places.tensor, scalar(2.5), 0, out.tensor)
    np.testing.assert_array_equal(out.wide, expected)


def test_indices_and_masks(rng):
    x = drawn(rng, (3, 4, 5), "float16")
    rows, columns = Numbers([[2], [0]], "int64"), Numbers([1, 3, 3], "int64")
    nothing = Numbers([], "int64")
    mask = Numbers(rng.integers(0, 2, (3, 4)), "bool")
    for given, index in (
        ((rows, columns), (rows.seen, columns.seen)),
        ((rows, nothing, columns), (rows.seen, slice(None), columns.seen)),
        ((nothing, rows), (slice(None), rows.seen)),
        ((mask,), (mask.seen,)),
    ):
        expected = x.wide[index]
        out = room(expected.shape, "float16")
        call("aclnnIndex", x.tensor, tensors(*(each.tensor for each in given)), out.tensor)
        np.testing.assert_array_equal(out.wide, expected)
        values, expected = drawn(rng, expected.shape, "float16"), x.wide
        expected[index] = values.wide
        changed = Numbers(x.wide, "float16")
        call(
            "aclnnIndexPutImpl", changed.tensor, tensors(*(each.tensor for each in given)), values.tensor, False, False
        )
        if given[0] is not rows:  # which names places twice
            np.testing.assert_array_equal(changed.wide, expected)
    beyond = Numbers([3], "int64")
    with pytest.raises(Refused, match="index 3 of 3"):
        call("aclnnIndex", x.tensor, tensors(beyond.tensor), room((1, 4, 5), "float16").tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_at_places(dtype, rng):
    x, source, places = drawn(rng, (4, 3), dtype), drawn(rng, (5, 3), dtype), Numbers([0, 3, 0, 0, 1], "int32")
    expected, out = x.wide, room((4, 3), dtype)
    np.add.at(expected, places.seen, 2 * source.wide)
    call("aclnnIndexAdd", x.tensor, 0, places.tensor, source.tensor, scalar(2), out.tensor)
    close(out, expected)
    expected = np.zeros((4, 3))
    np.add.at(expected, places.seen, source.wide)
    expected[1] = 0
    call("aclnnEmbeddingDenseBackward", source.tensor, places.tensor, 4, 1, False, out.tensor)
    close(out, expected)


def test_masked_fill_and_one_hot(rng):
    x, mask = drawn(rng, (3, 4), "float32"), Numbers(rng.integers(0, 2, (4,)), "bool")
    expected = np.where(mask.seen, -5, x.wide)
    call("aclnnInplaceMaskedFillScalar", x.tensor, mask.tensor, scalar(-5))
    np.testing.assert_array_equal(x.wide, expected)
    out = room((3, 4), "float32")
    call("aclnnOneHot", Numbers([2, 0, 9], "int64").tensor, c_int(4), Numbers(1.0, "float32").tensor,
         Numbers(0.0, "float32").tensor, -1, out.tensor)  # fmt: skip
    np.testing.assert_array_equal(out.wide, [[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("descending", [False, True])
def test_order(descending, rng):
    x = Numbers(rng.permutation(30).reshape(5, 6), "float32")
    values, places = room((5, 6), "float32"), room((5, 6), "int64")
    call("aclnnSort", x.tensor, True, 0, descending, values.tensor, places.tensor)
    expected = np.argsort(-x.wide if descending else x.wide, 0)
    np.testing.assert_array_equal(places.seen, expected)
    np.testing.assert_array_equal(values.wide, np.take_along_axis(x.wide, expected, 0))
    values, places = room((5, 2), "float32"), room((5, 2), "int64")
    call("aclnnTopk", x.tensor, 2, 1, descending, True, values.tensor, places.tensor)
    expected = np.argsort(-x.wide if descending else x.wide, 1)[:, :2]
    np.testing.assert_array_equal(places.seen, expected)


def test_random_numbers():
    first, again, other = (room((100_000,), "float32") for _ in range(3))
    call("aclnnInplaceNormal", first.tensor, c_float(1.0), c_float(2.0), 7, 3)
    call("aclnnInplaceNormal", again.tensor, c_float(1.0), c_float(2.0), 7, 3)
    call("aclnnInplaceNormal", other.tensor, c_float(1.0), c_float(2.0), 7, 4)
    np.testing.assert_array_equal(first.seen, again.seen)
    drawn_ = first.wide
    assert abs(drawn_.mean() - 1) < 0.03 and abs(drawn_.std() - 2) < 0.03
    assert abs(((drawn_ - 1) ** 4).mean() / 16 - 3) < 0.15  # the kurtosis of a normal distribution
    assert abs(np.corrcoef(drawn_, other.wide)[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn_[:-1], drawn_[1:])[0, 1]) < 0.02
    call("aclnnInplaceUniform", first.tensor, -1.0, 3.0, 7, 0)
    assert first.wide.min() >= -1 and first.wide.max() < 3 and abs(first.wide.mean() - 1) < 0.02
    order = room((50,), "int64")
    call("aclnnRandperm", 50, 1, 0, order.tensor)
    assert sorted(order.seen) == list(range(50)) and (order.seen != np.arange(50)).any()
    with pytest.raises(Refused, match="std is -1"):
        call("aclnnInplaceNormal", first.tensor, c_float(0), c_float(-1), 0, 0)


def test_the_generator_is_philox():
    """The known answer of Philox 4x32-10 for a key and a counter of zeros."""
    out = room((4,), "float32")
    call("aclnnInplaceUniform", out.tensor, 0.0, 1.0, 0, 0)
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    np.testing.assert_array_equal(out.wide, (words >> 8) / 2**24)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adamw(amsgrad, dtype, rng):
    weight, mean, grad = (drawn(rng, (3, 7), dtype) for _ in range(3))
    square, top = Numbers(rng.random((3, 7)), dtype), Numbers(rng.random((3, 7)), dtype)
    w, m, v, s, g = weight.wide, mean.wide, square.wide, top.wide, grad.wide
    m = 0.9 * m + 0.1 * g
    v = 0.99 * v + 0.01 * g * g
    s = np.maximum(s, v) if amsgrad else v
    steps = 4  # a kernel that is given 3
    w = w * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.9**steps)) / (np.sqrt(s / (1 - 0.99**steps)) + 1e-6)
    call("aclnnApplyAdamWV2", weight.tensor, mean.tensor, square.tensor, top.tensor, grad.tensor,
         Numbers([3], "float32").tensor, *map(c_float, (0.1, 0.9, 0.99, 0.05, 1e-6)), amsgrad, False)  # fmt: skip
    close(weight, w, absolute=3e-6)
    close(mean, m, absolute=3e-6)
    close(square, v, absolute=3e-6)
    if amsgrad:
        close(top, s, absolute=3e-6)
    with pytest.raises(Refused, match="step has 2 elements"):
        call("aclnnApplyAdamWV2", weight.tensor, mean.tensor, square.tensor, None, grad.tensor,
             Numbers([3, 4], "float32").tensor, *map(c_float, (0.1, 0.9, 0.99, 0.05, 1e-6)), False, False)  # fmt: skip

"""Operators of the older interface on the Ascend host, held to NumPy."""

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, call_legacy
from ascend_numbers import DTYPES, Numbers, close, drawn, room


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def whole(*values):
    return Numbers(values, "int64").tensor


def run(name, inputs, outputs, **attributes):
    call_legacy(
        name, [getattr(each, "tensor", each) for each in inputs], [each.tensor for each in outputs], **attributes
    )


SLICES = {
    "plain": ((1, 0, 2), (3, 4, 5), (1, 1, 1), {}, np.s_[1:3, 0:4, 2:5]),
    "steps": ((0, -1, 4), (3, 0, -9), (2, -1, -2), {}, np.s_[0:3:2, -1:0:-1, 4::-2]),
    "open": ((1, 1, 1), (2, 2, 2), (1, 1, 1), {"begin_mask": 1, "end_mask": 4}, np.s_[:2, 1:2, 1:]),
    "open backwards": ((0, 0, 0), (0, 0, 0), (-1, 1, 1), {"begin_mask": 7, "end_mask": 7}, np.s_[::-1, :, :]),
    "one": ((-1, 2), (0, 3), (1, 1), {"shrink_axis_mask": 3}, np.s_[-1, 2]),
    "new": ((0, 0, 1), (0, 2, 3), (1, 1, 1), {"new_axis_mask": 1}, np.s_[None, 0:2, 1:3]),
    "rest": ((0, 0, 2), (0, 0, 3), (1, 1, 1), {"ellipsis_mask": 2, "shrink_axis_mask": 5}, np.s_[0, ..., 2]),
    "nothing": ((2, 0, 0), (1, 4, 5), (1, 1, 1), {}, np.s_[2:1, :, :]),
}


@pytest.mark.parametrize("dtype", ["float16", BF16, "int64"])
@pytest.mark.parametrize("name", SLICES)
def test_strided_slice_and_its_gradient(name, dtype, rng):
    begin, end, strides, masks, index = SLICES[name]
    x = Numbers(rng.integers(-9, 9, (3, 4, 5)), dtype)
    out = room(x.wide[index].shape, dtype)
    places = [whole(*begin), whole(*end), whole(*strides)]
    run("StridedSlice", [x, *places], [out], **masks)
    np.testing.assert_array_equal(out.wide, x.wide[index])
    expected, grad = np.zeros((3, 4, 5)), room((3, 4, 5), dtype)
    expected[index] = out.wide
    run("StridedSliceGrad", [whole(3, 4, 5), *places, out], [grad], **masks)
    np.testing.assert_array_equal(grad.wide, expected)


def test_slices_that_do_not_fit(rng):
    x = drawn(rng, (3, 4), "float32")
    with pytest.raises(Refused, match="StridedSlice: y has the shape"):
        run("StridedSlice", [x, whole(0), whole(2), whole(1)], [room((3, 4), "float32")])
    with pytest.raises(Refused, match="Slice: 3 from 1 on, of 3"):
        run("Slice", [x, whole(1, 0), whole(3, 4)], [room((3, 4), "float32")])
    with pytest.raises(Refused, match="NoSuch: the Ascend host has no such operator"):
        run("NoSuch", [x], [x])


def test_slice(rng):
    x, out = drawn(rng, (3, 4), "float16"), room((2, 3), "float16")
    run("Slice", [x, whole(1, 1), whole(2, -1)], [out])
    np.testing.assert_array_equal(out.wide, x.wide[1:, 1:])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_parts_and_piles(axis, rng):
    x = drawn(rng, (4, 6, 2), BF16)
    parts = np.split(x.wide, 2, axis)
    outs = [room(part.shape, BF16) for part in parts]
    run("Split", [Numbers(axis, "int32"), x], outs, num_split=2)
    for out, part in zip(outs, parts):
        np.testing.assert_array_equal(out.wide, part)
    pile = [room(np.take(x.wide, 0, axis).shape, BF16) for _ in range(x.wide.shape[axis])]
    run("Unpack", [x], pile, axis=axis, num=len(pile))
    for i, out in enumerate(pile):
        np.testing.assert_array_equal(out.wide, np.take(x.wide, i, axis))
    back = room(x.wide.shape, BF16)
    run("Pack", pile, [back], axis=axis, N=len(pile))
    np.testing.assert_array_equal(back.wide, x.wide)
    uneven = [room((4, 1, 2), BF16), room((4, 5, 2), BF16)]
    run("SplitV", [x, whole(1, 5), Numbers(1, "int32")], uneven, num_split=2)
    np.testing.assert_array_equal(uneven[1].wide, x.wide[:, 1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(dtype, rng):
    x, a, row, out = drawn(rng, (3, 4), dtype), drawn(rng, (3, 4), dtype), drawn(rng, (4,), dtype), room((3, 4), dtype)
    run("Addcmul", [x, a, row, Numbers(0.5, dtype)], [out])
    close(out, x.wide + 0.5 * a.wide * row.wide)
    run("AddN", [x, a, x], [out], N=3)
    close(out, 2 * x.wide + a.wide)
    run("RealDiv", [x, row], [out])
    close(out, x.wide / row.wide)
    run("BiasAdd", [x, row], [out], data_format="NCHW")
    close(out, x.wide + row.wide)
    image, bias, out = drawn(rng, (2, 4, 3, 5), dtype), drawn(rng, (4,), dtype), room((2, 4, 3, 5), dtype)
    run("BiasAdd", [image, bias], [out], data_format="NCHW")
    close(out, image.wide + bias.wide[:, None, None])
    mean = room((2, 1, 1, 5), dtype)
    run("ReduceMean", [image, whole(1, 2)], [mean], keep_dims=1)
    close(mean, image.wide.mean((1, 2), keepdims=True))
    with pytest.raises(Refused, match="BiasAdd: a bias of 4 for 5 channels"):
        run("BiasAdd", [image, bias], [out], data_format="NHWC")


def test_copies_and_rows(rng):
    x, to, out = drawn(rng, (3, 4), "float16"), room((3, 4), "float16"), room((3, 4), "float16")
    run("Assign", [to, x], [to])
    run("TensorMove", [x], [out])
    for found in (to, out):
        np.testing.assert_array_equal(found.wide, x.wide)
    run("Fill", [whole(3, 4), Numbers(2.5, "float16")], [out])
    np.testing.assert_array_equal(out.wide, np.full((3, 4), 2.5))
    for axis in (0, 1):
        places = Numbers([[2, 0], [1, 2]], "int32")
        expected = x.wide.take(places.seen, axis)
        out = room(expected.shape, "float16")
        run("GatherV2", [x, places, whole(axis)], [out], batch_dims=0)
        np.testing.assert_array_equal(out.wide, expected)
    with pytest.raises(Refused, match="GatherV2: index 3 of 3 rows"):
        run("GatherV2", [x, Numbers([3], "int32"), whole(0)], [room((1, 4), "float16")], batch_dims=0)

"""Kernels of the Ascend host that move and fill: every item must come out as it went in."""

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, call, ints, scalar, tensors
from ascend_numbers import DTYPES, Numbers, drawn, room

ITEMS = [*DTYPES, "int64", "bool"]


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def turn(array):
    return array.T


def same(out, expected):
    np.testing.assert_array_equal(out.wide, expected)


@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1), (-1, -2, -3)])
def test_permute(order, dtype, rng):
    x = Numbers(rng.integers(0, 50, (3, 4, 5)), dtype, turn)
    out = room(x.wide.transpose(order).shape, dtype)
    call("aclnnPermute", x.tensor, ints(*order), out.tensor)
    same(out, x.wide.transpose(order))


def test_permute_refuses(rng):
    x = drawn(rng, (2, 3), "float32")
    with pytest.raises(Refused, match="aclnnPermute: dim 0 comes twice"):
        call("aclnnPermute", x.tensor, ints(0, 0), room((2, 2), "float32").tensor)
    with pytest.raises(Refused, match="float32 and float16; CANN wants one dtype"):
        call("aclnnPermute", x.tensor, ints(1, 0), room((3, 2), "float16").tensor)


@pytest.mark.parametrize("dtype", ITEMS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_join_and_part(axis, dtype, rng):
    shapes = [(4, 3, 2), (4, 3, 2), (4, 3, 2)]
    sizes = (1, 3, 2)
    parts = []
    for shape, size in zip(shapes, sizes):
        shape = list(shape)
        shape[axis] = size
        parts.append(Numbers(rng.integers(0, 9, shape[::-1]), dtype, turn))
    joined = np.concatenate([part.wide for part in parts], axis)
    out = room(joined.shape, dtype)
    call("aclnnCat", tensors(*(part.tensor for part in parts)), axis, out.tensor)
    same(out, joined)
    outs = [room(part.seen.shape, dtype) for part in parts]
    call("aclnnSplitWithSize", out.tensor, ints(*sizes), axis, tensors(*(each.tensor for each in outs)))
    for found, part in zip(outs, parts):
        same(found, part.wide)


def test_join_converts_and_skips_the_empty(rng):
    a, b, none = drawn(rng, (2, 3), "float16"), drawn(rng, (1, 3), "float32"), drawn(rng, (0,), "float32")
    out = room((3, 3), "float32")
    call("aclnnCat", tensors(a.tensor, none.tensor, b.tensor), 0, out.tensor)
    same(out, np.concatenate([a.wide, b.wide]))
    with pytest.raises(Refused, match="aclnnCat: a tensor has the shape"):
        call("aclnnCat", tensors(a.tensor, b.tensor), 1, out.tensor)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_stack(axis, rng):
    parts = [drawn(rng, (3, 4), BF16, turn) for _ in range(2)]
    expected = np.stack([part.wide for part in parts], axis)
    out = room(expected.shape, BF16)
    call("aclnnStack", tensors(*(part.tensor for part in parts)), axis, out.tensor)
    same(out, expected)


def test_split_by_a_size(rng):
    x = drawn(rng, (2, 7), "float16")
    outs = [room((2, size), "float16") for size in (3, 3, 1)]
    call("aclnnSplitTensor", x.tensor, 3, 1, tensors(*(each.tensor for each in outs)))
    same(outs[1], x.wide[:, 3:6])
    same(outs[2], x.wide[:, 6:])
    with pytest.raises(Refused, match="2 outputs for 3 parts"):
        call("aclnnSplitTensor", x.tensor, 3, 1, tensors(*(each.tensor for each in outs[:2])))


@pytest.mark.parametrize("start,end,step", [(0, 4, 1), (2, 9, 3), (-3, -1, 1), (-20, 50, 2), (5, 2, 1)])
def test_slice(start, end, step, rng):
    x = drawn(rng, (7, 3), "float16")
    expected = x.wide[start:end:step]
    out = room(expected.shape, "float16")
    call("aclnnSlice", x.tensor, 0, start, end, step, out.tensor)
    same(out, expected)


def test_slice_refuses_steps_back(rng):
    with pytest.raises(Refused, match="aclnnSlice: step is -1"):
        call("aclnnSlice", drawn(rng, (7,), "float16").tensor, 0, 6, 0, -1, room((6,), "float16").tensor)


def test_repeats_and_expansions(rng):
    x = drawn(rng, (2, 1, 3), "float16", turn)
    out = room((4, 3, 2, 2), "float16")
    call("aclnnRepeat", x.tensor, ints(4, 1, 2, 1), out.tensor)
    same(out, np.tile(x.wide, (4, 1, 2, 1)))
    out = room((5, 3, 4, 2), "float16")
    call("aclnnExpand", x.tensor, ints(5, -1, 4, -1), out.tensor)
    same(out, np.broadcast_to(x.wide, (5, 3, 4, 2)))
    with pytest.raises(Refused, match="size is -1 for a new dimension"):
        call("aclnnExpand", x.tensor, ints(-1, 3, 1, 2), out.tensor)


@pytest.mark.parametrize("dtype", ITEMS)
def test_copies_convert_and_broadcast(dtype, rng):
    x = Numbers(rng.integers(0, 2, (4,)), dtype)
    to = room((3, 4), "float32", lambda array: array[:, ::-1])
    call("aclnnInplaceCopy", to.tensor, x.tensor)
    same(to, np.broadcast_to(x.wide, (3, 4)))
    with pytest.raises(Refused, match="aclnnInplaceCopy"):
        call("aclnnInplaceCopy", room((3,), "float32").tensor, x.tensor)


@pytest.mark.parametrize("pads", [(1, 2), (0, 0, 3, 1), (-1, 2, 1, -2)])
def test_pads(pads, rng):
    x = drawn(rng, (4, 5), "float16")
    widths = [(0, 0)] * (2 - len(pads) // 2) + [(pads[i], pads[i + 1]) for i in range(len(pads) - 2, -1, -2)]
    expected = np.pad(x.wide, [(max(a, 0), max(b, 0)) for a, b in widths], constant_values=7)
    expected = expected[tuple(slice(max(-a, 0), expected.shape[i] + min(b, 0)) for i, (a, b) in enumerate(widths))]
    out = room(expected.shape, "float16")
    call("aclnnConstantPadNd", x.tensor, ints(*pads), scalar(7), out.tensor)
    same(out, expected)


def test_turns(rng):
    x, out = drawn(rng, (4, 5), "float32", turn), room((5, 4), "float32")
    call("aclnnFlip", x.tensor, ints(0, -1), out.tensor)
    same(out, x.wide[::-1, ::-1])
    for shifts, dims in (((2, -1), (0, 1)), ((7,), (1,)), ((3,), ())):
        call("aclnnRoll", x.tensor, ints(*shifts), ints(*dims), out.tensor)
        same(out, np.roll(x.wide, shifts if dims else shifts[0], dims or None))


@pytest.mark.parametrize("dtype", [*DTYPES, "int32"])
def test_fills(dtype):
    out = room((2, 3), dtype, turn)
    call("aclnnInplaceZero", out.tensor)
    same(out, np.zeros((3, 2)))
    call("aclnnInplaceOne", out.tensor)
    same(out, np.ones((3, 2)))
    call("aclnnInplaceFillScalar", out.tensor, scalar(5))
    same(out, np.full((3, 2), 5))
    call("aclnnInplaceFillTensor", out.tensor, Numbers([9], "int64").tensor)
    same(out, np.full((3, 2), 9))
    square = Numbers(np.arange(12).reshape(3, 4), dtype)
    for diagonal in (-1, 0, 2):
        kept = room((3, 4), dtype)
        call("aclnnTril", square.tensor, diagonal, kept.tensor)
        same(kept, np.tril(square.wide, diagonal))
        call("aclnnTriu", square.tensor, diagonal, kept.tensor)
        same(kept, np.triu(square.wide, diagonal))
    eye = room((3, 4), dtype)
    call("aclnnEye", 3, 4, eye.tensor)
    same(eye, np.eye(3, 4))


def test_ranges():
    out = room((4,), "float32")
    call("aclnnArange", scalar(1.0), scalar(2.0), scalar(0.25), out.tensor)
    same(out, [1, 1.25, 1.5, 1.75])
    call(
        "aclnnArange",
        scalar(3, "int64"),
        scalar(-1, "int64"),
        scalar(-1, "int64"),
        (whole := room((4,), "int64")).tensor,
    )
    same(whole, [3, 2, 1, 0])
    call("aclnnLinspace", scalar(0), scalar(3), 4, out.tensor)
    same(out, [0, 1, 2, 3])
    with pytest.raises(Refused, match="aclnnArange: from 0 to 1 by -1"):
        call("aclnnArange", scalar(0), scalar(1), scalar(-1), out.tensor)

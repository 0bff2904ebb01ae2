"""Convolution and resizing of the Ascend host, held to NumPy in float64."""

from ctypes import c_int, c_int8

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, Tensor, call, call_legacy, ints
from ascend_numbers import DTYPES, bools, close, drawn, room

KEEP, HF32 = c_int8(0), c_int8(3)


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def shifted(x, kernel, stride, pads, dilation):
    """Taps (kernel rows, kernel columns) of a padded input: what each meets, (N, C, out rows, out columns)."""
    top, bottom, left, right = pads
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    sides = [padded.shape[2 + i] - dilation[i] * (kernel[i] - 1) for i in range(2)]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y, z = i * dilation[0], j * dilation[1]
            yield i, j, padded[:, :, y : y + sides[0] : stride[0], z : z + sides[1] : stride[1]]


def convolved(x, weight, stride, pads, dilation, groups):
    filters, own = weight.shape[:2]
    total = 0
    for i, j, seen in shifted(x, weight.shape[2:], stride, pads, dilation):
        split = seen.reshape(len(x), groups, own, *seen.shape[2:])
        kernel = weight[:, :, i, j].reshape(groups, filters // groups, own)
        total = total + np.einsum("ngchw,gfc->ngfhw", split, kernel).reshape(len(x), filters, *seen.shape[2:])
    return total


CASES = {
    "same": ((2, 4, 7, 6), (6, 4, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "patches": ((2, 4, 8, 6), (5, 4, 2, 2), (2, 2), (0, 0), (1, 1), 1),
    "depthwise": ((1, 4, 8, 6), (4, 1, 2, 2), (2, 2), (0, 0), (1, 1), 4),
    "groups": ((2, 6, 9, 8), (4, 3, 3, 2), (2, 1), (2, 1), (2, 3), 2),
    "uneven": ((1, 3, 6, 6), (2, 3, 3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    "point": ((1, 5, 3, 3), (2, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "wide": ((1, 1, 2, 2), (1, 1, 3, 3), (1, 1), (5, 5), (1, 1), 1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_convolution_and_gradients(name, dtype, rng):
    shape, kernel, stride, pads, dilation, groups = CASES[name]
    x = drawn(rng, shape, dtype, lambda array: array[:, :, ::-1])
    weight, bias = drawn(rng, kernel, dtype), drawn(rng, kernel[:1], dtype)
    four = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    expected = convolved(x.wide, weight.wide, stride, four, dilation, groups)
    out = room(expected.shape, dtype)
    lists = [ints(*stride), ints(*pads), ints(*dilation)]
    call("aclnnConvolution", x.tensor, weight.tensor, bias.tensor, *lists, False, ints(0, 0), groups, out.tensor, KEEP)
    close(out, expected + bias.wide[:, None, None])

    dy, dx, dw, db = drawn(rng, out.held.shape, dtype), room(shape, dtype), room(kernel, dtype), room(kernel[:1], dtype)
    call("aclnnConvolutionBackward", dy.tensor, x.tensor, weight.tensor, ints(kernel[0]), *lists, False, ints(0, 0),
         c_int(groups), bools(True, True, True), KEEP, dx.tensor, dw.tensor, db.tensor)  # fmt: skip
    close(db, dy.wide.sum((0, 2, 3)))
    # The convolution is linear in either operand, so that its gradient is what every unit of the operand gives.
    rules = stride, four, dilation, groups
    if dtype == "float32":
        units = np.eye(x.wide.size).reshape(-1, *shape)
        found = [(convolved(unit, weight.wide, *rules) * dy.wide).sum() for unit in units]
        close(dx, np.reshape(found, shape))
    units = np.eye(weight.wide.size).reshape(-1, *kernel)
    close(dw, np.reshape([(convolved(x.wide, unit, *rules) * dy.wide).sum() for unit in units], kernel))


def test_many_pieces(rng):
    """More columns than a piece holds, in both directions."""
    x, weight = drawn(rng, (1, 40, 120, 130), "float32"), drawn(rng, (3, 40, 3, 3), "float32")
    expected = convolved(x.wide, weight.wide, (1, 1), (1,) * 4, (1, 1), 1)
    out, dx, dw = room(expected.shape, "float32"), room(x.held.shape, "float32"), room(weight.held.shape, "float32")
    lists = [ints(1, 1), ints(1, 1), ints(1, 1)]
    call("aclnnConvolution", x.tensor, weight.tensor, None, *lists, False, ints(0, 0), 1, out.tensor, KEEP)
    close(out, expected)
    dy = drawn(rng, out.held.shape, "float32")
    call("aclnnConvolutionBackward", dy.tensor, x.tensor, weight.tensor, ints(3), *lists, False, ints(0, 0), c_int(1),
         bools(True, True, False), KEEP, dx.tensor, dw.tensor, None)  # fmt: skip
    turned = weight.wide[:, :, ::-1, ::-1].swapaxes(0, 1)  # at stride 1 the gradient is a convolution with it
    close(dx, convolved(dy.wide, turned, (1, 1), (1,) * 4, (1, 1), 1))
    kernel = [(seen * 1.0, i, j) for i, j, seen in shifted(x.wide, (3, 3), (1, 1), (1,) * 4, (1, 1))]
    for seen, i, j in kernel:
        np.testing.assert_allclose(dw.wide[:, :, i, j], np.einsum("nfhw,nchw->fc", dy.wide, seen), rtol=1e-4, atol=2e-3)


def test_hf32_narrows_the_operands(rng):
    x, weight = drawn(rng, (1, 4, 5, 5), "float32"), drawn(rng, (2, 4, 3, 3), "float32")
    expected = convolved(x.wide, weight.wide, (1, 1), (1,) * 4, (1, 1), 1)
    out = room(expected.shape, "float32")
    for math, least, most in ((KEEP, 0, 1e-6), (HF32, 1e-5, 2e-3)):
        call("aclnnConvolution", x.tensor, weight.tensor, None, ints(1, 1), ints(1, 1), ints(1, 1), False, ints(0, 0),
             1, out.tensor, math)  # fmt: skip
        error = np.linalg.norm(out.wide - expected) / np.linalg.norm(expected)
        assert least <= error <= most


@pytest.mark.parametrize("dtype", [*DTYPES, "uint8"])
@pytest.mark.parametrize("size", [(8, 10), (5, 7), (3, 2)])
def test_nearest_neighbours(size, dtype, rng):
    x, out = drawn(rng, (2, 3, 4, 5), dtype, lambda array: array[..., ::-1]), room((2, 3, *size), dtype)
    call("aclnnUpsampleNearest2d", x.tensor, ints(*size), out.tensor)
    rows, columns = (np.arange(to) * side // to for side, to in zip((4, 5), size))
    assert (out.wide == x.wide[:, :, rows[:, None], columns]).all()
    if dtype == "uint8":
        return
    dy, dx = drawn(rng, out.held.shape, dtype), room((2, 3, 4, 5), dtype)
    call("aclnnUpsampleNearest2dBackward", dy.tensor, ints(*size), ints(2, 3, 4, 5), 0.0, 0.0, dx.tensor)
    expected = np.zeros((2, 3, 4, 5))
    np.add.at(expected, (slice(None), slice(None), rows[:, None], columns), dy.wide)
    close(dx, expected)


def test_what_cann_refuses(rng):
    x, weight, out = (drawn(rng, shape, "float16") for shape in ((1, 4, 6, 6), (4, 4, 3, 3), (1, 4, 6, 6)))

    def refused(match, x=x, weight=weight, bias=None, stride=(1, 1), pads=(1, 1), transposed=False, groups=1, out=out,
                math=KEEP):  # fmt: skip
        with pytest.raises(Refused, match=match):
            call("aclnnConvolution", x.tensor, weight.tensor, bias and bias.tensor, ints(*stride), ints(*pads),
                 ints(1, 1), transposed, ints(0, 0), groups, out.tensor, math)  # fmt: skip

    refused("no transposed", transposed=True)
    refused("2 groups of 4 channels for an input of 4", groups=2)
    refused("a stride of 64", stride=(64, 1))
    refused("a padding of 256", pads=(256, 1))
    refused("larger than the padded", weight=drawn(rng, (4, 4, 9, 9), "float16"))
    refused("output has the shape", pads=(0, 0))
    refused("bias and weight are", bias=drawn(rng, (4,), "float32"))
    brain = drawn(rng, (1, 4, 6, 6), BF16)
    refused("bfloat16 meets float16|float16 meets bfloat16", x=brain)
    with pytest.raises(Refused, match="the larger image has the shape"):
        call("aclnnUpsampleNearest2d", x.tensor, ints(12, 13), room((1, 4, 12, 12), "float16").tensor)


@pytest.mark.parametrize("name", ["same", "groups", "uneven"])
def test_the_older_interface_computes_the_same(name, rng):
    """Lists of four, two gradients as operators of their own, whose shapes come as a tensor."""
    shape, kernel, stride, pads, dilation, groups = CASES[name]
    four = pads if len(pads) == 4 else (pads[0], pads[0], pads[1], pads[1])
    x, weight = drawn(rng, shape, "float32"), drawn(rng, kernel, "float32")
    expected = convolved(x.wide, weight.wide, stride, four, dilation, groups)
    out, dy = room(expected.shape, "float32"), drawn(rng, expected.shape, "float32")
    rules = {"strides": [1, 1, *stride], "pads": list(four), "dilations": [1, 1, *dilation], "groups": groups}
    rules["data_format"] = "NCHW"
    call_legacy("Conv2D", [x.tensor, weight.tensor], [out.tensor], **rules)
    close(out, expected)

    dx, dw, dx_now, dw_now = (room(side, "float32") for side in (shape, kernel, shape, kernel))
    lists = [ints(*stride), ints(*four), ints(*dilation)]
    call("aclnnConvolutionBackward", dy.tensor, x.tensor, weight.tensor, ints(kernel[0]), *lists, False, ints(0, 0),
         c_int(groups), bools(True, True, False), KEEP, dx_now.tensor, dw_now.tensor, None)  # fmt: skip
    call_legacy("Conv2DBackpropInput", [Tensor(np.array(shape)), weight.tensor, dy.tensor], [dx.tensor], **rules)
    call_legacy("Conv2DBackpropFilter", [x.tensor, Tensor(np.array(kernel)), dy.tensor], [dw.tensor], **rules)
    assert (dx.held == dx_now.held).all() and (dw.held == dw_now.held).all()
    with pytest.raises(Refused, match="convolves NCHW alone"):
        call_legacy("Conv2D", [x.tensor, weight.tensor], [out.tensor], **{**rules, "data_format": "NHWC"})

"""Norms and softmax of the Ascend host, held to NumPy in float64."""

import numpy as np
import pytest
from ascend_kernels import BF16, Refused, Tensor, call, ints
from ascend_numbers import DTYPES, bools, close, drawn, room

EPS = 1e-5
SINGLE = "float32"


@pytest.fixture
def rng():
    return np.random.default_rng(6)


def statistics(x, axes):
    mean = x.mean(axes, keepdims=True)
    return mean, 1 / np.sqrt(x.var(axes, keepdims=True) + EPS)


def gradients(dy, unit, rstd, weight, axes):
    """Gradient of unit * weight at x, where unit = (x - mean) * rstd."""
    g = dy * weight
    return rstd * (g - g.mean(axes, keepdims=True) - unit * (g * unit).mean(axes, keepdims=True))


def upside_down(array):
    return array[::-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [None, SINGLE, "own"])
@pytest.mark.parametrize("last", [1, 2])
def test_layer_norm(last, affine, dtype, rng):
    shape = (3, 4, 40)
    x = drawn(rng, shape, dtype, upside_down)
    normal, axes = shape[-last:], tuple(range(3 - last, 3))
    weight = bias = None
    if affine:
        weight, bias = (drawn(rng, normal, dtype if affine == "own" else SINGLE) for _ in range(2))
    out = room(shape, dtype)
    rows = (3, 4, 1) if last == 1 else (3, 1, 1)
    mean, rstd = room(rows, SINGLE), room(rows, SINGLE)
    given = [tensor and tensor.tensor for tensor in (weight, bias)]
    call("aclnnLayerNorm", x.tensor, ints(*normal), *given, EPS, out.tensor, mean.tensor, rstd.tensor)
    centre, scale = statistics(x.wide, axes)
    unit = (x.wide - centre) * scale
    w, b = (weight.wide, bias.wide) if weight else (1.0, 0.0)
    close(out, unit * w + b)
    close(mean, centre)
    close(rstd, scale)

    dy, dx = drawn(rng, shape, dtype), room(shape, dtype)
    dw, db = room(normal, SINGLE), room(normal, SINGLE)
    call("aclnnLayerNormBackward", dy.tensor, x.tensor, ints(*normal), mean.tensor, rstd.tensor, *given,
         bools(True, True, True), dx.tensor, dw.tensor, db.tensor)  # fmt: skip
    over = tuple(range(3 - last))
    close(dx, gradients(dy.wide, unit, scale, w, axes))
    close(dw, (dy.wide * unit).sum(over))
    close(db, dy.wide.sum(over))


def test_gradient_of_layer_norm_is_its_slope(rng):
    """A difference quotient knows nothing of the formula."""
    x, direction, dy = (rng.standard_normal((2, 8)) for _ in range(3))
    w = rng.standard_normal(8)

    def forward(at):
        mean, scale = statistics(at, 1)
        return ((at - mean) * scale * w * dy).sum()

    mean, scale = statistics(x, 1)
    found = (gradients(dy, (x - mean) * scale, scale, w, 1) * direction).sum()
    assert found == pytest.approx((forward(x + 1e-6 * direction) - forward(x - 1e-6 * direction)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("kinds", [(SINGLE,) * 3, ("float16",) * 3, (BF16,) * 3, ("float16", "float16", SINGLE),
                                   (SINGLE, BF16, SINGLE), ("float16", SINGLE, SINGLE)])  # fmt: skip
@pytest.mark.parametrize("bias", [None, "row", "all"])
def test_add_layer_norm(bias, kinds, rng):
    shape = (3, 2, 24)
    x1, x2 = drawn(rng, shape, kinds[0]), drawn(rng, shape, kinds[1])
    wide = kinds[0] if kinds[0] == kinds[1] else SINGLE
    gamma, beta = drawn(rng, shape[-1:], kinds[2]), drawn(rng, shape[-1:], kinds[2])
    more = bias and drawn(rng, shape if bias == "all" else shape[-1:], wide)
    y, total = room(shape, wide), room(shape, wide)
    mean, rstd = room((3, 2, 1), SINGLE), room((3, 2, 1), SINGLE)
    call("aclnnAddLayerNorm", x1.tensor, x2.tensor, gamma.tensor, beta.tensor, more and more.tensor, EPS, True,
         y.tensor, mean.tensor, rstd.tensor, total.tensor)  # fmt: skip
    x = x1.wide + x2.wide + (more.wide if more else 0)
    centre, scale = statistics(x, 2)
    close(y, (x - centre) * scale * gamma.wide + beta.wide)
    close(total, x)
    close(mean, centre)
    close(rstd, scale)
    if bias or kinds[0] != kinds[1]:
        return
    dy, dsum, dx = drawn(rng, shape, wide), drawn(rng, shape, wide), room(shape, wide)
    dgamma, dbeta = room(shape[-1:], SINGLE), room(shape[-1:], SINGLE)
    call("aclnnAddLayerNormGrad", dy.tensor, x1.tensor, x2.tensor, rstd.tensor, mean.tensor, gamma.tensor, dsum.tensor,
         dx.tensor, dgamma.tensor, dbeta.tensor)  # fmt: skip
    unit = (x - centre) * scale
    close(dx, gradients(dy.wide, unit, scale, gamma.wide, 2) + dsum.wide)
    close(dgamma, (dy.wide * unit).sum((0, 1)))
    close(dbeta, dy.wide.sum((0, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype, rng):
    shape = (3, 4, 40)
    x, gamma, other = drawn(rng, shape, dtype), drawn(rng, shape[-1:], dtype), drawn(rng, shape, dtype)
    y, rstd, total = room(shape, dtype), room((3, 4, 1), SINGLE), room(shape, dtype)

    def scale_of(values):
        return 1 / np.sqrt((values**2).mean(-1, keepdims=True) + EPS)

    call("aclnnAddRmsNorm", x.tensor, other.tensor, gamma.tensor, EPS, y.tensor, rstd.tensor, total.tensor)
    both = x.wide + other.wide
    close(y, both * scale_of(both) * gamma.wide)
    close(total, both)
    close(rstd, scale_of(both))
    call("aclnnRmsNorm", x.tensor, gamma.tensor, EPS, y.tensor, rstd.tensor)
    scale = scale_of(x.wide)
    close(y, x.wide * scale * gamma.wide)
    close(rstd, scale)
    dy, dx, dgamma = drawn(rng, shape, dtype), room(shape, dtype), room(shape[-1:], SINGLE)
    call("aclnnRmsNormGrad", dy.tensor, x.tensor, rstd.tensor, gamma.tensor, dx.tensor, dgamma.tensor)
    unit, g = x.wide * scale, dy.wide * gamma.wide
    close(dx, scale * (g - unit * (g * unit).mean(-1, keepdims=True)))
    close(dgamma, (dy.wide * unit).sum((0, 1)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 6, 4, 5), (2, 6, 9)])
def test_group_norm(shape, dtype, rng):
    n, channels, groups = shape[0], 6, 3
    pixels = int(np.prod(shape[2:]))
    x, gamma, beta = drawn(rng, shape, dtype), drawn(rng, (channels,), dtype), drawn(rng, (channels,), dtype)
    out, mean, rstd = room(shape, dtype), room((n, groups), dtype), room((n, groups), dtype)
    call("aclnnGroupNorm", x.tensor, gamma.tensor, beta.tensor, n, channels, pixels, groups, EPS, out.tensor,
         mean.tensor, rstd.tensor)  # fmt: skip
    split = x.wide.reshape(n, groups, channels // groups, pixels)
    centre, scale = statistics(split, (2, 3))
    unit = (split - centre) * scale
    w, b = (tensor.wide.reshape(groups, channels // groups, 1) for tensor in (gamma, beta))
    expected = (unit * w + b).reshape(shape)
    close(out, expected)
    close(mean, centre[..., 0, 0])
    close(rstd, scale[..., 0, 0])
    call("aclnnGroupNormSilu", x.tensor, gamma.tensor, beta.tensor, groups, EPS, out.tensor, mean.tensor, rstd.tensor)
    close(out, expected / (1 + np.exp(-expected)))

    dy, dx = drawn(rng, shape, dtype), room(shape, dtype)
    dgamma, dbeta = room((channels,), dtype), room((channels,), dtype)
    call("aclnnGroupNormBackward", dy.tensor, x.tensor, mean.tensor, rstd.tensor, gamma.tensor, n, channels, pixels,
         groups, bools(True, True, True), dx.tensor, dgamma.tensor, dbeta.tensor)  # fmt: skip
    # With the statistics as they were kept, in the input's dtype.
    centre, scale = (tensor.wide[..., None, None] for tensor in (mean, rstd))
    unit, grad = (split - centre) * scale, dy.wide.reshape(split.shape)
    close(dx, gradients(grad, unit, scale, w, (2, 3)).reshape(shape))
    close(dgamma, (grad * unit).sum((0, 3)).ravel())
    close(dbeta, grad.sum((0, 3)).ravel())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_softmax(dim, dtype, rng):
    x = drawn(rng, (4, 5, 6), dtype, lambda array: array.swapaxes(0, 2))
    y, dy, dx = room((6, 5, 4), dtype), drawn(rng, (6, 5, 4), dtype), room((6, 5, 4), dtype)
    powers = np.exp(x.wide - x.wide.max(dim, keepdims=True))
    expected = powers / powers.sum(dim, keepdims=True)
    call("aclnnSoftmax", x.tensor, dim, y.tensor)
    close(y, expected)
    call("aclnnSoftmaxBackward", dy.tensor, y.tensor, dim, dx.tensor)
    close(dx, (dy.wide - (dy.wide * y.wide).sum(dim, keepdims=True)) * y.wide)
    call("aclnnLogSoftmax", x.tensor, dim, y.tensor)
    close(y, np.log(expected))
    call("aclnnLogSoftmaxBackward", dy.tensor, y.tensor, dim, dx.tensor)
    close(dx, dy.wide - np.exp(y.wide) * dy.wide.sum(dim, keepdims=True))


def test_softmax_of_double_and_of_the_impossible(rng):
    x, y = drawn(rng, (3, 7), "float64"), room((3, 7), "float64")
    call("aclnnSoftmax", x.tensor, -1, y.tensor)
    powers = np.exp(x.wide)
    np.testing.assert_allclose(y.wide, powers / powers.sum(-1, keepdims=True), rtol=1e-14)
    x = drawn(rng, (1, 3), SINGLE)
    x.held[0, :2] = -np.inf
    y = room((1, 3), SINGLE)
    call("aclnnSoftmax", x.tensor, -1, y.tensor)
    assert y.wide.tolist() == [[0, 0, 1]]


def test_what_cann_refuses(rng):
    half, out = drawn(rng, (2, 3, 8), "float16"), room((2, 3, 8), "float16")
    single = drawn(rng, (8,), SINGLE)
    brain = drawn(rng, (8,), BF16)
    rows = room((2, 3, 1), SINGLE)
    with pytest.raises(Refused, match="are not the last sides"):
        call("aclnnLayerNorm", half.tensor, ints(7), None, None, EPS, out.tensor, None, None)
    with pytest.raises(Refused, match="weight or bias is bfloat16 for an input in float16"):
        call("aclnnLayerNorm", half.tensor, ints(8), brain.tensor, None, EPS, out.tensor, None, None)
    with pytest.raises(Refused, match="weight and bias are"):
        own = drawn(rng, (8,), "float16")
        call("aclnnLayerNorm", half.tensor, ints(8), own.tensor, single.tensor, EPS, out.tensor, None, None)
    with pytest.raises(Refused, match="x1, x2, gamma and yOut are float16 and float32"):
        call("aclnnAddRmsNorm", half.tensor, half.tensor, single.tensor, EPS, out.tensor, rows.tensor, out.tensor)
    with pytest.raises(Refused, match="self and gamma"):
        numbers = room((2, 1), "float16")
        call("aclnnGroupNorm", half.tensor, drawn(rng, (3,), SINGLE).tensor, None, 2, 3, 8, 1, EPS, out.tensor,
             numbers.tensor, numbers.tensor)  # fmt: skip
    with pytest.raises(Refused, match="do not fall into"):
        call("aclnnGroupNorm", half.tensor, None, None, 2, 3, 8, 2, EPS, out.tensor, rows.tensor, rows.tensor)
    with pytest.raises(Refused, match="self is int32"):
        call("aclnnSoftmax", Tensor(np.ones(3, np.int32)), 0, Tensor(np.ones(3, np.int32)))
    with pytest.raises(Refused, match="dim 3"):
        call("aclnnSoftmax", half.tensor, 3, out.tensor)

"""Gradients of the native kernels: against float64, and of a whole block against the mathematics."""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Parameter, Tensor

from mindsigma.models.dit.branches import whole_block
from mindsigma.ops.attention import prepare_keys
from mindsigma.ops.derivatives import seed
from mindsigma.ops.gradients import value_and_gradients
from mindsigma.ops.kernels import MATH, NATIVE, TRAINING, differentiable
from mindsigma.ops.native import direct
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph

pytestmark = pytest.mark.skipif(not native.load(), reason="there is no C++ compiler")


def drawn(number, *shape):
    return np.random.default_rng(number).standard_normal(shape).astype(np.float32)


# Of one element; less than a register tile; one row and column too many; several blocks of depth and of rows.
@pytest.mark.parametrize("rows, inputs, outputs", [(1, 1, 1), (7, 5, 3), (130, 49, 97), (4100, 33, 50), (65, 400, 801)])
def test_against_float64(rows, inputs, outputs):
    x, weight, gradient = drawn(0, rows, inputs), drawn(1, outputs, inputs), drawn(2, rows, outputs)
    exact, dy = gradient.astype(np.float64), Tensor(gradient)
    assert relative_error(native.gradient_of_input(dy, Tensor(weight)).asnumpy(), exact @ weight) < 1e-6
    assert relative_error(native.gradient_of_weight(dy, Tensor(x)).asnumpy(), exact.T @ x) < 1e-6
    assert relative_error(native.gradient_of_bias(dy).asnumpy(), exact.sum(0)) < 1e-6


def attended(q, k, v, kept, heads, gradient):
    """Gradients of attention in float64; kept (N, L) tells which keys there are."""
    split = lambda t: t.astype(np.float64).reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3)  # noqa: E731
    join = lambda t, like: t.transpose(0, 2, 1, 3).reshape(like.shape)  # noqa: E731
    qs, ks, vs, dy = (split(t) for t in (q, k, v, gradient))
    scale = qs.shape[-1] ** -0.5
    scores = np.where(kept[:, None, None] > 0, qs @ ks.transpose(0, 1, 3, 2) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = dy @ vs.transpose(0, 1, 3, 2)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    return join(slopes @ ks, q), join(slopes.transpose(0, 1, 3, 2) @ qs, k), join(weights.transpose(0, 1, 3, 2) @ dy, v)


# Of one query and key; more than a block of queries, and of keys; a head wider than a panel.
@pytest.mark.parametrize(
    "queries, keys, heads, width", [(1, 1, 1, 8), (65, 300, 2, 72), (130, 801, 1, 20), (9, 50, 2, 130)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_against_float64(queries, keys, heads, width, masked):
    channels = heads * width
    q, k, v = 2 * drawn(0, 2, queries, channels), drawn(1, 2, keys, channels), drawn(2, 2, keys, channels)
    gradient, kept = drawn(3, 2, queries, channels), np.ones((2, keys), np.float32)
    if masked:
        kept[0, : keys // 2] = 0
        kept[1, keys - keys // 3 :] = 0
    expected = attended(q, k, v, kept, heads, gradient)
    keys_and_values = prepare_keys(Tensor(k), Tensor(v), Tensor(kept) if masked else None, heads, TRAINING)
    found = native.attention_gradient(Tensor(gradient), Tensor(q), *keys_and_values, heads, width**-0.5, masked)
    found = [value.asnumpy()[..., :channels] for value in found]
    if keys == 1:  # its weight is 1 whatever queries and keys are
        assert np.abs(found[0]).max() < 1e-6 and np.abs(found[1]).max() < 1e-6
        found, expected = found[2:], expected[2:]
    for value, exact in zip(found, expected):
        assert relative_error(value, exact) < 1e-5
        assert (value[exact == 0] == 0).all()  # of keys that are dropped


@pytest.mark.parametrize("images, tokens, inputs, outputs", [(1, 1, 4, 1), (2, 37, 50, 33), (3, 130, 96, 400)])
def test_modulated_linear_maps_against_float64(images, tokens, inputs, outputs):
    x, rows = drawn(0, images, tokens, inputs) + 0.5, drawn(1, images, 2, inputs)
    weight, gradient, eps = drawn(2, outputs, inputs), drawn(3, images, tokens, outputs), 1e-6
    x64, dy = x.astype(np.float64), gradient.astype(np.float64)
    inverse = 1 / np.sqrt(x64.var(-1, keepdims=True) + eps)
    normal = (x64 - x64.mean(-1, keepdims=True)) * inverse
    slope = dy @ weight
    of_rows = np.stack((slope.sum(1), (slope * normal).sum(1)), 1)
    of_weight = np.einsum("ntj,nti->ji", dy, normal * rows[:, 1:] + rows[:, :1])
    slope = slope * rows[:, 1:]
    of_x = slope - slope.mean(-1, keepdims=True) - normal * (slope * normal).mean(-1, keepdims=True)
    expected = of_x * inverse, of_rows, of_weight, dy.sum((0, 1))
    found = native.modulated_linear_gradient(*map(Tensor, (gradient, x, rows, weight)), eps)
    for value, exact in zip(found, expected):
        assert relative_error(value.asnumpy(), exact) < 5e-6
    if images > 1:  # one row for all: sums over them
        found = native.modulated_linear_gradient(*map(Tensor, (gradient, x, rows[:1], weight)), eps)[1].asnumpy()
        slope = dy @ weight
        exact = np.stack((slope.sum((0, 1)), (slope * normal).sum((0, 1))))
        assert relative_error(found[0], exact) < 5e-6


def test_updates_in_place_against_float64():
    size = 70001
    parameter, gradient, m, v = drawn(0, size), drawn(1, size), 0.1 * drawn(2, size), np.abs(drawn(3, size))
    tensors = [Tensor(array.copy()) for array in (parameter, gradient, m, v)]
    direct.update_adamw(*tensors, 0.5, 0.99, 1e-2, 0.9, 0.99, 1e-6)
    p64, g64, m64, v64 = (array.astype(np.float64) for array in (parameter, 0.5 * gradient, m, v))
    m64, v64 = 0.9 * m64 + 0.1 * g64, 0.99 * v64 + 0.01 * g64 * g64
    p64 = 0.99 * p64 - 1e-2 * m64 / (np.sqrt(v64) + 1e-6)
    for tensor, exact in zip(tensors, (p64, gradient, m64, v64)):
        assert relative_error(tensor.asnumpy(), exact) < 5e-7
    mean = Tensor(m.copy())
    direct.update_average(mean, Tensor(gradient), 0.9)
    assert relative_error(mean.asnumpy(), 0.9 * m.astype(np.float64) + 0.1 * gradient) < 1e-6
    direct.add_to(mean, Tensor(gradient))
    assert relative_error(mean.asnumpy(), 0.9 * m.astype(np.float64) + 1.1 * gradient) < 1e-6
    assert direct.sum_of_squares(tensors[1]) == pytest.approx(np.square(gradient, dtype=np.float64).sum(), rel=1e-12)


PRINTED = """
import hashlib
import numpy as np
from mindspore import Tensor
from mindsigma.ops.native import operations as native
native.load()
draw = np.random.default_rng(3).standard_normal
x, weight, dy = (Tensor(draw(shape).astype(np.float32)) for shape in ((500, 70), (90, 70), (500, 90)))
results = [native.gradient_of_input(dy, weight), native.gradient_of_weight(dy, x), native.gradient_of_bias(dy)]
q, k, v, dy = (Tensor(draw((1, n, 96)).astype(np.float32)) for n in (70, 500, 500, 70))
results += native.attention_gradient(dy, q, k, v, 3, 0.2, False)
rows, weight, dy = (Tensor(draw(shape).astype(np.float32)) for shape in ((1, 2, 96), (50, 96), (1, 500, 50)))
results += native.modulated_linear_gradient(dy, k, rows, weight, 1e-6)
print(hashlib.sha256(b"".join(result.asnumpy().tobytes() for result in results)).hexdigest())
"""


def test_threads_change_no_bit():
    root = Path(__file__).parent.parent
    found = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "MINDSIGMA_THREADS": threads, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", PRINTED], env=environment, capture_output=True, text=True, check=True
        )
        found.add(done.stdout.split()[-1])
    assert len(found) == 1


CHANNELS, HEADS = 24, 2
MASK = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], np.float32)


def gradients_of_block(kernels):
    shapes = [(6, CHANNELS)]
    for out, inputs in ((72, 24), (24, 24), (24, 24), (24, 24), (96, 24), (24, 96)):
        shapes += [(out, inputs), (out,)]
    weights = [Parameter(Tensor(0.3 * drawn(i, *shape)), name=f"w{i}") for i, shape in enumerate(shapes)]
    x, modulation = Tensor(drawn(20, 2, 12, CHANNELS)), Tensor(0.3 * drawn(21, 2, 6 * CHANNELS))
    k, v = (Tensor(drawn(number, 2, 5, CHANNELS)) for number in (22, 23))
    k, v = prepare_keys(k, v, Tensor(MASK), HEADS, differentiable(kernels))
    block = SharedGraph(whole_block, weights, (HEADS, kernels, False, None, 1, False, 4))
    last, gradient = SharedGraph(seed), Tensor(drawn(24, 2, 12, CHANNELS))

    def scalar():
        out = block(x, modulation, k, v, 3, 4)
        return last(out, gradient), out

    (_, out), found = value_and_gradients(scalar, weights, ())
    return [out.asnumpy(), *(value.asnumpy() for value in found)]


def test_a_block_has_the_gradients_of_the_mathematics():
    assert differentiable(NATIVE) == TRAINING and differentiable(MATH) == MATH
    for found, expected in zip(gradients_of_block(NATIVE), gradients_of_block(MATH)):
        assert np.abs(expected).max() > 0
        assert relative_error(found, expected) < 1e-5


def test_other_dtypes_are_left_to_the_mathematics():
    from mindsigma.ops.functional import linear

    x, weight = Tensor(drawn(0, 3, 4), ms.float16), Tensor(drawn(1, 5, 4), ms.float16)
    assert (linear(x, weight, None, TRAINING).asnumpy() == linear(x, weight, None, MATH).asnumpy()).all()

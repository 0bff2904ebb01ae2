"""Derivatives written by hand against those of the formulas in float64, and the chain rule over shared graphs."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Parameter, Tensor, ops

from mindsigma.ops.derivatives import GELU_CUBIC, GELU_SCALE, add_bias, attention, gelu, normalise, seed
from mindsigma.ops.gradients import value_and_gradients
from mindsigma.ops.shared_graph import SharedGraph

EPS = 1e-2  # large enough to matter


def central_differences(function, arguments, gradient, step=1e-6):
    """Gradients of sum(function(*arguments) * gradient) with respect to each argument, in float64."""
    arguments, results = [np.array(x, np.float64) for x in arguments], []
    for x in arguments:
        found = np.empty(x.shape)
        for place in np.ndindex(*x.shape):
            ends = []
            for sign in (1, -1):
                kept, x[place] = x[place], x[place] + sign * step
                ends.append(np.sum(function(*arguments) * gradient))
                x[place] = kept
            found[place] = (ends[0] - ends[1]) / (2 * step)
        results.append(found)
    return results


def biased(x, bias):
    return x + bias


def gelu_of(x):
    return x / (1 + np.exp(-(GELU_SCALE * x + GELU_CUBIC * x**3)))


def normalised(x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + EPS)


def attended(q, k, v):
    weights = np.exp(q @ k.swapaxes(-1, -2))
    return weights / weights.sum(-1, keepdims=True) @ v


def whole_attention(q, k, v):
    return attention(q, k, v, 1 << 24)


def attention_in_pieces(q, k, v):
    return attention(q, k, v, 30)  # of 7 queries 2 or 3 at once


def normalise_rows(x):
    return normalise(x, EPS)


QUERIES = ((2, 2, 7, 3), (2, 2, 5, 3), (2, 2, 5, 4))
CASES = {
    "bias": (add_bias, biased, ((5, 3), (3,))),
    "gelu": (gelu, gelu_of, ((5, 3),)),
    "normalise": (normalise_rows, normalised, ((5, 4),)),
    "attention": (whole_attention, attended, QUERIES),
    "attention in pieces": (attention_in_pieces, attended, QUERIES),
}


@pytest.mark.parametrize("case", CASES)
def test_derivatives(case):
    function, formula, shapes = CASES[case]
    random = np.random.default_rng(1)
    arguments = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
    expected = formula(*(x.astype(np.float64) for x in arguments))
    gradient = random.standard_normal(expected.shape).astype(np.float32)
    weights = [Parameter(Tensor(x), name=f"x{i}") for i, x in enumerate(arguments)]
    graph, last = SharedGraph(function, weights), SharedGraph(seed)

    def scalar(gradient):
        out = graph()
        return last(out, gradient), out

    (_, out), found = value_and_gradients(scalar, weights, (Tensor(gradient),))
    assert relative_error(out.asnumpy(), expected) < 1e-5
    for value, wanted in zip(found, central_differences(formula, arguments, gradient)):
        assert relative_error(value.asnumpy(), wanted) < 1e-5


def two_results(x, weight):
    return x * weight, x + weight


def joined(x, y, number):
    return (x * y).sum() * number, y


def test_chain_of_graphs():
    """Results used twice or not at all, a weight of two graphs, numbers among the inputs, weights in another dtype."""
    x, w = Tensor([1.0, 2.0], ms.float32), Parameter(Tensor([3.0, -1.0], ms.float32), name="w")
    half = SharedGraph(two_results, (w,), compute_dtype=ms.float16)
    first, second, last = SharedGraph(two_results, (w,)), SharedGraph(two_results, (w,)), SharedGraph(joined)

    def function(x):
        a, b = first(x)  # x w, x + w
        c, _ = second(a)  # x w²
        d, _ = half(Tensor([0.5, 0.5], ms.float16))  # w / 2
        value, _ = last(a, b, 2)
        more, _ = last(c, c, 1)
        final, _ = last(d, d, 1)
        return SharedGraph(total)(value, more, final), value

    (value, _), (found,) = value_and_gradients(function, [w], (x,))
    at, weight = x.asnumpy(), w.asnumpy()
    a, c = at * weight, at * weight**2
    assert float(value) == pytest.approx(float((2 * a * (at + weight) + c**2 + weight**2 / 4).sum()))
    expected = 2 * at * (at + weight) + 2 * a + 2 * c * 2 * at * weight + weight / 2
    assert found.dtype == ms.float32
    np.testing.assert_allclose(found.asnumpy(), expected, rtol=1e-6)


def total(*values):
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def test_a_parameter_without_part_in_the_result_is_an_error():
    w, other = (Parameter(ops.ones((2,), ms.float32), name=name) for name in ("w", "other"))
    graph, last = SharedGraph(two_results, (w,)), SharedGraph(joined)

    def function(x):
        return last(*graph(x), 1)

    with pytest.raises(RuntimeError, match="does not depend on other"):
        value_and_gradients(function, [w, other], (Tensor([1.0, 2.0], ms.float32),))

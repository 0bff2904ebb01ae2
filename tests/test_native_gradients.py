"""Gradients of linear maps on the native kernels: against float64, and of a whole block against the mathematics."""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Parameter, Tensor

from mindsigma.models.dit.block import whole_block
from mindsigma.ops.derivatives import seed
from mindsigma.ops.gradients import value_and_gradients
from mindsigma.ops.kernels import MATH, NATIVE, TRAINING, differentiable
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


PRINTED = """
import hashlib
import numpy as np
from mindspore import Tensor
from mindsigma.ops.native import operations as native
native.load()
draw = np.random.default_rng(3).standard_normal
x, weight, dy = (Tensor(draw(shape).astype(np.float32)) for shape in ((500, 70), (90, 70), (500, 90)))
results = native.gradient_of_input(dy, weight), native.gradient_of_weight(dy, x), native.gradient_of_bias(dy)
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


def gradients_of_block(kernels):
    shapes = [(6, CHANNELS)]
    for out, inputs in ((72, 24), (24, 24), (24, 24), (24, 24), (96, 24), (24, 96)):
        shapes += [(out, inputs), (out,)]
    weights = [Parameter(Tensor(0.3 * drawn(i, *shape)), name=f"w{i}") for i, shape in enumerate(shapes)]
    x, modulation = Tensor(drawn(20, 2, 12, CHANNELS)), Tensor(0.3 * drawn(21, 2, 6 * CHANNELS))
    k, v = (Tensor(drawn(number, 2, HEADS, 5, CHANNELS // HEADS)) for number in (22, 23))
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

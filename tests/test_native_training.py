"""A block of the DiT in training on the native kernels, and a whole network, against the mathematics."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from training_runs import tiny_dit

from mindsigma.models.dit.branches import caption_keys, whole_block
from mindsigma.models.dit.native_training import native_block, native_block_backward, native_block_keeping
from mindsigma.ops.derivatives import seed
from mindsigma.ops.gradients import value_and_gradients
from mindsigma.ops.kernels import MATH, NATIVE
from mindsigma.ops.native import operations as native
from mindsigma.ops.shared_graph import SharedGraph

pytestmark = pytest.mark.skipif(not native.load(), reason="there is no C++ compiler")

EPS = 1e-6


def drawn(number, *shape):
    return np.random.default_rng(number).standard_normal(shape).astype(np.float32)


def mathematics(x, modulation, caption, mask, height, width, heads, eps, qk_norm, sampling, factor, table, *weights):
    """What `native_block` computes, by the compositions of branches.py."""
    last = len(weights) - 4
    cross = last - 6
    k, v = caption_keys(caption, mask, heads, MATH, *weights[cross + 2 : cross + 4])
    rest = weights[cross : cross + 2] + weights[cross + 4 :]
    return whole_block(
        x, modulation, k, v, height, width, heads, MATH, qk_norm, sampling, factor, False, cross, table,
        *weights[:cross], *rest,
    )  # fmt: skip


def weights_of(channels, qk_norm=False, sampling=None, factor=1):
    """Parameters of a block, in the order of `native_block`."""
    affine = lambda out, inputs: [(out * channels, inputs * channels), (out * channels,)]  # noqa: E731
    norm = [(channels,), (channels,)]
    shapes = [(6, channels), *affine(3, 1), *affine(1, 1), *(2 * norm if qk_norm else ())]
    if sampling == "conv":
        shapes += [(channels, 1, factor, factor), (channels,), *norm]
    for out, inputs in ((1, 1), (2, 1), (1, 1), (4, 1), (1, 4)):
        shapes += affine(out, inputs)
    return [Parameter(Tensor(drawn(i, *shape) * shape[-1] ** -0.5), name=f"w{i}") for i, shape in enumerate(shapes)]


def results(function, keeping, images, tokens, channels, heads, length, mask, kind=(False, None, 1), grid=(0, 0)):
    """Output of a block as one shared graph, and the gradients of its inputs and weights."""
    weights = weights_of(channels, *kind)
    shapes = (images, tokens, channels), (images, 6 * channels), (images, length, channels)
    inputs = [Parameter(Tensor(0.5 * drawn(30 + i, *shape)), name=f"x{i}") for i, shape in enumerate(shapes)]
    block, last = SharedGraph(function, weights, (heads, EPS, *kind), None, keeping), SharedGraph(seed)
    gradient = Tensor(drawn(40, images, tokens, channels))
    copies = [SharedGraph(same, [value]) for value in inputs]  # so that they depend on Parameters

    def scalar():
        x, modulation, caption = (copy() for copy in copies)
        out = block(x, modulation, caption, None if mask is None else Tensor(mask), *grid)
        return last(out, gradient), out

    (_, out), found = value_and_gradients(scalar, inputs + weights, ())
    return [out.asnumpy(), *(value.asnumpy() for value in found)]


def same(x):
    """x, as a result of a graph."""
    return x * 1.0


def compare(found, expected):
    scale = max(np.linalg.norm(value) for value in expected[1:])
    for value, exact in zip(found, expected, strict=True):
        # Gradients that are 0 but for rounding, as that of the bias of keys, have no digits of their own.
        assert np.linalg.norm(value - exact) < 5e-6 * max(np.linalg.norm(exact), 1e-2 * scale)


KEEPING = (native_block_keeping, native_block_backward)


# One of everything; sizes that fill no tile; many keys; no mask.
@pytest.mark.parametrize("size", [(1, 1, 4, 1, 1), (2, 70, 60, 3, 9), (1, 401, 96, 2, 130), (3, 64, 144, 2, 24)])
@pytest.mark.parametrize("keeps", [True, False])
def test_a_block_against_the_mathematics(size, keeps):
    images, _, _, heads, length = size
    mask = None
    if length > 1:
        mask = np.ones((images, length), np.int32)
        mask[0, length // 2 :] = 0
    found = results(native_block, KEEPING if keeps else None, *size, mask)
    compare(found, results(mathematics, None, *size, mask))


# Grids of whole cells, and with rows and columns over; every way to make fewer keys and values.
@pytest.mark.parametrize(
    "qk_norm,sampling,factor,grid",
    [
        (True, None, 1, (5, 7)),
        (False, "conv", 2, (8, 6)),
        (True, "conv", 3, (7, 11)),
        (False, "pool", 2, (5, 9)),
        (True, "uniform", 2, (6, 5)),
        (False, "ave", 3, (9, 6)),
        (False, "uniform_every", 4, (5, 5)),
    ],
)
@pytest.mark.parametrize("keeps", [True, False])
def test_norms_and_fewer_keys_against_the_mathematics(qk_norm, sampling, factor, grid, keeps):
    size, kind = (2, grid[0] * grid[1], 72, 3, 9), (qk_norm, sampling, factor)
    found = results(native_block, KEEPING if keeps else None, *size, None, kind, grid)
    compare(found, results(mathematics, None, *size, None, kind, grid))


def network_results(kernels, recompute):
    """Output of a network whose second block is compressed, and the gradients of its weights."""
    dit, random = tiny_dit(kernels=kernels, kv_compression="conv:2:1-1"), np.random.default_rng(0)
    assert [block.learns_natively() for block in dit.blocks] == [kernels == NATIVE] * 2
    if recompute:
        for block in dit.blocks:
            block.recompute()
    latents = Tensor(random.standard_normal((2, 4, 8, 8)).astype(np.float32))
    caption = Tensor(random.standard_normal((2, 6, dit.config.caption_channels)).astype(np.float32))
    mask = Tensor(np.array([[1, 1, 1, 0, 0, 0], [1] * 6], np.int32))
    timestep, last = Tensor(np.array([3.0, 700.0], np.float32)), SharedGraph(seed)

    def scalar():
        out = dit(latents, timestep, caption, mask)
        return last(out, Tensor(np.ones(out.shape, np.float32))), out

    (_, out), gradients = value_and_gradients(scalar, dit.trainable_params(), ())
    return [out.asnumpy(), *(value.asnumpy() for value in gradients)]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_network_has_the_gradients_of_the_mathematics(recompute):
    found, expected = network_results(NATIVE, recompute), network_results(MATH, recompute)
    size = np.sqrt(sum(np.square(value, dtype=np.float64).sum() for value in expected[1:]))
    for value, exact in zip(found, expected):
        assert np.linalg.norm(value - exact) < 5e-6 * max(np.linalg.norm(exact), 1e-3 * size)

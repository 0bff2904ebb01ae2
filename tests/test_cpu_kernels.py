"""The CPU's kernels against float64."""

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, relative_error
from mindspore import Tensor

from mindsigma.backends.cpu import kernels
from mindsigma.backends.cpu.kernels import Rows
from mindsigma.backends.cpu.library import library
from mindsigma.errors import MindSigmaError

LIMIT = 2e-6

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler, or MINDSIGMA_NATIVE=0")


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def normalised(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


@pytest.mark.parametrize(
    "shape", [(2, 1, 8, 3), (2, 37, 50, 33), (1, 130, 801, 100), (3, 9, 48, 97), (1, 4200, 31, 16), (2, 300, 400, 900)]
)
def test_linear_maps_with_all_that_comes_with_them(shape):
    batch, length, inner, outer = shape
    x, weight, bias = drawn(0, batch, length, inner) + 0.5, drawn(1, outer, inner) / inner**0.5, drawn(2, outer)
    before, after = drawn(3, batch, 6, inner), drawn(4, batch, 6, outer)
    residual, norm_weight = drawn(5, batch, length, outer), drawn(6, inner)
    t = {name: Tensor(value) for name, value in locals().items() if isinstance(value, np.ndarray)}
    x64, w64 = x.astype(np.float64), weight.astype(np.float64).T

    def error(expected, **options):
        weights = t["weight"], options.pop("bias", t["bias"])
        return relative_error(kernels.linear(t["x"], *weights, **options).asnumpy(), expected)

    assert error(x64 @ w64 + bias) < LIMIT
    modulated = normalised(x64, 1e-6) * before[:, 4:5] + before[:, 3:4]
    kept = kernels.empty(batch, length, outer)
    rows = Rows.of(t["before"])
    assert error(gelu(modulated @ w64 + bias), rows=rows, norm_row=3, eps=1e-6, gelu=True, kept=kept) < LIMIT
    assert relative_error(kept.asnumpy(), modulated @ w64 + bias) < LIMIT
    found = {"rows": Rows.of(t["after"]), "gate_row": 5, "residual": t["residual"]}
    assert error(residual + after[:, 5:6] * (x64 @ w64 + bias), **found) < LIMIT
    one = normalised(x64, 1e-6) * before[:1, 4:5] + before[:1, 3:4]  # a row for all
    assert error(one @ w64 + bias, rows=Rows.of(t["before"][:1]), norm_row=3, eps=1e-6) < LIMIT
    rms = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * norm_weight
    options = {"norm_weight": t["norm_weight"], "eps": 1e-6, "gelu": True, "factor": t["residual"], "bias": None}
    assert error(gelu(rms @ w64) * residual, **options) < LIMIT


def test_gelu_over_its_whole_range():
    """Through an identity; what is not a number stays none."""
    x = np.concatenate([np.linspace(-100, 100, 4001), [0.0, 1e-30, -1e-30]]).astype(np.float32).reshape(1, -1, 1)
    one = Tensor(np.ones((1, 1), np.float32))
    found = kernels.linear(Tensor(x), one, gelu=True).asnumpy().astype(np.float64)
    expected = gelu(x.astype(np.float64))
    assert np.abs(found - expected).max() < 5e-6
    near = np.abs(x) < 3
    assert (np.abs(found - expected)[near] <= 1e-6 * np.abs(expected[near]) + 1e-12).all()
    x[0, 7, 0] = np.nan
    assert np.isnan(kernels.linear(Tensor(x), one, gelu=True).asnumpy()[0, 7, 0])


def attended(q, k, v, heads, scale, kept=None, bias=None):
    """Attention in float64."""
    batch, length, channels = q.shape
    q, k, v = (t.astype(np.float64).reshape(batch, t.shape[1], heads, -1).transpose(0, 2, 1, 3) for t in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * scale
    if kept is not None:
        scores = np.where(kept[:, None, None] > 0, scores, -np.inf)
    scores = scores if bias is None else scores + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(batch, length, channels)


@pytest.mark.parametrize(
    "queries, keys, heads, width", [(1, 1, 1, 8), (300, 420, 2, 72), (13, 801, 3, 20), (9, 50, 1, 130)]
)
def test_attention(queries, keys, heads, width):
    channels = heads * width
    q, k, v = drawn(0, 2, queries, channels) * 3, drawn(1, 2, keys, channels), drawn(2, 2, keys, channels)
    kept = np.zeros((2, keys), np.float32)
    kept[0, keys // 2] = 1  # all but one are dropped
    kept[1, : keys - keys // 3] = 1
    tensors, scale = tuple(map(Tensor, (q, k, v))), width**-0.5
    for mask in (None, kept):
        found = kernels.attention(*tensors, heads, scale, mask).asnumpy()
        assert relative_error(found, attended(q, k, v, heads, scale, mask)) < LIMIT
    dropped = kernels.attention(*tensors, heads, scale, np.zeros_like(kept)).asnumpy()  # all, so that none is
    assert relative_error(dropped, attended(q, k, v, heads, scale)) < LIMIT
    for images in (1, 2):
        bias = drawn(3, images, heads, queries, keys)
        bias[..., : keys // 2] = -1e9
        found = kernels.attention(*tensors, heads, 1.0, bias=Tensor(bias)).asnumpy()
        assert relative_error(found, attended(q, k, v, heads, 1.0, bias=bias)) < LIMIT


def test_attention_of_columns():
    qkv = drawn(0, 2, 77, 3 * 144)
    columns = [kernels.memory(Tensor(qkv)).columns(144 * i, 144) for i in range(3)]
    found = kernels.attention(*columns, 2, 72**-0.5).asnumpy()
    assert relative_error(found, attended(*np.split(qkv, 3, -1), 2, 72**-0.5)) < LIMIT


@pytest.mark.parametrize("height, width", [(5, 50), (7, 97), (64, 90)])
def test_group_norm(height, width):
    x, weight, bias = drawn(0, 2, 6, height, width) + 2, drawn(1, 6), drawn(2, 6)
    for silu in (False, True):
        source = Tensor(x)
        found = kernels.group_norm(source, 3, Tensor(weight), Tensor(bias), 1e-6, silu)
        expected = normalised(x.astype(np.float64).reshape(2, 3, -1), 1e-6).reshape(x.shape)
        expected = expected * weight[:, None, None] + bias[:, None, None]
        expected = expected / (1 + np.exp(-expected)) if silu else expected
        assert relative_error(found.asnumpy(), expected) < LIMIT
        over = kernels.group_norm(source, 3, Tensor(weight), Tensor(bias), 1e-6, silu, out=source)
        assert over is source and (over.asnumpy() == found.asnumpy()).all()


def convolved(x, kernel, bias, residual):
    """Convolution in float64 that keeps the size."""
    side = kernel.shape[-1]
    border = side // 2
    padded = np.pad(x, ((0, 0), (0, 0), (border, border), (border, border))).astype(np.float64)
    result = residual + bias[:, None, None].astype(np.float64)
    for i in range(side):
        for j in range(side):
            shifted = padded[:, :, i : i + x.shape[2], j : j + x.shape[3]]
            result = result + np.einsum("oi,nihw->nohw", kernel[:, :, i, j], shifted)
    return result


# The last four are computed by Winograd's filtering: whole tiles, parts of tiles, one row of tiles, several images.
@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize(
    "images, inner, outer, height, width, side",
    [
        (2, 6, 11, 2, 2, 3), (2, 40, 11, 8, 98, 3), (2, 6, 11, 6, 50, 1), (1, 300, 9, 4, 98, 1),
        (1, 16, 16, 64, 64, 3), (1, 19, 21, 62, 118, 3), (1, 16, 18, 4, 1200, 3), (3, 70, 24, 46, 52, 3),
    ],
)  # fmt: skip
def test_convolutions(images, inner, outer, height, width, side, enlarge):
    kernel, bias = drawn(3, outer, inner, side, side), drawn(4, outer)
    x = drawn(0, images, inner, height // 2, width // 2) if enlarge else drawn(0, images, inner, height, width)
    residual = drawn(5, images, outer, height, width)
    big = x.repeat(2, 2).repeat(2, 3) if enlarge else x
    for added in (residual, None):
        tensors = Tensor(x), Tensor(kernel), Tensor(bias), None if added is None else Tensor(added)
        found = kernels.convolution(*tensors, enlarge).asnumpy()
        assert relative_error(found, convolved(big, kernel, bias, 0 if added is None else added)) < LIMIT


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="float32"):
        kernels.linear(Tensor(np.ones((2, 3), np.float16)), Tensor(np.ones((4, 3), np.float32)))
    with pytest.raises(ValueError, match="does not fit"):
        kernels.linear(Tensor(drawn(0, 2, 3)), Tensor(drawn(1, 4, 5)))


def test_without_rows():
    weight, bias = Tensor(drawn(0, 5, 3)), Tensor(drawn(1, 5))
    assert kernels.linear(Tensor(np.empty((0, 7, 3), np.float32)), weight, bias).shape == (0, 7, 5)
    none, some = np.empty((2, 0, 4), np.float32), drawn(2, 2, 6, 4)
    assert kernels.attention(none, some, some, 2, 1.0).shape == (2, 0, 4)
    with pytest.raises(MindSigmaError, match="without keys"):
        kernels.attention(some, none, none, 2, 1.0)
    image = Tensor(np.empty((0, 3, 8, 8), np.float32))
    assert kernels.convolution(image, Tensor(drawn(3, 5, 3, 3, 3)), bias).shape == (0, 5, 8, 8)


def test_a_fork_while_a_kernel_runs():
    """Or after one has run: the child has threads of its own."""
    x, weight = drawn(0, 2, 512, 256), drawn(1, 512, 256)
    expected = kernels.linear(x, weight).asnumpy()
    child = os.fork()
    if child == 0:
        out = np.empty_like(expected)
        kernels.linear(x, weight, out=out)
        os._exit(int((out != expected).any()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def printed_bits():
    """Of results that many threads share."""
    x = kernels.linear(drawn(0, 2, 200, 144), drawn(1, 432, 144))
    columns = [kernels.memory(x).columns(144 * i, 144) for i in range(3)]
    results = [x, kernels.attention(*columns, 2, 0.1)]
    for outer, height, width in ((8, 20, 60), (16, 64, 128)):
        image = kernels.group_norm(drawn(2, 1, 32, height, width), 4, drawn(3, 32), drawn(4, 32), 1e-6, True)
        results.append(kernels.convolution(image, drawn(5, outer, 32, 3, 3), drawn(6, outer)))
    results += kernels.modulated_gradient(drawn(7, 2, 200, 90), drawn(8, 2, 200, 144), drawn(9, 2, 2, 144), 0,
                                          drawn(10, 90, 144), 1e-6)  # fmt: skip
    print(sum(int(value.asnumpy().view(np.uint32).astype(np.uint64).sum()) for value in results))


def test_threads_change_no_bit():
    command = [sys.executable, "-c", "import test_cpu_kernels; test_cpu_kernels.printed_bits()"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    found = set()
    for threads in ("1", "2"):
        environment = {**os.environ, "MINDSIGMA_THREADS": threads, "PYTHONPATH": path}
        found.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1

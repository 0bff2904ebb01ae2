"""The stand-ins of Ascend's kernels against float64, and the mask that rides in the heads, in fp16 as an NPU has it."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor

from mindsigma import MindSigmaError
from mindsigma.models.dit.ascend_block import caption_keys
from mindsigma.models.dit.heads import head_width, widen_tokens
from mindsigma.ops import ascend
from mindsigma.ops.kernels import STAND_IN

HEADS, HEAD_DIM = 2, 72
CHANNELS = HEADS * HEAD_DIM


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attention(q, k, v, keep=None):
    """Closed form in float64 for (N, S, C)."""
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(HEAD_DIM)
    if keep is not None:
        scores = np.where(keep[:, None, None, :] > 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], -1, HEADS * out.shape[-1])


def narrow(x):
    return x.reshape(*x.shape[:2], HEADS, -1)[..., :HEAD_DIM].reshape(*x.shape[:2], CHANNELS)


@pytest.mark.parametrize(("dtype", "limit"), [(ms.float32, 1e-5), (ms.float16, 1e-3)])
def test_attention_on_wider_heads_is_attention(dtype, limit):
    q, k, v = draw(2, 33, CHANNELS), draw(2, 17, CHANNELS, seed=1), draw(2, 17, CHANNELS, seed=2)
    assert head_width(HEAD_DIM) == head_width(HEAD_DIM, True) == 80 and head_width(64) == 64
    wide = [widen_tokens(Tensor(x).astype(dtype), HEADS, HEAD_DIM, 80) for x in (q, k, v)]
    out = ascend.flash_attention(*wide, HEADS, HEAD_DIM**-0.5, STAND_IN)
    assert out.dtype == dtype and out.shape == (2, 33, HEADS * 80)
    assert relative_error(narrow(out.astype(ms.float32).asnumpy()), attention(q, k, v)) < limit


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_dropped_key_weighs_nothing_in_fp16(size):
    """Also where logits are large, also beside a single key that is kept; everything stays inside fp16's range."""
    caption = Tensor(draw(2, 16, CHANNELS)).astype(ms.float16)
    keep = np.ones((2, 16), np.int32)
    keep[0, 5:], keep[1, 1:] = 0, 0
    weight, bias = draw(2 * CHANNELS, CHANNELS, seed=3) * size / CHANNELS**0.5, np.zeros(2 * CHANNELS, np.float32)
    weights = [Tensor(x).astype(ms.float16) for x in (weight, bias)]
    k, v = caption_keys(caption, Tensor(keep), HEADS, STAND_IN, *weights)
    plain, values = caption_keys(caption, None, HEADS, STAND_IN, *weights)
    k, v, plain, values = (x.astype(ms.float32).asnumpy() for x in (k, v, plain, values))
    assert np.isfinite(k).all() and np.abs(k).max() < 65504 / 2
    assert (narrow(k) == narrow(plain)).all() and (v == values).all()
    q = draw(2, 9, CHANNELS, seed=4) * size
    wide = widen_tokens(Tensor(q).astype(ms.float16), HEADS, HEAD_DIM, 80, 1.0)
    half = [Tensor(x).astype(ms.float16) for x in (k, v)]
    out = ascend.flash_attention(wide, *half, HEADS, HEAD_DIM**-0.5, STAND_IN).astype(ms.float32).asnumpy()
    changed = v.copy()
    changed[keep == 0] = 100.0
    half[1] = Tensor(changed).astype(ms.float16)
    again = ascend.flash_attention(wide, *half, HEADS, HEAD_DIM**-0.5, STAND_IN).astype(ms.float32).asnumpy()
    assert (out == again).all()  # exactly nothing
    q16 = q.astype(np.float16).astype(np.float32)
    assert relative_error(narrow(out), attention(q16, narrow(plain), narrow(values), keep)) < 2e-3


@pytest.mark.parametrize(("dtype", "limit"), [(ms.float32, 1e-5), (ms.float16, 1e-3)])
def test_pointwise_stand_ins(dtype, limit):
    x, gamma, beta = draw(2, 5, 48), draw(48, seed=1), draw(48, seed=2)
    given = [Tensor(value).astype(dtype) for value in (x, gamma, beta)]
    x, gamma, beta = (value.astype(ms.float32).asnumpy().astype(np.float64) for value in given)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    rms = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * gamma
    gelu = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    weight = draw(7, 48, seed=3)
    cases = {
        "norm": (ascend.layer_norm(*given, 1e-6, STAND_IN), normed * gamma + beta),
        "rms": (ascend.rms_norm(given[0], given[1], 1e-6, STAND_IN), rms),
        "gelu": (ascend.gelu(given[0], STAND_IN), gelu),
        "add": (ascend.multiply_add(given[2], given[0], given[1], STAND_IN), beta + x * gamma),
        "dense": (
            ascend.dense(
                given[0], Tensor(weight).astype(dtype), Tensor(np.ones(7, np.float32)).astype(dtype), STAND_IN
            ),
            x @ weight.T.astype(np.float64) + 1,
        ),
    }
    for name, (out, expected) in cases.items():
        assert out.dtype == dtype and relative_error(out.astype(ms.float32).asnumpy(), expected) < limit, name


def test_heads_the_kernel_refuses_are_named():
    q = Tensor(draw(1, 4, CHANNELS))
    with pytest.raises(MindSigmaError, match="multiple of 16"):
        ascend.flash_attention(q, q, q, HEADS, 1.0, STAND_IN)
    with pytest.raises(MindSigmaError, match="expected"):
        ascend.flash_attention(q, q[:, :, :32], q, HEADS, 1.0, STAND_IN)

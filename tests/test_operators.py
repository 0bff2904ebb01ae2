"""The operators' portable insides against float64, with one rounding at the end; the mask that rides in the heads."""

import mindspore as ms
import numpy as np
import pytest
from conftest import relative_error
from mindspore import Tensor

from mindsigma import MindSigmaError
from mindsigma.models.dit import CrossAttention, DiTConfig
from mindsigma.ops import operators
from mindsigma.ops.heads import head_width, widen_tokens

HEADS, HEAD_DIM = 2, 72
CHANNELS = HEADS * HEAD_DIM


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def given(dtype, *arrays):
    """Tensors of a dtype, and the float64 arrays that they hold."""
    tensors = [Tensor(array).astype(dtype) for array in arrays]
    return tensors, [tensor.astype(ms.float32).asnumpy().astype(np.float64) for tensor in tensors]


def assert_rounded_once(out, exact, dtype, name=None):
    """Results are of this dtype; in fp32 exact to 1e-6, in fp16 the nearest number but for what fp32 errs before."""
    assert out.dtype == dtype, name
    value, exact = out.astype(ms.float32).asnumpy().astype(np.float64), np.asarray(exact)
    assert value.shape == exact.shape and exact.std() > 0.1, name
    allowed = 2e-6 * np.abs(exact).max()
    if dtype == ms.float16:
        allowed = allowed + 0.5 * np.spacing(np.abs(exact).astype(np.float16)).astype(np.float64)
    assert (np.abs(value - exact) <= allowed).all(), (name, np.max(np.abs(value - exact) / allowed))


def attention(q, k, v, scale, heads, bias=0.0):
    """Closed form in float64 for (N, S, C)."""
    q, k, v = (x.astype(np.float64).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) * scale + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    return out.transpose(0, 2, 1, 3).reshape(*out.shape[:1], -1, heads * out.shape[-1])


def narrow(x):
    return x.reshape(*x.shape[:2], HEADS, -1)[..., :HEAD_DIM].reshape(*x.shape[:2], CHANNELS)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_attention_on_wider_heads_is_attention(dtype, mode):
    arrays = draw(2, 33, CHANNELS), draw(2, 17, CHANNELS, seed=1), draw(2, 17, CHANNELS, seed=2)
    tensors, exact = given(dtype, *arrays)
    assert head_width(HEAD_DIM) == head_width(HEAD_DIM, True) == 80 and head_width(64) == 64
    wide = [widen_tokens(x, HEADS, HEAD_DIM, 80) for x in tensors]
    out = operators.attention(*wide, HEADS, HEAD_DIM**-0.5)
    assert out.shape == (2, 33, HEADS * 80)
    assert (out.asnumpy().reshape(2, 33, HEADS, 80)[..., HEAD_DIM:] == 0).all()
    assert_rounded_once(Tensor(narrow(out.asnumpy())), attention(*exact, HEAD_DIM**-0.5, HEADS), dtype)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_dropped_key_weighs_nothing_in_fp16(size):
    """Also where logits are large, also beside a single key that is kept; everything stays inside fp16's range."""
    config = DiTConfig(hidden_size=CHANNELS, num_heads=HEADS, depth=1, caption_channels=8)
    cell = CrossAttention(config, ms.float16)
    cell.kv_linear.weight.set_data(Tensor(draw(2 * CHANNELS, CHANNELS, seed=3) * size / CHANNELS**0.5, ms.float16))
    caption = Tensor(draw(2, 16, CHANNELS)).astype(ms.float16)
    keep = np.ones((2, 16), np.int32)
    keep[0, 5:], keep[1, 1:] = 0, 0
    k, v = cell.text_kv(caption, Tensor(keep))
    plain, values = cell.text_kv(caption, None)
    k, v, plain, values = (x.astype(ms.float32).asnumpy() for x in (k, v, plain, values))
    assert np.isfinite(k).all() and np.abs(k).max() < 65504 / 2
    assert (narrow(k) == narrow(plain)).all() and (v == values).all()
    q = Tensor(draw(2, 9, CHANNELS, seed=4) * size).astype(ms.float16)
    wide = widen_tokens(q, HEADS, HEAD_DIM, 80, 1.0)
    half = [Tensor(x).astype(ms.float16) for x in (k, v)]
    out = operators.attention(wide, *half, HEADS, HEAD_DIM**-0.5).astype(ms.float32).asnumpy()
    changed = v.copy()
    changed[keep == 0] = 100.0
    half[1] = Tensor(changed).astype(ms.float16)
    again = operators.attention(wide, *half, HEADS, HEAD_DIM**-0.5).astype(ms.float32).asnumpy()
    assert (out == again).all()  # exactly nothing
    dropped = np.where(keep[:, None, None, :] > 0, 0.0, -np.inf)
    exact = attention(q.asnumpy(), narrow(plain), narrow(values), HEAD_DIM**-0.5, HEADS, dropped)
    assert relative_error(narrow(out), exact) < 2e-3


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_norms_and_maps(dtype, mode):
    tensors, exact = given(dtype, draw(2, 5, 48), draw(48, seed=1), draw(48, seed=2))
    (x, gamma, beta), (x_, gamma_, beta_) = tensors, exact
    normed = (x_ - x_.mean(-1, keepdims=True)) / np.sqrt(x_.var(-1, keepdims=True) + 1e-6)
    rms = x_ / np.sqrt((x_ * x_).mean(-1, keepdims=True) + 1e-6) * gamma_
    gelu = 0.5 * x_ * (1 + np.tanh((2 / np.pi) ** 0.5 * (x_ + 0.044715 * x_**3)))
    (weight, bias), (weight_, bias_) = given(dtype, draw(7, 48, seed=3), draw(7, seed=4))
    (gate, shift), (gate_, shift_) = given(dtype, draw(2, 1, 48, seed=5), draw(2, 1, 48, seed=6))
    cases = {
        "layer norm": (operators.layer_norm(x, gamma, beta, 1e-6), normed * gamma_ + beta_),
        "plain layer norm": (operators.plain_layer_norm(x, 1e-6), normed),
        "rms norm": (operators.rms_norm(x, gamma, 1e-6), rms),
        "gelu": (operators.gelu(x), gelu),
        "gated residual": (operators.multiply_add(x, x, gate), x_ + x_ * gate_),
        "modulation": (operators.multiply_add(shift, x, gate), shift_ + x_ * gate_),
        "row": (operators.multiply_add(beta, x, gamma), beta_ + x_ * gamma_),
        "dense": (operators.dense(x, weight, bias), x_ @ weight_.T + bias_),
        "dense without bias": (operators.dense(x, weight), x_ @ weight_.T),
    }
    for name, (out, expected) in cases.items():
        assert_rounded_once(out, expected, dtype, name)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_norms_of_what_is_far_from_zero(dtype):
    """A mean of 1000 times the deviation costs no more than fp32's rounding: statistics are of centred values."""
    array = (draw(2, 8, 6, 6) * 0.05 + 50).astype(np.float16).astype(np.float32)
    (x, gamma, beta), (x_, gamma_, beta_) = given(dtype, array, draw(8, seed=1), draw(8, seed=2))
    rows = x_.reshape(2, 4, -1)
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)
    expected = normed.reshape(x_.shape) * gamma_.reshape(1, 8, 1, 1) + beta_.reshape(1, 8, 1, 1)
    out = operators.group_norm(x, 4, gamma, beta, 1e-6)
    assert out.dtype == dtype
    assert relative_error(out.astype(ms.float32).asnumpy(), expected) < (1e-3 if dtype == ms.float16 else 1e-4)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_images(dtype, mode):
    tensors, exact = given(dtype, draw(2, 8, 5, 7), draw(8, seed=1), draw(8, seed=2))
    (x, gamma, beta), (x_, gamma_, beta_) = tensors, exact
    rows = x_.reshape(2, 4, -1)
    normed = (rows - rows.mean(-1, keepdims=True)) / np.sqrt(rows.var(-1, keepdims=True) + 1e-6)
    expected = normed.reshape(x_.shape) * gamma_.reshape(1, 8, 1, 1) + beta_.reshape(1, 8, 1, 1)
    assert_rounded_once(operators.group_norm(x, 4, gamma, beta, 1e-6), expected, dtype)
    if dtype == ms.float32:
        large = operators.upsample_2x(x)
        assert (large.asnumpy() == x.asnumpy().repeat(2, 2).repeat(2, 3)).all()


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_attention_with_bias(dtype, mode):
    """T5's; weights are rounded to the dtype of the values, as in Hugging Face's code."""
    (q, k, v), exact = given(dtype, *(draw(2, 6, 32, seed=seed) for seed in range(3)))
    bias = draw(1, 4, 6, 6, seed=3)
    out = operators.attention_with_bias(q, k, v, Tensor(bias), 4)
    assert out.dtype == dtype and out.shape == q.shape
    error = relative_error(out.astype(ms.float32).asnumpy(), attention(*exact, 1.0, 4, bias))
    assert error < (1e-3 if dtype == ms.float16 else 1e-6)


def test_heads_the_kernel_refuses_are_named():
    q = Tensor(draw(1, 4, CHANNELS))
    with pytest.raises(MindSigmaError, match="multiple of 16"):
        operators.attention(q, q, q, HEADS, 1.0)
    with pytest.raises(MindSigmaError, match="expected"):
        operators.attention(q, q[:, :, :32], q, HEADS, 1.0)
    with pytest.raises(MindSigmaError, match="up to 512"):
        wide = Tensor(np.zeros((1, 4, 528), np.float32))
        operators.attention(wide, wide, wide, 1, 1.0)

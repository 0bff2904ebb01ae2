"""The T5 encoder: states of the reference, padding, relative positions, half precision, XXL's shapes."""

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, relative_error
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindsigma import MindSigmaError
from mindsigma.models.t5 import T5Config, T5Encoder, relative_position_buckets
from mindsigma.pipeline.text import LENGTH_BUCKETS, bucket_length
from mindsigma.weights.tokenizer import Tokenizer

SMALL = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)


def test_states_are_hugging_faces(mini):
    reference = np.load(GOLDEN / "mini_official_dpm_8.npz")
    caption = mini.encode_prompts([str(prompt) for prompt in reference["prompts"]])
    assert caption.states.shape[1] == 16
    assert relative_error(caption.states.asnumpy(), reference["t5"]) < 3e-6


def test_padding_does_not_matter(mini):
    short = mini.encode_prompts(["a red apple"])
    long = mini.encode_prompts(["a red apple"], min_length=200)
    assert long.states.shape[1] > 16 and int(long.mask.asnumpy().sum()) == int(short.mask.asnumpy().sum())
    # Products of many rows may be summed in another order.
    assert relative_error(long.states[:, :16].asnumpy(), short.states.asnumpy()) < 5e-6


def test_graph_mode_agrees(mode):
    ms.set_seed(1)
    encoder = T5Encoder(SMALL)
    ids, mask = Tensor(np.arange(12, dtype=np.int32).reshape(2, 6)), Tensor(np.ones((2, 6), np.int32))
    reference = _numpy_t5(encoder, ids.asnumpy())
    assert relative_error(encoder(ids, mask).asnumpy(), reference) < 1e-5


def _numpy_t5(encoder, ids):
    """T5 v1.1 written out in float64."""
    w = {parameter.name: parameter.asnumpy().astype(np.float64) for parameter in encoder.get_parameters()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[name]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))

    x = w["shared.weight"][ids]
    n, length, _ = x.shape
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = table[relative_position_buckets(length, 32, 128)].transpose(2, 0, 1)[None]
    for i in range(SMALL.num_layers):
        pre = f"encoder.block.{i}.layer."
        h = norm(x, f"{pre}0.layer_norm.weight")
        q, k, v = (
            (h @ w[f"{pre}0.SelfAttention.{p}.weight"].T).reshape(n, length, 4, 8).transpose(0, 2, 1, 3) for p in "qkv"
        )
        scores = q @ k.swapaxes(2, 3) + bias
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(n, length, -1)
        x = x + out @ w[f"{pre}0.SelfAttention.o.weight"].T
        h = norm(x, f"{pre}1.layer_norm.weight")
        gate = gelu(h @ w[f"{pre}1.DenseReluDense.wi_0.weight"].T) * (h @ w[f"{pre}1.DenseReluDense.wi_1.weight"].T)
        x = x + gate @ w[f"{pre}1.DenseReluDense.wo.weight"].T
    return norm(x, "encoder.final_layer_norm.weight")


def test_buckets_follow_the_definition():
    """Against the scalar definition: exact up to 7, then logarithmic to 128, 16 for each direction."""

    def bucket(distance):
        offset, n = (16, distance) if distance > 0 else (0, -distance)
        if n < 8:
            return offset + n
        return offset + min(15, 8 + int(np.log(n / 8) / np.log(128 / 8) * 8))

    buckets = relative_position_buckets(300, 32, 128)
    expected = [[bucket(key - query) for key in range(300)] for query in range(300)]
    # At 16, 32 and 64 the logarithm is a whole number, which rounding may miss: Hugging Face's float32 does not.
    exact = np.isin(np.abs(np.subtract.outer(np.arange(300), np.arange(300))), (16, 32, 64))
    assert (buckets == np.array(expected))[~exact].all()
    assert [buckets[200, 200 - distance] for distance in (16, 32, 64)] == [10, 12, 14]
    assert buckets.min() == 0 and buckets.max() == 31


def test_half_precision_survives_xxl_activations():
    """Gate products beyond fp16's range: a naive fp16 encoder gives inf or NaN, this one agrees with fp32."""
    ms.set_seed(2)
    encoders = [T5Encoder(SMALL), T5Encoder(SMALL, ms.float16)]
    for exact, half in zip(*(encoder.get_parameters() for encoder in encoders)):
        value = exact.asnumpy().astype(np.float16).astype(np.float32)
        if "wi_" in exact.name:
            value = value * 128  # the product of the gates reaches 1e6
        exact.set_data(Tensor(value))
        half.set_data(Tensor(value).astype(half.dtype))
    ids, mask = Tensor(np.arange(16, dtype=np.int32).reshape(1, 16)), Tensor(np.ones((1, 16), np.int32))
    reference, states = (encoder(ids, mask).asnumpy() for encoder in encoders)
    layer = encoders[0].encoder.block[0].layer[1].DenseReluDense
    hidden = np.abs(reference @ layer.wi_0.weight.asnumpy().T * (reference @ layer.wi_1.weight.asnumpy().T))
    assert hidden.max() > 65504  # the test does what it says
    assert np.isfinite(states).all() and relative_error(states, reference) < 5e-3


def test_xxl_has_the_published_shapes():
    with no_init_parameters():
        encoder = T5Encoder(T5Config())
    shapes = {parameter.name: tuple(parameter.shape) for parameter in encoder.get_parameters()}
    assert len(shapes) == 24 * 9 + 3 and sum(int(np.prod(shape)) for shape in shapes.values()) == 4_762_310_656
    assert shapes["shared.weight"] == (32128, 4096)
    assert shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] == (32, 64)
    assert shapes["encoder.block.23.layer.1.DenseReluDense.wo.weight"] == (4096, 10240)
    assert not any(parameter.has_init is False for parameter in encoder.get_parameters())  # nothing was allocated


def test_other_t5s_are_refused():
    with pytest.raises(MindSigmaError, match="feed_forward_proj"):
        T5Config.from_dict({"feed_forward_proj": "relu"})


def test_length_buckets():
    assert [bucket_length(n, 300) for n in (1, 16, 17, 256, 257, 300)] == [16, 16, 32, 256, 300, 300]
    assert bucket_length(5, 10) == 10
    assert LENGTH_BUCKETS[-1] < 300


def test_long_prompt_is_cut_with_a_warning(mini):
    with pytest.warns(UserWarning, match="cut off: .*background"):
        caption = mini.encode_prompts(["a penguin on a yellow background"], max_sequence_length=4)
    assert caption.mask.asnumpy().tolist() == [[1, 1, 1, 1]]


def test_a_vocabulary_of_absurd_size_is_refused(tmp_path):
    with open(tmp_path / "spiece.model", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(MindSigmaError, match="more than the"):
        Tokenizer(tmp_path)

"""T5 v1.1 encoder: token ids to caption states (reference.md 2.8, 2.13). Parameter names are Hugging Face's.

Safe in half precision by construction: the residual stream, norms, attention weights and the gated product with its
output projection stay in fp32; only the other matrix products run in the model's dtype.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.models.layers import Affine, Norm, normal
from mindsigma.ops.attention import attention_with_bias
from mindsigma.ops.functional import rms_norm
from mindsigma.ops.kernels import resolve_kernels
from mindsigma.ops.linear_chains import add_linear, rms_gated_linear, rms_linear
from mindsigma.ops.shared_graph import SharedGraph

MASKED = -1e9


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5 v1.1 encoder; the defaults are XXL's. Field names are those of Hugging Face's config.json."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_dict(cls, values):
        """Build from a Hugging Face config.json; a T5 that is not v1.1 (gated GELU) is refused."""
        kind = values.get("feed_forward_proj", "gated-gelu")
        if kind != "gated-gelu":
            raise MindSigmaError(f"T5 config: feed_forward_proj {kind!r} is not T5 v1.1's gated-gelu")
        try:
            return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
        except TypeError as error:
            raise MindSigmaError(f"T5 config: {error}") from None


def relative_position_buckets(length, num_buckets, max_distance):
    """Bucket of every (query, key) pair, int32 (length, length): half the buckets for each direction, logarithmic."""
    positions = np.arange(length)
    distance = positions[None, :] - positions[:, None]  # key - query
    half = num_buckets // 2
    exact = half // 2
    magnitude = np.abs(distance)
    with np.errstate(divide="ignore"):
        logarithmic = exact + (
            np.log(magnitude.astype(np.float32) / exact) / np.log(max_distance / exact) * (half - exact)
        )
    far = np.minimum(np.where(magnitude < exact, 0, logarithmic), half - 1).astype(np.int32)
    return (np.where(distance > 0, half, 0) + np.where(magnitude < exact, magnitude, far)).astype(np.int32)


def encoder_layer(x, bias, eps, num_heads, kernels, q, k, v, o, attention_norm, wi_0, wi_1, wo, ff_norm):
    """One T5 layer on the fp32 residual stream x (N, L, d_model); bias (N, heads, L, L) fp32 holds the mask too."""
    queries = rms_linear(x, attention_norm, eps, q, kernels)
    keys = rms_linear(x, attention_norm, eps, k, kernels)
    values = rms_linear(x, attention_norm, eps, v, kernels)
    x = add_linear(x, attention_with_bias(queries, keys, values, bias, num_heads, kernels), kernels, o, None)
    return add_linear(x, rms_gated_linear(x, ff_norm, eps, wi_0, wi_1, wo.dtype, kernels), kernels, wo, None)


def attention_bias(table, mask, num_buckets, max_distance, num_heads):
    """Bias (N, heads, L, L) fp32 of all layers: relative positions, from the first layer's table, and mask (N, L)."""
    batch, length = mask.shape
    bias = ops.gather(table, bucket_tensor(length, num_buckets, max_distance), 0).reshape(length, length, num_heads)
    bias = bias.transpose(2, 0, 1).expand_dims(0).astype(ms.float32)
    return bias + ((1.0 - mask.astype(ms.float32)) * MASKED).reshape(batch, 1, 1, length)


class _SelfAttention(nn.Cell):
    def __init__(self, config, dtype, has_relative_bias):
        super().__init__()
        inner = config.num_heads * config.d_kv
        d = config.d_model
        self.q = Affine(d, inner, normal((d * config.d_kv) ** -0.5), has_bias=False, dtype=dtype)
        self.k = Affine(d, inner, normal(d**-0.5), has_bias=False, dtype=dtype)
        self.v = Affine(d, inner, normal(d**-0.5), has_bias=False, dtype=dtype)
        self.o = Affine(inner, d, normal(inner**-0.5), has_bias=False, dtype=dtype)
        if has_relative_bias:
            shape = (config.relative_attention_num_buckets, config.num_heads)
            self.relative_attention_bias = Affine(0, 0, normal(d**-0.5), shape, has_bias=False)


class _GatedFeedForward(nn.Cell):
    def __init__(self, config, dtype):
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        wide = ms.float32 if dtype == ms.float16 else dtype  # XXL's product of the gates overflows fp16
        self.wi_0 = Affine(d, d_ff, normal(d**-0.5), has_bias=False, dtype=dtype)
        self.wi_1 = Affine(d, d_ff, normal(d**-0.5), has_bias=False, dtype=dtype)
        self.wo = Affine(d_ff, d, normal(d_ff**-0.5), has_bias=False, dtype=wide)


class _Sublayer(nn.Cell):
    def __init__(self, name, inner, config):
        super().__init__()
        self.insert_child_to_cell(name, inner)
        self.layer_norm = Norm(config.d_model, has_bias=False)


class _Layer(nn.Cell):
    def __init__(self, config, dtype, kernels, is_first):
        super().__init__()
        attention, feed_forward = _SelfAttention(config, dtype, is_first), _GatedFeedForward(config, dtype)
        self.layer = nn.CellList(
            [
                _Sublayer("SelfAttention", attention, config),
                _Sublayer("DenseReluDense", feed_forward, config),
            ]
        )
        weights = [getattr(attention, name).weight for name in "qkvo"]
        weights.append(self.layer[0].layer_norm.weight)
        weights += [feed_forward.wi_0.weight, feed_forward.wi_1.weight, feed_forward.wo.weight]
        weights.append(self.layer[1].layer_norm.weight)
        static = (config.layer_norm_epsilon, config.num_heads, kernels)
        self.run = SharedGraph(encoder_layer, weights, static, of_operations=True)

    def construct(self, x, bias):
        return self.run(x, bias)


class _Stack(nn.Cell):
    def __init__(self, config, dtype, kernels):
        super().__init__()
        self.block = nn.CellList([_Layer(config, dtype, kernels, i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = Norm(config.d_model, has_bias=False)


class T5Encoder(nn.Cell):
    """T5 v1.1 encoder.

    Args:
        config: T5Config.
        dtype: dtype of the weights (norms and, in fp16, the output projection stay fp32).
        kernels: "math" or "fused"; by default what the device target offers.
    """

    def __init__(self, config, dtype=ms.float32, kernels=None):
        super().__init__()
        self.config = config
        self.dtype = dtype
        kernels = resolve_kernels(kernels)
        self.shared = Affine(0, 0, normal(1.0), (config.vocab_size, config.d_model), has_bias=False, dtype=dtype)
        self.encoder = _Stack(config, dtype, kernels)
        static = (config.relative_attention_num_buckets, config.relative_attention_max_distance, config.num_heads)
        self.bias = SharedGraph(attention_bias, static=static)
        self.last_norm = SharedGraph(
            rms_norm, self.encoder.final_layer_norm.tensors, (config.layer_norm_epsilon, kernels)
        )

    def construct(self, token_ids, mask):
        """Encode token ids (N, L) int32 with mask (N, L), 1 for tokens and 0 for padding; returns fp32 (N, L, d_model).

        Padding positions get states too (the official code feeds them to the DiT for the empty prompt), but no
        position attends to padding.
        """
        config = self.config
        x = ops.gather(self.shared.weight, token_ids.reshape(-1), 0)
        x = x.reshape(token_ids.shape + (config.d_model,)).astype(ms.float32)
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias = self.bias(table, mask)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.last_norm(x)


@ops.constexpr
def bucket_tensor(length, num_buckets, max_distance):
    """`relative_position_buckets`, flattened, as a constant of the graph."""
    return Tensor(relative_position_buckets(length, num_buckets, max_distance).reshape(-1))

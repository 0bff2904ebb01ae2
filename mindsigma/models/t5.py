"""T5 v1.1 encoder: token ids to caption states (models/README.md, "T5"). Parameter names are Hugging Face's.

Safe in half precision by construction: the residual stream, norms, attention weights and the gated product with its
output projection stay in fp32; only the other matrix products run in the model's dtype.
"""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.errors import MindSigmaError
from mindsigma.models.linear import RMSNorm, UnbiasedLinear, normal, parameter
from mindsigma.ops.operators import attention_with_bias, embedding, gelu

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


class T5Attention(nn.Cell):
    """Attention among the tokens of a text, unscaled, with the bias that all layers share."""

    def __init__(self, config, dtype, has_relative_bias):
        super().__init__()
        inner, d = config.num_heads * config.d_kv, config.d_model
        self.num_heads, self.dtype = config.num_heads, dtype
        self.q = UnbiasedLinear(d, inner, normal((d * config.d_kv) ** -0.5), dtype=dtype)
        self.k = UnbiasedLinear(d, inner, normal(d**-0.5), dtype=dtype)
        self.v = UnbiasedLinear(d, inner, normal(d**-0.5), dtype=dtype)
        self.o = UnbiasedLinear(inner, d, normal(inner**-0.5), dtype=dtype)
        if has_relative_bias:
            self.relative_attention_bias = RelativeBias(config)

    def construct(self, h, bias):
        """h (N, L, d_model) fp32 and bias (N, heads, L, L) fp32 to (N, L, d_model) in the model's dtype."""
        h = h.astype(self.dtype)
        return self.o(attention_with_bias(self.q(h), self.k(h), self.v(h), bias, self.num_heads))


class RelativeBias(nn.Cell):
    """Bias of attention for every distance between two tokens, by bucket and head; the first layer's serves all."""

    def __init__(self, config):
        super().__init__()
        self.buckets = config.relative_attention_num_buckets, config.relative_attention_max_distance
        self.num_heads = config.num_heads
        self.weight = parameter((config.relative_attention_num_buckets, config.num_heads), normal(config.d_model**-0.5))

    def construct(self, mask):
        """Bias (N, heads, L, L) fp32 that also drops the tokens where mask (N, L) is 0."""
        batch, length = mask.shape
        bias = embedding(self.weight, bucket_tensor(length, self.buckets[0], self.buckets[1]))
        bias = bias.reshape(length, length, self.num_heads).transpose(2, 0, 1).expand_dims(0).astype(ms.float32)
        return bias + ((1.0 - mask.astype(ms.float32)) * MASKED).reshape(batch, 1, 1, length)


class GatedMLP(nn.Cell):
    """gelu(wi_0 h) * (wi_1 h), projected."""

    def __init__(self, config, dtype):
        super().__init__()
        d, d_ff = config.d_model, config.d_ff
        self.dtype = dtype
        self.wide = ms.float32 if dtype == ms.float16 else dtype  # XXL's product of the gates overflows fp16
        self.wi_0 = UnbiasedLinear(d, d_ff, normal(d**-0.5), dtype=dtype)
        self.wi_1 = UnbiasedLinear(d, d_ff, normal(d**-0.5), dtype=dtype)
        self.wo = UnbiasedLinear(d_ff, d, normal(d_ff**-0.5), dtype=self.wide)

    def construct(self, h):
        """h (N, L, d_model) fp32 to (N, L, d_model)."""
        h = h.astype(self.dtype)
        return self.wo(gelu(self.wi_0(h)).astype(self.wide) * self.wi_1(h).astype(self.wide))


class Sublayer(nn.Cell):
    """A norm and what follows it, under Hugging Face's name."""

    def __init__(self, name, inner, config):
        super().__init__()
        self.insert_child_to_cell(name, inner)
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Layer(nn.Cell):
    """One layer on the residual stream."""

    def __init__(self, config, dtype, is_first):
        super().__init__()
        attention, mlp = T5Attention(config, dtype, is_first), GatedMLP(config, dtype)
        self.layer = nn.CellList(
            [Sublayer("SelfAttention", attention, config), Sublayer("DenseReluDense", mlp, config)]
        )

    def construct(self, x, bias):
        """x (N, L, d_model) fp32; bias of RelativeBias."""
        attention, mlp = self.layer[0], self.layer[1]
        x = x + attention.SelfAttention(attention.layer_norm(x), bias).astype(ms.float32)
        return x + mlp.DenseReluDense(mlp.layer_norm(x)).astype(ms.float32)


class Stack(nn.Cell):
    """The layers and the last norm."""

    def __init__(self, config, dtype):
        super().__init__()
        self.block = nn.CellList([T5Layer(config, dtype, i == 0) for i in range(config.num_layers)])
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Cell):
    """T5 v1.1 encoder.

    Args:
        config: T5Config.
        dtype: dtype of the weights (norms and, in fp16, the output projection stay fp32).
    """

    def __init__(self, config, dtype=ms.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.shared = Embedding(config, dtype)
        self.encoder = Stack(config, dtype)

    def construct(self, token_ids, mask):
        """Encode token ids (N, L) int32 with mask (N, L), 1 for tokens and 0 for padding; returns fp32 (N, L, d_model).

        Padding positions get states too (the official code feeds them to the DiT for the empty prompt), but no
        position attends to padding.
        """
        x = self.shared(token_ids)
        bias = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias(mask)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)


class Embedding(nn.Cell):
    """Token ids (N, L) to fp32 (N, L, d_model)."""

    def __init__(self, config, dtype):
        super().__init__()
        self.weight = parameter((config.vocab_size, config.d_model), normal(1.0), dtype)

    def construct(self, token_ids):
        x = embedding(self.weight, token_ids.reshape(-1))
        return x.reshape(token_ids.shape + (self.weight.shape[1],)).astype(ms.float32)


@ops.constexpr
def bucket_tensor(length, num_buckets, max_distance):
    """`relative_position_buckets`, flattened, as a constant of the graph."""
    return Tensor(relative_position_buckets(length, num_buckets, max_distance).reshape(-1))

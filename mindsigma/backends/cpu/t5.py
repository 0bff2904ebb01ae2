"""Layers of a T5 encoder on the native kernels; its tables are looked up in NumPy."""

import numpy as np
from mindspore import Tensor

from mindsigma.backends.cpu import kernels
from mindsigma.models.linear import RMSNorm
from mindsigma.models.t5 import MASKED, Embedding, RelativeBias, T5Layer, relative_position_buckets


class FastEmbedding(Embedding):
    """MindSpore's Gather would start threads that turn in loops from then on (mindsigma/backends/README.md)."""

    def construct(self, token_ids):
        """See Embedding."""
        return Tensor(kernels.array(self.weight)[token_ids.asnumpy()])


class FastRelativeBias(RelativeBias):
    """The same for the table of distances."""

    def construct(self, mask):
        """See RelativeBias."""
        batch, length = mask.shape
        buckets = relative_position_buckets(length, *self.buckets)
        bias = kernels.array(self.weight)[buckets].transpose(2, 0, 1)  # (heads, L, L)
        dropped = (1 - mask.asnumpy().astype(np.float32)) * np.float32(MASKED)
        return Tensor(bias + dropped.reshape(batch, 1, 1, length))


class FastRMSNorm(RMSNorm):
    """The last norm; those of the layers are in their linear maps."""

    def construct(self, x):
        """See RMSNorm."""
        x = kernels.array(x)
        return Tensor(x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * kernels.array(self.weight))


class FastT5Layer(T5Layer):
    """A layer, its norms and sums inside of its linear maps."""

    def construct(self, x, bias):
        """See T5Layer."""
        norm, a = self.layer[0].layer_norm, self.layer[0].SelfAttention
        q, k, v = (
            kernels.linear(x, getattr(a, name).weight, norm_weight=norm.weight, eps=norm.eps, out=kernels.spare(
                name, *x.shape[:-1], getattr(a, name).weight.shape[0]))
            for name in "qkv"
        )  # fmt: skip
        answer = kernels.attention(q, k, v, a.num_heads, 1.0, bias=bias, out=kernels.spare("attended", *q.shape))
        x = kernels.linear(answer, a.o.weight, residual=x, out=kernels.spare("x1", *x.shape))

        norm, m = self.layer[1].layer_norm, self.layer[1].DenseReluDense
        hidden = [kernels.spare(name, *x.shape[:-1], m.wi_0.weight.shape[0]) for name in ("gate", "hidden")]
        kernels.linear(x, m.wi_1.weight, norm_weight=norm.weight, eps=norm.eps, out=hidden[0])
        kernels.linear(
            x, m.wi_0.weight, norm_weight=norm.weight, eps=norm.eps, gelu=True, factor=hidden[0], out=hidden[1]
        )
        return kernels.linear(hidden[1], m.wo.weight, residual=x)

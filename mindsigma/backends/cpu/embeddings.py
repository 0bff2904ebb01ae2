"""Embeddings of the caption and of scalars, once a trajectory, without MindSpore's operators (sampler.py says why)."""

import numpy as np

from mindsigma.backends.cpu import kernels
from mindsigma.models.dit import CaptionEmbedding
from mindsigma.models.embeddings import ScalarEmbedder, frequencies


def tensors(linear):
    """Weight (out, in), with its changes, and bias of a Linear."""
    if len(linear.changes) > 0:
        return linear.merged_weight(), linear.bias
    return linear.weight, linear.bias


def silu(x):
    """SiLU of a tensor, as an array."""
    x = kernels.array(x)
    with np.errstate(over="ignore"):  # then it is 0
        return x / (1 + np.exp(-x))


class FastCaptionEmbedding(CaptionEmbedding):
    """Two linear maps, the first with its GELU."""

    def construct(self, caption):
        """See CaptionEmbedding."""
        if self.training:
            return super().construct(caption)
        fc1, fc2 = self.y_proj.fc1, self.y_proj.fc2
        h = kernels.spare("hidden", *caption.shape[:-1], fc1.weight.shape[0])
        kernels.linear(caption, *tensors(fc1), gelu=True, out=h)
        return kernels.linear(h, *tensors(fc2))


class FastScalarEmbedder(ScalarEmbedder):
    """Sinusoids in NumPy, then two linear maps."""

    def construct(self, values, dtype):
        """See ScalarEmbedder."""
        if self.training:
            return super().construct(values, dtype)
        values = values.asnumpy().astype(np.float32)
        angles = values.reshape(-1, 1) * frequencies().asnumpy()
        h = np.concatenate((np.cos(angles), np.sin(angles)), 1)
        h = silu(kernels.linear(h, *tensors(self.mlp[0])))
        return kernels.linear(h, *tensors(self.mlp[2])).reshape(values.shape[0], -1)

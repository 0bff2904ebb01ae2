"""Position, timestep and micro-condition embeddings (reference.md 2.2, 2.3, 2.12)."""

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.models.layers import Affine, normal
from mindsigma.ops.functional import linear, silu, sinusoid

FREQUENCY_CHANNELS = 256


@lru_cache(maxsize=32)
def position_embedding(height, width, channels, base_size, pe_interpolation):
    """Sine-cosine embedding of a token grid, float32 (1, height * width, channels), computed in float64.

    Each axis is normalised to base_size, so every aspect ratio spans the same range. The first half of the channels
    encodes the column, the second the row; each half is [sin | cos].
    """
    rows = np.arange(height, dtype=np.float64) / (height / base_size) / pe_interpolation
    columns = np.arange(width, dtype=np.float64) / (width / base_size) / pe_interpolation
    quarter = channels // 4
    frequencies = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)

    def encode(positions):
        angles = positions[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)  # (positions, channels / 2)

    half = channels // 2
    embedding = np.concatenate(
        [
            np.broadcast_to(encode(columns)[None], (height, width, half)),
            np.broadcast_to(encode(rows)[:, None], (height, width, half)),
        ],
        -1,
    )
    return embedding.reshape(1, height * width, channels).astype(np.float32)


@ops.constexpr
def position_tensor(height, width, channels, base_size, pe_interpolation, dtype, first, rows):
    """`position_embedding` of `rows` rows of the grid from `first`, as a constant tensor of the graph."""
    embedding = position_embedding(height, width, channels, base_size, pe_interpolation)
    return Tensor(embedding[:, first * width : (first + rows) * width], dtype)


def embed_scalars(values, dtype, fc1_weight, fc1_bias, fc2_weight, fc2_bias):
    """MLP with SiLU of the sinusoids of scalars (N,) or (N, K): (N, channels) or (N, K * channels)."""
    h = sinusoid(values.reshape(-1), FREQUENCY_CHANNELS).astype(dtype)
    h = linear(silu(linear(h, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
    return h.reshape(values.shape[0], -1)


class ScalarEmbedder(nn.Cell):
    """Weights of the embedding of scalars: timesteps, image sides, aspect ratios."""

    def __init__(self, channels, dtype=ms.float32):
        super().__init__()
        first = Affine(FREQUENCY_CHANNELS, channels, normal(0.02), dtype=dtype)
        second = Affine(channels, channels, normal(0.02), dtype=dtype)
        self.mlp = nn.CellList([first, nn.Identity(), second])

    @property
    def tensors(self):
        """Weight and bias of the first layer, then of the second."""
        return self.mlp[0].tensors + self.mlp[2].tensors

"""Position, timestep and micro-condition embeddings (models/README.md, "Embeddings")."""

from functools import lru_cache

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from mindsigma.models.linear import Linear, normal
from mindsigma.ops.operators import silu

FREQUENCY_CHANNELS = 256
MAX_PERIOD = 10000.0


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


@ops.constexpr
def frequencies():
    """fp32 (1, FREQUENCY_CHANNELS / 2), rounded at every step as the official code does: at t = 999 it shows."""
    half = FREQUENCY_CHANNELS // 2
    exponents = np.float32(-np.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    return Tensor(np.exp(exponents.astype(np.float64)).astype(np.float32).reshape(1, -1))


def sinusoid(positions):
    """Features [cos | sin] of positions (N,), fp32 (N, FREQUENCY_CHANNELS)."""
    angles = positions.astype(ms.float32).reshape(-1, 1) * frequencies()
    return ops.concat((ops.cos(angles), ops.sin(angles)), 1)


class ScalarEmbedder(nn.Cell):
    """MLP with SiLU of the sinusoids of scalars: timesteps, image sides, aspect ratios."""

    def __init__(self, channels, dtype=ms.float32):
        super().__init__()
        first = Linear(FREQUENCY_CHANNELS, channels, normal(0.02), dtype=dtype)
        second = Linear(channels, channels, normal(0.02), dtype=dtype)
        self.mlp = nn.CellList([first, nn.Identity(), second])

    def construct(self, values, dtype):
        """Scalars (N,) or (N, K) to (N, channels) or (N, K * channels) in a dtype."""
        h = sinusoid(values.reshape(-1)).astype(dtype)
        h = self.mlp[2](silu(self.mlp[0](h)))
        return h.reshape(values.shape[0], -1)

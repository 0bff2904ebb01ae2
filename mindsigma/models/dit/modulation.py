"""What the timestep and the micro conditions decide: the rows of modulation of all blocks and of the final layer."""

import numpy as np
from mindspore import Tensor, ops

from mindsigma.models.dit.branches import UNIT
from mindsigma.models.dit.embeddings import embed_scalars
from mindsigma.ops.functional import linear, silu

FINAL_UNIT = np.array([0, 1], np.float32).reshape(1, 2, 1)


def embed_conditions(timestep, image_size, aspect_ratio, dtype, weight, bias, *embedders):
    """Timestep embedding (N, C), with micro conditions unless these are None, and its modulation (N, 6 * C)."""
    t = embed_scalars(timestep, dtype, *embedders[:4])
    if image_size is not None:
        size = embed_scalars(image_size, dtype, *embedders[4:8])  # (N, 2 C / 3)
        ratio = embed_scalars(aspect_ratio, dtype, *embedders[8:12])  # (N, C / 3)
        t = t + ops.concat((size, ratio), -1)
    return t, linear(silu(t), weight, bias)


@ops.constexpr
def unit_of_all(depth, channels, dtype):
    """((6 * depth + 2) * C,): what is added to the rows of `all_rows`, so that scales are 1 + scale."""
    unit = np.concatenate([np.tile(UNIT, (1, depth, 1)), FINAL_UNIT], 1)
    return Tensor(np.tile(unit, (1, 1, channels)).reshape(-1), dtype)


@ops.constexpr
def final_unit(dtype):
    """FINAL_UNIT as a constant of the graph."""
    return Tensor(FINAL_UNIT, dtype)


def all_rows(timestep, image_size, aspect_ratio, dtype, depth, weight, bias, *rest):
    """Rows (S, 6 * depth + 2, C) of timesteps (S,): of each block (branches.block_rows), and of the final layer.

    `rest`: the tables of the blocks and of the final layer, then the embedders' weights as of `embed_conditions`.
    """
    t, modulation = embed_conditions(timestep, image_size, aspect_ratio, dtype, weight, bias, *rest[depth + 1 :])
    steps, channels = t.shape
    blocks = ops.tile(modulation.reshape(steps, 6, channels), (1, depth, 1))
    final = ops.tile(t.reshape(steps, 1, channels), (1, 2, 1))
    rows = ops.concat((blocks, final), 1).reshape(steps, -1)
    # Additions that broadcast would keep 16 bytes for each element of their result on a CPU.
    rows = ops.bias_add(rows, ops.concat(rest[: depth + 1], 0).reshape(-1))
    rows = ops.bias_add(rows, unit_of_all(depth, channels, rows.dtype))
    return rows.reshape(steps, 6 * depth + 2, channels)


def split_rows(rows, depth):
    """The result of `all_rows` as a tuple: (S, 6, C) for each block, (S, 2, C) for the final layer."""
    result = ()
    for i in range(depth):
        result += (rows[:, 6 * i : 6 * i + 6],)
    return result + (rows[:, 6 * depth :],)


def final_rows(t, table):
    """Rows (N, 2, C) of the final layer in training, from the timestep's embedding (N, C)."""
    rows = table + t.reshape(-1, 1, t.shape[-1])
    return rows + final_unit(rows.dtype)

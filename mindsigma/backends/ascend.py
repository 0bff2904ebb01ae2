"""A DiT's attention weights in the width that Ascend's kernel takes (ops/heads.py)."""

from contextlib import contextmanager

import numpy as np
from mindspore import Tensor


def align_heads(dit):
    """Widen attention's weights once, so that no step does it. Returns the DiT."""
    if not is_aligned(dit):
        for block in dit.blocks:
            _align(block, wide_rows, wide_columns)
    return dit


def is_aligned(dit):
    """Whether `align_heads` has widened the weights of a DiT, or had nothing to do."""
    cross = dit.blocks[0].cross_attn
    return cross.proj.weight.shape[1] == cross.number * cross.width


@contextmanager
def published_shapes(dit):
    """The weights as checkpoints hold them, while the body runs."""
    attention = dit.blocks[0].cross_attn
    aligned = is_aligned(dit) and attention.width != attention.heads[1]
    for block in dit.blocks if aligned else ():
        _align(block, narrow_rows, narrow_columns)
    try:
        yield dit
    finally:
        if aligned:
            align_heads(dit)


def alignments(dit):
    """dict name of a Parameter -> arguments of heads.widen_stacked, of those that `align_heads` widens."""
    return {
        tensor.name: alignment
        for block in dit.blocks
        for tensor, alignment in _of_block(block)
        if alignment[3] != alignment[2] and alignment[5]
    }


def _of_block(block):
    """list of (Parameter, (columns, heads, D, width, parts, widened, first)) of attention's weights."""
    attention, caption = block.attn, block.cross_attn
    number, head_dim = attention.heads
    changes = [
        (tensor, (False, number, head_dim, attention.width, 3, attention.widened, 0.0))
        for tensor in _tensors(attention.qkv)
    ]
    changes.append((attention.proj.weight, (True, number, head_dim, attention.width, 1, 1, 0.0)))
    changes.append((caption.proj.weight, (True, number, head_dim, caption.width, 1, 1, 0.0)))
    changes += [(tensor, (False, number, head_dim, caption.width, 2, 2, 0.0)) for tensor in _tensors(caption.kv_linear)]
    changes.append((caption.q_linear.weight, (False, number, head_dim, caption.width, 1, 1, 0.0)))
    # The new column holds the 1 that meets the mask's.
    return changes + [(caption.q_linear.bias, (False, number, head_dim, caption.width, 1, 1, 1.0))]


def _align(block, rows, columns):
    for tensor, (across, number, head_dim, width, parts, widened, first) in _of_block(block):
        # As whole numbers: NumPy crashes where it joins MindSpore's bfloat16.
        bits = tensor.asnumpy().view(np.uint16 if tensor.itemsize == 2 else np.uint32)
        if across:
            bits = columns(bits, number, head_dim, width)
        elif first and rows is wide_rows:
            one = Tensor([first], tensor.dtype).asnumpy().view(bits.dtype)[0]
            bits = rows(bits, number, head_dim, width, parts, widened, one)
        else:
            bits = rows(bits, number, head_dim, width, parts, widened)
        tensor.set_data(Tensor(np.ascontiguousarray(bits).view(tensor.asnumpy().dtype)), slice_shape=True)


def _tensors(linear):
    return linear.weight, linear.bias


def wide_rows(array, number, head_dim, width, parts=1, widened=None, first=0):
    """ops/heads.py's `widen_rows` of an ndarray, on the host: an NPU would run some twenty kernels a block."""
    channels, widened = number * head_dim, parts if widened is None else widened
    if len(array) != parts * channels or width == head_dim or widened == 0:
        return array
    heads = array[: widened * channels].reshape(widened * number, head_dim, -1)
    wide = np.zeros((len(heads), width, heads.shape[2]), array.dtype)
    wide[:, :head_dim] = heads
    wide[:, head_dim] = first
    return np.concatenate((wide.reshape(-1, *array.shape[1:]), array[widened * channels :]))


def narrow_rows(array, number, head_dim, width, parts=1, widened=None):
    """The reverse of `wide_rows`."""
    rows = number * width * (parts if widened is None else widened)
    narrow = array[:rows].reshape(-1, width, *array.shape[1:])[:, :head_dim].reshape(-1, *array.shape[1:])
    return np.concatenate((narrow, array[rows:]))


def wide_columns(array, number, head_dim, width):
    """Columns of a weight (out, heads * D) for aligned heads: (out, heads * width)."""
    return wide_rows(array.T, number, head_dim, width).T


def narrow_columns(array, number, head_dim, width):
    """The reverse of `wide_columns`."""
    return narrow_rows(array.T, number, head_dim, width).T

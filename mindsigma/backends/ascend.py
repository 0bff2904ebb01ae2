"""A DiT's attention weights in the width that Ascend's kernel takes (ops/heads.py), for sampling."""

from contextlib import contextmanager

import mindspore as ms

from mindsigma.ops.heads import narrow_columns, narrow_rows, widen_columns, widen_rows


def align_heads(dit):
    """Widen attention's weights once; sampling then does it no more. Not for training. Returns the DiT."""
    if not is_aligned(dit):
        for block in dit.blocks:
            _align(block, widen_rows, widen_columns)
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


def _align(block, rows, columns):
    attention, caption = block.attn, block.cross_attn
    number, head_dim = attention.heads
    changes = [(tensor, rows, (attention.width, 3, attention.widened)) for tensor in _tensors(attention.qkv)]
    changes += [(attention.proj.weight, columns, (attention.width,)), (caption.proj.weight, columns, (caption.width,))]
    changes += [(tensor, rows, (caption.width, 2)) for tensor in _tensors(caption.kv_linear)]
    changes += [(tensor, rows, (caption.width,)) for tensor in _tensors(caption.q_linear)]
    for tensor, change, arguments in changes:
        # The query's new column holds the 1 that meets the mask's.
        options = {"first": 1.0} if change is widen_rows and tensor is caption.q_linear.bias else {}
        wide = change(tensor.astype(ms.float32), number, head_dim, *arguments, **options)
        tensor.set_data(wide.astype(tensor.dtype), slice_shape=True)


def _tensors(linear):
    return linear.weight, linear.bias

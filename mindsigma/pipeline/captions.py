"""Captions on their way from the text encoder to the DiT."""

from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError


@dataclass
class Caption:
    """T5 states (N, L, d) fp32 and mask (N, L) int32, 1 for tokens; L is a bucket and not the model's maximum."""

    states: Tensor
    mask: Tensor


def given_caption(name, states, mask):
    """Caption from embeddings that the caller computed, or None."""
    if states is None:
        return None
    states = Tensor(np.asarray(states, np.float32)) if not isinstance(states, Tensor) else states.astype(ms.float32)
    mask = np.asarray(mask) if isinstance(mask, (list, tuple)) else mask
    if mask is None or len(states.shape) != 3 or tuple(mask.shape) != tuple(states.shape[:2]):
        raise MindSigmaError(f"{name}_embeds (N, L, d) needs {name}_mask (N, L)")
    mask = Tensor(mask) if not isinstance(mask, Tensor) else mask
    return Caption(states, mask.astype(ms.int32))


def pad(caption, length):
    """Lengthen a Caption with masked zeros."""
    if caption is None or caption.states.shape[1] == length:
        return caption
    batch, tokens, channels = caption.states.shape
    missing = length - tokens
    states = ops.concat((caption.states, ops.zeros((batch, missing, channels), caption.states.dtype)), 1)
    return Caption(states, ops.concat((caption.mask, ops.zeros((batch, missing), caption.mask.dtype)), 1))


def repeat_rows(tensor, count):
    """(1, ...) to (count, ...); (count, ...) as it is."""
    return tensor if tensor.shape[0] == count else ops.broadcast_to(tensor, (count,) + tensor.shape[1:])


def each(caption, times):
    """Every caption `times` times in a row."""
    if times == 1:
        return caption
    index = Tensor(np.repeat(np.arange(caption.states.shape[0]), times).astype(np.int32))
    return Caption(ops.gather(caption.states, index, 0), ops.gather(caption.mask, index, 0))

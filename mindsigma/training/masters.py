"""Master weights (arXiv 1710.03740): fp32 beside a network that computes with weights of half precision.

The network's own weights are then of its dtype and, on Ascend, as wide as attention's kernel wants them (ops/heads.py).
A step neither casts nor widens them one by one: the update does it for all tensors of one shape at once. Gradients and
weights are what they were: a cast weight's gradient is cast back. (A weight that is used twice, that of a compression
of keys and values, has its two gradients added in half precision.)
"""

import mindspore as ms
from mindspore import Tensor, ops

from mindsigma.backends.ascend import align_heads, alignments
from mindsigma.ops.heads import narrow_stacked, widen_stacked
from mindsigma.ops.operators import divide, fused, stack
from mindsigma.training.shares import divide_weights
from mindsigma.training.updates import each


def forms_of(dit, parameters, shares):
    """Tuple of the form that each Parameter has in the network beside its dtype: heads.widen_stacked's, or ().

    A divided weight is widened where it is used.
    """
    wanted = alignments(dit) if fused() and shares.stage < 3 else {}
    return tuple(wanted.get(parameter.name, ()) for parameter in parameters)


def to_network(dit, parameters, shares):
    """Turn fp32 Parameters of a DiT into its own dtype and form, or into this process's rows of them."""
    if shares.stage == 3:
        divide_weights(dit, shares)
    elif fused():
        align_heads(dit)
    for parameter in parameters if dit.dtype != ms.float32 else ():
        values = Tensor(parameter.asnumpy()).astype(dit.dtype)
        parameter.set_dtype(dit.dtype)
        parameter.set_data(values)


def spans_of(forms):
    """Tuple of (begin, end, form) of the neighbours of one form."""
    spans = []
    for i, form in enumerate(forms):
        if spans and spans[-1][2] == form:
            spans[-1] = (spans[-1][0], i + 1, form)
        else:
            spans.append((i, i + 1, form))
    return tuple(spans)


def from_network(tensors, spans):
    """(K, *shape) fp32 of gradients of K Parameters of a group."""
    pieces = each(ops.partial(_as_kept, tensors), spans)
    whole = pieces[0] if len(pieces) == 1 else ops.concat(pieces, 0)
    return whole if whole.dtype == ms.float32 else whole.astype(ms.float32)


def _as_kept(tensors, span):
    begin, end, form = span
    piece = stack(tensors[begin:end], 0)
    return narrow_stacked(piece, *form) if len(form) > 0 else piece


def for_network(weights, spans, dtype):
    """Tuple of (count, *shape), one a span, of weights (K, *shape) fp32."""
    weights = weights if dtype == ms.float32 else weights.astype(dtype)
    return each(_as_used, divide(weights, each(_count, spans)), spans)


def _count(span):
    return span[1] - span[0]


def _as_used(piece, span):
    form = span[2]
    return widen_stacked(piece, *form) if len(form) > 0 else piece

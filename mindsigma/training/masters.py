"""Master weights (arXiv 1710.03740): fp32 beside a network that computes with weights of half precision.

The network's own weights are then of its dtype and, on Ascend, as wide as attention's kernel wants them (ops/heads.py).
A step neither casts nor widens them one by one: the update does it for all tensors of one shape at once. Gradients and
weights are what they were: a cast weight's gradient is cast back. (A weight that is used twice, that of a compression
of keys and values, has its two gradients added in half precision.)
"""

from itertools import groupby

import mindspore as ms
from mindspore import Tensor, ops

from mindsigma.backends.ascend import align_heads, alignments
from mindsigma.ops.heads import narrow_stacked, widen_stacked
from mindsigma.ops.operators import divide, each, fused, stack
from mindsigma.training.shares import divide_weights


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


def layout_of(forms):
    """Layout of a group of K tensors of these forms."""
    spans, begins = [], [0]
    for form, same in groupby(forms):
        spans.append(WideSpan(form) if form else Span())
        begins.append(begins[-1] + len(list(same)))
    return Layout(spans, begins) if len(spans) == 1 else MixedLayout(spans, begins)


@ms.jit_class
class Span:
    """Neighbours in a group, which the network has in the same form."""

    def kept(self, gradients):
        """(n, *shape) of a tuple of n of the network's gradients."""
        return stack(gradients, 0)

    def used(self, weights):
        """(n, *shape) as the network has them, of weights (n, *shape)."""
        return weights


@ms.jit_class
class WideSpan(Span):
    """A Span of weights that the network has wider: `form` is what heads.widen_stacked takes."""

    def __init__(self, form):
        self.form = form

    def kept(self, gradients):
        """See Span."""
        return narrow_stacked(stack(gradients, 0), *self.form)

    def used(self, weights):
        """See Span."""
        return widen_stacked(weights, *self.form)


@ms.jit_class
class Layout:
    """How K tensors of a group stand in the network: all in one Span.

    Args:
        spans: list of Span.
        begins: where each begins, and K.
    """

    def __init__(self, spans, begins):
        self.spans, self.span = tuple(spans), spans[0]
        self.begins, self.ends = tuple(begins[:-1]), tuple(begins[1:])

    def of_spans(self, things):
        """Tuple of what belongs to each Span of a tuple of K things."""
        return tuple(things[begin:end] for begin, end in zip(self.begins, self.ends))

    def kept(self, gradients):
        """(K, *shape) fp32 of the tuple of the network's gradients."""
        return ops.cast(self.span.kept(gradients), ms.float32)

    def used(self, weights, dtype):
        """Tuple of (n, *shape), one a Span, of weights (K, *shape) fp32."""
        return (self.span.used(ops.cast(weights, dtype)),)


@ms.jit_class
class MixedLayout(Layout):
    """A Layout of several Spans."""

    def __init__(self, spans, begins):
        super().__init__(spans, begins)
        self.counts = tuple(end - begin for begin, end in zip(self.begins, self.ends))

    def kept(self, gradients):
        """See Layout."""
        pieces = each(ops.partial(_kept, gradients), self.spans, self.begins, self.ends)
        return ops.cast(ops.concat(pieces, 0), ms.float32)

    def used(self, weights, dtype):
        """See Layout."""
        return each(_used, self.spans, divide(ops.cast(weights, dtype), self.counts))


def _kept(gradients, span, begin, end):
    return span.kept(gradients[begin:end])


def _used(span, weights):
    return span.used(weights)

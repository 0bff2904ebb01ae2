"""A cell that is one pure function of its inputs and weights, compiled once for all cells that share the function.

A transformer repeats one block many times. Compiled as one graph, compile time and live activations grow with the
number of blocks. A `SharedGraph` called from PyNative compiles its function once per set of shapes and passes the
weights as arguments, so the n-th block costs no compilation and reuses the memory of the one before. Inside a graph
(graph mode, `mindspore.jit`, `mindspore.export`) it dissolves into the surrounding graph.

Gradients of such chains: ops/gradients.py.
"""

import time
from contextlib import contextmanager
from functools import cache

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.common.api import _pynative_executor

from mindsigma.ops.kernels import NATIVE, differentiable
from mindsigma.ops.low_rank import gradients_of_merge, merge, regroup
from mindsigma.ops.native import operations as native

_first_calls = {}  # compile key: seconds of the call that compiled it
_shortest_calls = {}  # compile key: seconds of the shortest call after it
ASLEEP = 0.9  # share of these that is waited for asleep
SHORTEST_SLEEP = 2e-4  # seconds; sleeping costs about a quarter of that


def compiled_graphs():
    """Number of shared graphs compiled so far."""
    return len(_first_calls)


def compile_seconds():
    """Seconds spent in the first calls of shared graphs, which compile them."""
    return sum(_first_calls.values())


def with_layout(function, layout):
    """`function` of a flat tuple of arguments, the last of them tensors in a `layout` (ops/low_rank.py) of weights.

    None: the weights have no changes.
    """
    if layout is None:
        return function

    def with_changes(*arguments):
        begin = len(arguments) - sum_of_lengths
        return function(*arguments[:begin], *regroup(arguments[begin:], layout))

    sum_of_lengths = len(layout) + sum(2 + (change[1] >= 0) for changes in layout for change in changes)
    return with_changes


@cache
def _compiled(function, layout):
    return ms.jit(with_layout(function, layout))


def signature(value):
    """What an argument contributes to a compile key."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


_recorders = []  # of ops/gradients.py, the last one active


@contextmanager
def recorded_by(recorder):
    """Give `recorder.record` every call of a shared graph from PyNative: the graph, its inputs and its result."""
    _recorders.append(recorder)
    try:
        yield
    finally:
        _recorders.pop()


def timed(key, function, arguments):
    """Result of a compiled function; its first call with a `key`, which compiles it, counts in `compile_seconds`.

    Waits for the result: calls that queue up make MindSpore's threads, which spin, compete for the cores, and a
    training step took half as long again. Waiting spins, too, and a thread that is descheduled for it comes back
    milliseconds later; so most of the time that the shortest call took is slept.
    """
    start = time.perf_counter()
    result = function(*arguments)
    rest = ASLEEP * _shortest_calls.get(key, 0.0) - (time.perf_counter() - start)
    if rest > SHORTEST_SLEEP:
        time.sleep(rest)
    wait_for(result)
    seconds = time.perf_counter() - start
    if key in _first_calls:
        _shortest_calls[key] = min(seconds, _shortest_calls.get(key, seconds))
    _first_calls.setdefault(key, seconds)
    return result


def wait_for(result):
    """A tensor or a tuple, once it has been computed."""
    for value in result if isinstance(result, tuple) else (result,):
        if isinstance(value, Tensor):
            value.data_ptr()
    return result


class SharedGraph(nn.Cell):
    """Calls `function(*inputs, *static, *weights)`.

    Args:
        function: module-level function of tensors, Python constants and weights.
        weights: Parameters owned by other cells, in the order the function takes them.
        static: Python constants (numbers, strings, None) that select a variant; part of the compile key. In training
            and for gradients, kernels without a gradient among them are replaced (ops/kernels.py).
        compute_dtype: dtype that the weights are cast to for the computation, or None to use them as they are.
        keeping: what a chain whose gradients are wanted calls instead (ops/gradients.py), or None: a pair of functions,
            for PyNative. The first takes what `function` does and returns its result, a tensor, and what to keep; the
            second returns the gradients of inputs and weights, from `(gradient, kept, *inputs, *static, *weights)`.
            Changes of the weights are merged into them first.
        of_operations: the function is little else than operations of ops/native where the static arguments name these
            kernels and all tensors are fp32: then PyNative calls it as it is, uncompiled.
    """

    def __init__(self, function, weights=(), static=(), compute_dtype=None, keeping=None, of_operations=False):
        super().__init__()
        self.function = function
        self.of_operations = of_operations and NATIVE in static
        self.keeping = keeping
        self.static = tuple(static)
        self.differentiable_static = tuple(map(differentiable, static))
        self.compute_dtype = compute_dtype
        # Set past nn.Cell.__setattr__, which would register the Parameters a second time under this cell's name.
        object.__setattr__(self, "weights", tuple(weights))
        object.__setattr__(self, "changes", ())
        self.layout = None
        object.__setattr__(self, "_pointers", None)

    def adapt(self, changes):
        """Compute with low-rank changes of the weights (ops/low_rank.py) from now on, instead of those before.

        Args:
            changes: dict id of a weight -> list of (A, B, magnitude or None, index, count, scale, kernels), the first
                three fp32 Parameters. Weights of other graphs may be among them.
        """
        tensors, layout = [], []
        for weight in self.weights:
            row = ()
            for a, b, magnitude, *rest in changes.get(id(weight), ()):
                place = len(self.weights) + len(tensors)
                tensors += [a, b] if magnitude is None else [a, b, magnitude]
                row += ((place, -1 if magnitude is None else place + 2, *rest),)
            layout.append(row)
        object.__setattr__(self, "changes", tuple(tensors))
        self.layout = tuple(layout) if tensors else None
        self.forget_weights()

    def __call__(self, *inputs):
        differentiating = self.requires_grad or _pynative_executor.requires_grad()
        if ms.get_context("mode") == ms.GRAPH_MODE or differentiating:
            return super().__call__(*inputs)
        self._refresh()
        # A gradient needs the whole chain in kernels that have one: keys of one kind do not fit queries of another.
        static = self.differentiable_static if _recorders else self.static
        kept = None
        if _recorders and self.keeping:
            result, kept = self.keeping[0](*inputs, *static, *self.merged_weights())
        elif not _recorders and self._is_of_operations(inputs):
            result = wait_for(self.function(*inputs, *static, *self._aliases))
        else:
            key = (self.function, static, self.layout, tuple(map(signature, inputs)), self._weight_signature)
            result = timed(key, _compiled(self.function, self.layout), (*inputs, *static, *self._aliases))
        if _recorders:
            _recorders[-1].record(self, inputs, result, kept)
        return result

    def _is_of_operations(self, inputs):
        if not self.of_operations or self.layout is not None:
            return False
        return all(native.takes(value) for value in inputs + self._aliases if isinstance(value, Tensor))

    def merged_weights(self):
        """The weights as tensors, with their changes merged into them."""
        self._refresh()
        weights = list(self._aliases[: len(self.weights)])
        if self.layout is None:
            return weights
        merged = timed((merge, self.layout, self._weight_signature), _compiled(merge, self.layout), self._aliases)
        for i, weight in zip((i for i, changes in enumerate(self.layout) if changes), merged):
            weights[i] = weight
        return weights

    def gradients_of_changes(self, gradients):
        """Gradients of the changes, from those of `merged_weights`."""
        if self.layout is None:
            return ()
        of_merged = [gradient for gradient, changes in zip(gradients, self.layout) if changes]
        key = (gradients_of_merge, self.layout, self._weight_signature)
        return timed(key, _compiled(gradients_of_merge, self.layout), (*of_merged, *self.originals()))

    def originals(self):
        """Tensors that share the memory of the weights and of their changes, in the Parameters' dtypes."""
        self._refresh()
        return self._originals

    def forget_weights(self):
        """Let go of the weights of the last call, which would outlive `Parameter.set_data` until the next."""
        for name in ("_pointers", "_originals", "_aliases"):
            object.__setattr__(self, name, None)

    def _computed(self, i, weight):
        if self.compute_dtype is None or i >= len(self.weights):
            return weight
        return weight.astype(self.compute_dtype)

    def _refresh(self):
        """Bring the tensors that stand for the weights up to date."""
        tensors = self.weights + self.changes
        pointers = tuple(tensor.data_ptr() for tensor in tensors)
        if pointers == self._pointers:
            return
        # A Parameter is part of the compile key by its name, a Tensor only by shape and dtype. Tensor(parameter)
        # shares its memory and follows updates in place (unless it is cast); Parameter.set_data brings other memory.
        # The aliases themselves are kept, so that no later tensor can have the address of one that was cast.
        object.__setattr__(self, "_originals", tuple(map(Tensor, tensors)))
        object.__setattr__(
            self, "_aliases", tuple(self._computed(i, tensor) for i, tensor in enumerate(self._originals))
        )
        object.__setattr__(self, "_pointers", pointers)
        object.__setattr__(self, "_weight_signature", tuple(map(signature, self._aliases)))

    def construct(self, *inputs):
        weights = self.weights
        if self.compute_dtype is not None:
            weights = ()
            for weight in self.weights:
                weights += (weight.astype(self.compute_dtype),)
        if self.layout is not None:
            weights = regroup(weights + self.changes, self.layout)
        static = self.differentiable_static if self.training else self.static
        return self.function(*inputs, *static, *weights)

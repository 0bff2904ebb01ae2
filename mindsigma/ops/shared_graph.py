"""A cell that is one pure function of its inputs and weights, compiled once for all cells that share the function.

A transformer repeats one block many times. Compiled as one graph, compile time and live activations grow with the
number of blocks. A `SharedGraph` called from PyNative compiles its function once per set of shapes and passes the
weights as arguments, so the n-th block costs no compilation and reuses the memory of the one before. Inside a graph
(graph mode, `mindspore.jit`, `mindspore.export`) it dissolves into the surrounding graph.
"""

import time
from functools import cache

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.common.api import _pynative_executor

_first_calls = {}  # compile key: seconds of the call that compiled it


def compiled_graphs():
    """Number of shared graphs compiled so far."""
    return len(_first_calls)


def compile_seconds():
    """Seconds spent in the first calls of shared graphs, which compile them."""
    return sum(_first_calls.values())


@cache
def _compiled(function):
    return ms.jit(function)


def _signature(value):
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


class SharedGraph(nn.Cell):
    """Calls `function(*inputs, *static, *weights)`.

    Args:
        function: module-level function of tensors, Python constants and weights.
        weights: Parameters owned by other cells, in the order the function takes them.
        static: Python constants (numbers, strings, None) that select a variant; part of the compile key.
    """

    def __init__(self, function, weights=(), static=()):
        super().__init__()
        self.function = function
        self.static = tuple(static)
        # Set past nn.Cell.__setattr__, which would register the Parameters a second time under this cell's name.
        object.__setattr__(self, "weights", tuple(weights))
        object.__setattr__(self, "_pointers", None)

    def __call__(self, *inputs):
        differentiating = self.requires_grad or _pynative_executor.requires_grad()
        if ms.get_context("mode") == ms.GRAPH_MODE or differentiating:
            return super().__call__(*inputs)
        pointers = tuple(weight.data_ptr() for weight in self.weights)
        if pointers != self._pointers:
            self._alias(pointers)
        key = (self.function, self.static, tuple(map(_signature, inputs)), self._weight_signature)
        start = time.perf_counter()
        result = _compiled(self.function)(*inputs, *self.static, *self._aliases)
        _first_calls.setdefault(key, time.perf_counter() - start)
        return result

    def _alias(self, pointers):
        # A Parameter is part of the compile key by its name, a Tensor only by shape and dtype. Tensor(parameter)
        # shares its memory and follows updates in place; Parameter.set_data brings other memory.
        object.__setattr__(self, "_aliases", tuple(Tensor(weight) for weight in self.weights))
        object.__setattr__(self, "_pointers", pointers)
        object.__setattr__(self, "_weight_signature", tuple(map(_signature, self._aliases)))

    def construct(self, *inputs):
        return self.function(*inputs, *self.static, *self.weights)

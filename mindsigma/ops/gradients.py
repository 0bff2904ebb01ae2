"""Gradients of chains of shared graphs, from PyNative: what a graph took is kept, its backward pass is compiled once.

MindSpore's own tape keeps every intermediate result of every graph. Here a chain runs forward as in inference, and of
each call only its inputs are kept. Backwards, one compiled function a kind of graph computes the gradients of the
graph's inputs and weights from those inputs and the gradients of its outputs; what it needs of the forward pass it
computes again. So the finer the graphs, the less is computed twice; the coarser, the less memory is held. A graph that
brings its own backward pass (`SharedGraph.keeping`) keeps what that needs.
"""

from functools import cache

import mindspore as ms
from mindspore import dtype as mstype
from mindspore import ops

from mindsigma.ops.derivatives import seed
from mindsigma.ops.native import direct
from mindsigma.ops.shared_graph import recorded_by, signature, timed, with_layout


def value_and_gradients(function, parameters, inputs):
    """Result of `function(*inputs)`, and the gradients of its first value with respect to Parameters, in PyNative.

    Args:
        function: returns a tuple whose first is a scalar tensor. What it computes with `parameters`, and with anything
            that depends on them, it computes in shared graphs: other operations are taken for constants.
        parameters: list of Parameter.
        inputs: tensors.

    Returns:
        the result of the function, and a tuple of gradients in the order of the parameters.
    """
    tape = _Tape(parameters)
    with recorded_by(tape):
        result = function(*inputs)
    return result, tape.gradients_of(result[0])


class _Tape:
    """Calls of shared graphs whose results depend on Parameters."""

    def __init__(self, parameters):
        self._parameters = parameters
        self._wanted = {id(parameter) for parameter in parameters}
        self._calls = []
        self._dependent = set()  # ids of results, which the calls keep alive

    def record(self, graph, inputs, result, kept):
        """Note a call, if a gradient will pass through it."""
        tensors = graph.weights + graph.changes
        of_inputs = tuple(i for i, value in enumerate(inputs) if id(value) in self._dependent)
        of_weights = tuple(i for i, tensor in enumerate(tensors) if id(tensor) in self._wanted)
        if of_inputs or of_weights:
            results = result if isinstance(result, tuple) else (result,)
            self._calls.append((graph, inputs, of_inputs, of_weights, results, kept))
            self._dependent.update(map(id, results))

    def gradients_of(self, value):
        """Gradients of a scalar result with respect to the Parameters; forgets the calls."""
        found, sums = {id(value): ops.ones_like(value)}, set()
        while self._calls:
            graph, inputs, of_inputs, of_weights, results, kept = self._calls.pop()
            given = tuple(i for i, result in enumerate(results) if id(result) in found)
            if given:
                gradients = [found.pop(id(results[i])) for i in given]
                if kept is None:
                    gradients = _backward(graph, inputs, of_inputs, of_weights, given, gradients)
                else:
                    gradients = _own_backward(graph, inputs, of_inputs, of_weights, gradients[0], kept)
                tensors = graph.weights + graph.changes
                keys = [id(inputs[i]) for i in of_inputs] + [id(tensors[i]) for i in of_weights]
                for key, gradient in zip(keys, gradients):
                    if key not in found:
                        found[key] = gradient
                        sums.discard(key)
                    elif key in sums and gradient.dtype == mstype.float32 and direct.available():
                        direct.add_to(found[key], gradient)
                    else:
                        found[key] = found[key] + gradient
                        sums.add(key)  # a tensor that nobody else has
            graph.forget_weights()  # which an optimiser is about to replace
        missing = [parameter.name for parameter in self._parameters if id(parameter) not in found]
        if missing:
            raise RuntimeError(f"the result does not depend on {missing[0]} through shared graphs")
        return tuple(found[id(parameter)] for parameter in self._parameters)


def _own_backward(graph, inputs, of_inputs, of_weights, gradient, kept):
    """`_backward` by the graph's own function."""
    arguments = (gradient, kept, *inputs, *graph.differentiable_static, *graph.merged_weights())
    found = graph.keeping[1](*arguments)
    of_tensors = found[len(inputs) :] + tuple(graph.gradients_of_changes(found[len(inputs) :]))
    return [found[i] for i in of_inputs] + [of_tensors[i] for i in of_weights]


def _backward(graph, inputs, of_inputs, of_weights, given, gradients):
    """Gradients of inputs and of weights, by their positions, from those of the `given` ones of the results."""
    weights, begin = graph.originals(), len(inputs)
    cast = None if graph.compute_dtype is None else (begin, begin + len(graph.weights), graph.compute_dtype)
    positions = of_inputs + tuple(begin + i for i in of_weights)
    kind = (
        graph.function,
        graph.differentiable_static,
        graph.layout,
        begin,
        begin + len(weights),
        positions,
        given,
        cast,
    )
    arguments = (*inputs, *weights, *gradients)
    return timed((kind, tuple(map(signature, arguments))), _compiled_backward(*kind), arguments)


@cache
def _compiled_backward(function, static, layout, place, count, positions, given, cast):
    """Function of the `count` tensors that a graph takes and of its results' gradients, to gradients at `positions`.

    `place`: where the `static` arguments belong between the tensors; `given`: results that have a gradient; `cast`:
    (begin, end, dtype) of the tensors that the graph takes in another dtype than that of their gradients.
    """
    forward = with_layout(function, layout)

    def value(wanted, arguments):
        taken = ()
        for i in range(count):
            if i == place:
                taken += static
            argument = wanted[positions.index(i)] if i in positions else arguments[i]
            if cast is not None and cast[0] <= i < cast[1]:
                argument = argument.astype(cast[2])
            taken += (argument,)
        if count == place:
            taken += static
        results = forward(*taken)
        if not isinstance(results, tuple):
            return seed(results, arguments[count])
        total = seed(results[given[0]], arguments[count])
        for i in range(1, len(given)):
            total = total + seed(results[given[i]], arguments[count + i])
        return total

    def backward(*arguments):
        wanted = ()
        for i in positions:
            wanted += (arguments[i],)
        return ms.grad(value, 0)(wanted, arguments)

    return ms.jit(backward)

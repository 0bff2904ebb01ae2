"""Cells whose inputs are flat lists of tensors, which is all that an exported graph takes."""

import mindspore as ms
from mindspore import Tensor, nn
from mindspore.common.initializer import Zero


def zeros(array):
    """Tensor of zeros like an Array of a graph, or like (shape, MindSpore dtype)."""
    shape, dtype = array if isinstance(array, tuple) else (array.dims, DTYPES[array.dtype])
    return Tensor(shape=tuple(shape), dtype=dtype, init=Zero()).init_data()


DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16, "int32": ms.int32, "bool": ms.bool_}


def like(results):
    """Tensors of zeros, nested like the results of a Graph."""
    return tuple(map(like, results)) if isinstance(results, tuple) else zeros(results.array)


class FlatInputs(nn.Cell):
    """Calls a cell, or a bound function of one, with arguments put together from a flat list of tensors.

    Args:
        function: what is called.
        owner: the cell whose parameters it reads.
        arguments: what it takes: tensors, and tuples of tensors nested to any depth, become inputs of the graph; all
            else is constant.

    Attributes:
        beside: other cells of the same make that run beside it, for whom plans it.
    """

    beside = ()

    def __init__(self, function, owner, arguments):
        super().__init__(auto_prefix=False)
        self.owner = owner
        self.function = function
        self.inputs = []
        self.arguments = nn.CellList([self._part(argument) for argument in arguments])

    def _part(self, argument):
        if isinstance(argument, Tensor):
            self.inputs.append(argument)
            return _Input(len(self.inputs) - 1)
        if isinstance(argument, tuple):
            return _Tuple([self._part(one) for one in argument])
        return _Constant(argument)

    def construct(self, *tensors):
        arguments = ()
        for part in self.arguments:
            arguments += (part(tensors),)
        return self.function(*arguments)

    def init_parameters_data(self, auto_parallel_mode=False):
        """No parameter: what has no values yet needs none to be exported, and MindSpore would make them after it
        compiled the graph, 12 GB for T5-XXL.
        """
        return {}


class _Input(nn.Cell):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def construct(self, tensors):
        return tensors[self.index]


class _Tuple(nn.Cell):
    def __init__(self, parts):
        super().__init__()
        self.parts = nn.CellList(parts)

    def construct(self, tensors):
        result = ()
        for part in self.parts:
            result += (part(tensors),)
        return result


class _Constant(nn.Cell):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def construct(self, tensors):
        return self.value

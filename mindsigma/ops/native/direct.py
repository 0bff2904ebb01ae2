"""Calls of the native library past MindSpore, whose own cost some milliseconds: fp32 tensors, in the calling thread.

A tensor's memory is asked for by `data_ptr`, which waits until it has been computed; what reads a tensor that is
updated in place must have been waited for, too, as shared graphs do.
"""

import ctypes
import functools

import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.ops.native.library import library

# What blocks saved and need no more, all of one size, for the next step: memory that is new to the process is slow.
_unused = []
MOST_UNUSED = 512 << 20  # bytes

EMPTY = 2  # what a function returns where there is no answer, as an input has no elements

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


@functools.cache
def _functions():
    path = library()
    if path is None:
        return None
    functions = ctypes.CDLL(path)
    functions.update_adamw.argtypes = [_POINTER] * 4 + [_COUNT] + [_FLOAT] * 6
    functions.update_average.argtypes = [_POINTER] * 2 + [_COUNT, _FLOAT]
    functions.add_to.argtypes = [_POINTER] * 2 + [_COUNT]
    functions.sum_of_squares.argtypes = [_POINTER, _COUNT]
    functions.update_adamw.restype = functions.update_average.restype = functions.add_to.restype = None
    functions.sum_of_squares.restype = ctypes.c_double
    functions.floats_of_training_block.argtypes = [_COUNT] * 6
    functions.floats_of_training_block.restype = _COUNT
    return functions


def bits(*numbers):
    """int32 array of whole numbers, and of floats by their bits."""
    return np.array([np.float32(n).view(np.int32) if isinstance(n, float) else n for n in numbers], np.int32)


def available():
    """Whether there is a library."""
    return _functions() is not None


def uses_amx():
    """Whether products run on AMX tiles."""
    return bool(_functions().uses_amx())


def update_adamw(parameter, gradient, m, v, clip, decay, rate, beta1, beta2, eps):
    """AdamW of four tensors of one shape, the first, m and v in place.

    Args:
        clip: factor of the gradient; decay: of the parameter.
        rate, eps: with the corrections of m and v for their start at zero.
    """
    pointers = (parameter.data_ptr(), gradient.data_ptr(), m.data_ptr(), v.data_ptr())
    _functions().update_adamw(*pointers, parameter.size, clip, decay, rate, beta1, beta2, eps)


def update_average(mean, value, decay):
    """mean = decay * mean + (1 - decay) * value, in place."""
    _functions().update_average(mean.data_ptr(), value.data_ptr(), mean.size, decay)


def add_to(total, x):
    """total += x, in place."""
    _functions().add_to(total.data_ptr(), x.data_ptr(), total.size)


def sum_of_squares(x):
    """Sum of the squares of a tensor as a float, summed in float64."""
    return _functions().sum_of_squares(x.data_ptr(), x.size)


def training_block(x, modulation, caption, kept, table, numbers, weights):
    """`operations.training_block` with a second result: an array for `training_block_gradient`.

    kept: array (N, L); the other arguments are tensors.
    """
    inputs = (bits(*numbers), x, modulation, caption, kept, table, *weights)
    floats = _functions().floats_of_training_block(numbers[0], *x.shape, caption.shape[1], weights[-4].shape[0])
    out = tensor(x.shape)
    saved = _unused.pop() if _unused and _unused[-1].size == floats else np.empty(floats, np.float32)
    call("training_block", (*inputs, out, saved))
    return out, saved


def training_block_gradient(gradient, saved, x, modulation, caption, kept, table, numbers, weights):
    """`operations.training_block_gradient` with what `training_block` saved, and takes back: a tuple of tensors."""
    inputs = (bits(*numbers), gradient, saved, x, modulation, caption, kept, table, *weights)
    results = tuple(tensor(like.shape) for like in (x, modulation, caption, table, *weights))
    call("training_block_gradient", (*inputs, *results))
    if _unused and _unused[-1].size != saved.size:
        _unused.clear()
    if (len(_unused) + 1) * saved.nbytes <= MOST_UNUSED:
        _unused.append(saved)
    return results


def tensor(shape):
    """fp32 tensor, whatever is in it. (MindSpore would fill it with zeros, in memory that is new to the process.)"""
    return Tensor.from_numpy(np.empty(shape, np.float32))


def call(name, values):
    """Call a function as MindSpore does, with tensors and arrays, the last of them for the results.

    Raises MindSigmaError where there is no answer, as an input has no rows; MemoryError.
    """
    count = len(values)
    values = [value if isinstance(value, np.ndarray) else value.contiguous() for value in values]
    pointers = [value.ctypes.data if isinstance(value, np.ndarray) else value.data_ptr() for value in values]
    shapes = [(ctypes.c_int64 * value.ndim)(*value.shape) for value in values]
    addresses = [ctypes.addressof(shape) for shape in shapes]
    ranks = (ctypes.c_int * count)(*(value.ndim for value in values))
    arguments = (_POINTER * count)(*pointers), ranks, (_POINTER * count)(*addresses)
    fault = _entry(name)(count, *arguments, None, None, None)
    if fault == EMPTY:
        raise MindSigmaError(f"{name}: there is no answer for tensors of {', '.join(str(v.shape) for v in values)}")
    if fault:
        raise MemoryError(f"no memory for {name}")


@functools.cache
def _entry(name):
    function = getattr(_functions(), name)
    function.argtypes = [ctypes.c_int] + [_POINTER] * 6
    return function

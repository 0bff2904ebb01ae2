"""Updates of fp32 tensors in place on the native kernels, past MindSpore: one pass over memory.

A tensor's memory is asked for by `data_ptr`, which waits until it has been computed; what reads it must have been
waited for, too, as shared graphs do.
"""

import ctypes
import functools

from mindsigma.ops.native.library import library

_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


@functools.cache
def _functions():
    path = library()
    if path is None:
        return None
    functions = ctypes.CDLL(path)
    functions.update_adamw.argtypes = [_POINTER] * 4 + [_COUNT] + [_FLOAT] * 6
    functions.update_average.argtypes = [_POINTER] * 2 + [_COUNT, _FLOAT]
    functions.sum_of_squares.argtypes = [_POINTER, _COUNT]
    functions.update_adamw.restype = functions.update_average.restype = None
    functions.sum_of_squares.restype = ctypes.c_double
    return functions


def available():
    """Whether there is a library."""
    return _functions() is not None


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


def sum_of_squares(x):
    """Sum of the squares of a tensor as a float, summed in float64."""
    return _functions().sum_of_squares(x.data_ptr(), x.size)

"""The sums of a sampler's step in NumPy: the same formulas, on arrays.

In a drawing process MindSpore hands its products to a thread of its own, which turns in a loop. Beside other busy
processes each of them took 4 ms instead of 0.04.
"""

import functools

import numpy as np
from mindspore import Tensor

from mindsigma.backends.cpu import kernels
from mindsigma.sampling.sampler import LinearMultistep, PredictorCorrector


class OnArrays:
    """Before a Sampler among the bases of a class: hands its `construct` arrays instead of tensors."""

    def construct(self, latents, history, numbers, noise, variance, fresh=None):
        """See Sampler."""
        x, noise, fresh = (None if t is None else kernels.array(t) for t in (latents, noise, fresh))
        x, history = super().construct(x, tuple(map(kernels.array, history)), numbers, noise, None, fresh)
        return _tensor(x), tuple(map(_tensor, history))


def accelerate_sampler(sampler, dit):
    """Make a Sampler whose step is sums alone one on arrays, if the network beside it is accelerated. Returns it."""
    from mindsigma.backends.cpu import is_accelerated

    if isinstance(sampler, (LinearMultistep, PredictorCorrector)) and is_accelerated(dit):
        object.__setattr__(sampler, "__class__", _on_arrays(type(sampler)))
    return sampler


@functools.cache
def _on_arrays(kind):
    return type(kind.__name__, (OnArrays, kind), {"__doc__": kind.__doc__})


def _tensor(x):
    return x if isinstance(x, Tensor) else Tensor(np.ascontiguousarray(x, np.float32))

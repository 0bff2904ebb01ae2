"""A training step whose passes over all weights are the native library's: norm, AdamW and averages in one pass each."""

import contextlib
import ctypes
import time
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.backends.cpu.library import library
from mindsigma.backends.cpu.shared_mean import SharedMean
from mindsigma.training.optimizers import decays
from mindsigma.training.step import TrainingStep

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
_POINTER, _COUNT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float


def accelerate_step(training):
    """Replace the passes over the weights of a TrainingStep. Returns it.

    Nothing is done unless MindSpore runs PyNative on a CPU, the weights that learn are the network's own, in fp32, and
    there is a library. On a CPU memory that is freed is kept for the next step, whatever computes it.
    """
    pynative_cpu = ms.get_context("device_target") == "CPU" and ms.get_context("mode") == ms.PYNATIVE_MODE
    if pynative_cpu:
        keep_freed_memory()
    if type(training) is TrainingStep and pynative_cpu and library() is not None and not training.masters:
        object.__setattr__(training, "__class__", FastStep)
    return training


@cache
def keep_freed_memory():
    """Have the C library keep what this process frees, for its next tensors.

    It would hand large pieces back to the system, which clears every page of the next one: a third of the time of a
    step of XL/2, whose gradients alone are 2.4 GB.
    """
    with contextlib.suppress(AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


class FastStep(TrainingStep):
    """TrainingStep in PyNative, where the host knows whether a step is finite and leaves out the updates of others."""

    _waited, _shared = 0.0, None

    def means(self, gradients):
        """See TrainingStep; through shared memory where the processes have some."""
        if self.collectives.alone:
            return gradients
        began = time.perf_counter()
        if self._shared is None:
            self._shared = SharedMean(self.collectives, sum(gradient.size for gradient in gradients))
        if self._shared.works:
            means = self._shared([gradient.asnumpy() for gradient in gradients])
            gradients = tuple(
                Tensor(self.shares.own_of(mean[0])[None] if own and self.shares.stage == 2 else mean)
                for own, mean in zip(self.divided, means)
            )
        else:
            gradients = super().means(gradients)
        self._waited += time.perf_counter() - began
        return gradients

    def waited(self):
        """See TrainingStep; in the sums of gradients."""
        waited, self._waited = self._waited, 0.0
        return waited

    def square_sums(self, gradients):
        """See TrainingStep; summed in float64."""
        sums = [_functions().sum_of_squares(gradient.data_ptr(), gradient.size) for gradient in map(_whole, gradients)]
        return Tensor(np.array(sums, np.float32))

    def update(self, values, finite, gradients):
        """See TrainingStep."""
        if finite.asnumpy()[0] > 0.5:
            return super().update(values, finite, gradients)
        return finite

    def update_group(self, rate, corrections, factor, finite, k, gradient):
        """See TrainingStep; a group is one tensor, or this process's rows of one."""
        parameter, states, divided = self.group_parameters[k][0], self.group_states[k], self.divided[k]
        share = self.portions[k]
        gradient = share.of_mean(gradient)
        if self.optimizer.name == "adamw":
            self._update_adamw((rate, *corrections, factor), k, _whole(gradient), *states)
            own = self.own_weights(k) if divided else parameter.expand_dims(0)
        else:
            own, news = self.rules[k].update(
                self.own_weights(k), gradient * factor, rate, corrections, states, share.means
            )
            for state, new in zip(states, news):
                state.set_data(new)
        whole = share.in_network(own, self.dtype)
        if divided or self.optimizer.name != "adamw":
            parameter.set_data(whole.reshape(parameter.shape))
        if self.averaging:
            self.update_average(finite, k, own if self.own_averages else whole)
        return ()

    def _update_adamw(self, numbers, k, gradient, m, v):
        rate, correction_1, correction_2, factor = (float(number.asnumpy()[0]) for number in numbers)
        root = correction_2**0.5
        (eps,), (first, second) = self.optimizer.eps, decays(self.optimizer)
        constants = factor, 1.0 - rate * self.optimizer.weight_decay, rate * root / correction_1
        pointers = (tensor.data_ptr() for tensor in (gradient, m, v))
        _functions().update_adamw(
            self._own_pointer(k), *pointers, gradient.size, *constants, *first, *second, eps * root
        )

    def update_average(self, finite, k, weights):
        """See TrainingStep; called where the step is finite."""
        average, parameter = self.group_averages[k][0], self.group_parameters[k][0]
        pointer = self._own_pointer(k) if self.own_averages else parameter.data_ptr()
        parts = self.config.ema_decay, self.averaged_part
        _functions().update_average(average.data_ptr(), pointer, average.size, *parts)
        return average

    def _own_pointer(self, k):
        """Where this process's rows of the tensor of group k begin."""
        parameter = self.group_parameters[k][0]
        first = self.shares.rank * (parameter.nbytes // self.shares.count) if self.divided[k] else 0
        return parameter.data_ptr() + first


def _whole(tensor):
    """A tensor that lies in one piece."""
    return tensor if tensor.is_contiguous() else tensor.contiguous()


@cache
def _functions():
    functions = library()
    functions.update_adamw.argtypes = [_POINTER] * 4 + [_COUNT] + [_FLOAT] * 8
    functions.update_average.argtypes = [_POINTER] * 2 + [_COUNT] + [_FLOAT] * 2
    functions.sum_of_squares.argtypes = [_POINTER, _COUNT]
    functions.update_adamw.restype = functions.update_average.restype = None
    functions.sum_of_squares.restype = ctypes.c_double
    return functions

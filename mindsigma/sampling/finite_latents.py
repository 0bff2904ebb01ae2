"""Latents that cease to be numbers: told with the step, without waiting for the device at each of them."""

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from mindsigma.errors import MindSigmaError
from mindsigma.runtime import device


class FiniteLatents:
    """Collects on the device whether latents ceased to be finite; `check` fetches it.

    Args:
        remedy: what to do if a step made them infinite.
    """

    def __init__(self, remedy):
        self._remedy, self._notes = remedy, []

    def note(self, latents, step, by_caller=False):
        """Latents after a Step, or as the caller's callback left them."""
        place = f"step {step.index + 1} of {step.total} (timestep {step.timestep:g})"
        fault, remedy = f"{place} left NaN or infinity in the latents", self._remedy
        if by_caller:
            fault = f"callback_on_step_end left NaN or infinity in the latents of {place}"
            remedy = "return finite latents, or None to leave them as they are"
        self._notes.append((_any_bad(latents), f"{fault}; {remedy}"))

    def check(self):
        """Raise MindSigmaError that names the first step after which latents were not finite."""
        notes, self._notes = self._notes, []
        for bad, fault in notes:
            if bool(bad.asnumpy()):
                raise MindSigmaError(fault)


def require_finite(what, value, remedy):
    """`value`, a Tensor or an array of any float dtype, if it is all finite; else raises MindSigmaError."""
    bad = _any_bad(value).asnumpy() if isinstance(value, Tensor) else not np.isfinite(value).all()
    if bool(bad):
        raise MindSigmaError(f"{what} hold NaN or infinity; {remedy}")
    return value


def _any_bad(tensor):
    """Whether a number is not finite. Asked so that the zeros of a dry run mean no.

    On a CPU MindSpore's own question wakes threads that then turn in loops for the whole next step.
    """
    if tensor.dtype == ms.float32 and device() == "CPU":
        return Tensor(not np.isfinite(tensor.asnumpy()).all())
    return ops.logical_not(ops.isfinite(tensor)).any()

"""Arrays of a checkpoint to tensors of a network."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.finite import all_finite, finite


def as_tensor(array, dtype):
    """Tensor of a MindSpore float dtype with a copy of the values of an ndarray."""
    if dtype == ms.bfloat16:
        return Tensor(np.asarray(array, np.float32)).astype(dtype)
    # Not Tensor.from_numpy: sharing memory with NumPy ends in heap corruption when the process exits (MindSpore 2.7.1).
    return Tensor(np.ascontiguousarray(array, {ms.float32: np.float32, ms.float16: np.float16}[dtype]))


def weight_tensor(path, name, array, dtype):
    """`as_tensor` of the tensor `name` of the file `path`; raises MindSigmaError where it holds NaN or infinity."""
    finite(path, name, array)
    if dtype == ms.float16 and array.dtype != np.float16:
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float16)
        if not all_finite(array):
            raise MindSigmaError(
                f"{path}: tensor '{one_line(name)}' goes beyond half precision (65504); use fp32 or bf16 (--dtype)"
            )
    return as_tensor(array, dtype)

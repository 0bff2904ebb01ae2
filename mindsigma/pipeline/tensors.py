"""Arrays of a checkpoint to tensors of a network."""

import mindspore as ms
import numpy as np
from mindspore import Tensor


def as_tensor(array, dtype):
    """Tensor of a MindSpore float dtype with a copy of the values of an ndarray."""
    if dtype == ms.bfloat16:
        return Tensor(np.asarray(array, np.float32)).astype(dtype)
    # Not Tensor.from_numpy: sharing memory with NumPy ends in heap corruption when the process exits (MindSpore 2.7.1).
    return Tensor(np.ascontiguousarray(array, {ms.float32: np.float32, ms.float16: np.float16}[dtype]))

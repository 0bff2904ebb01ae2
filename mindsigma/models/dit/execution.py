"""How a DiT computes, apart from what: dtypes, kernels, and the shared graphs that carry them."""

from dataclasses import dataclass
from typing import Any

from mindspore import dtype as mstype

from mindsigma.ops.kernels import for_ascend, has_flash_attention
from mindsigma.ops.shared_graph import SharedGraph


@dataclass(frozen=True)
class Execution:
    """The choices.

    Attributes:
        dtype: MindSpore dtype of activations.
        kernels: see ops/kernels.py.
        parameter_dtype: MindSpore dtype of the weights.
        fp32_attention: self-attention in fp32.
    """

    dtype: Any
    kernels: str
    parameter_dtype: Any
    fp32_attention: bool

    @property
    def ascend_block(self):
        """Whether blocks are those of ascend_block.py; those of block.py take attention in fp32, too."""
        return for_ascend(self.kernels) and has_flash_attention(self.kernels, self.dtype) and not self.fp32_attention

    @property
    def native(self):
        """Whether activations and weights are what the native kernels take."""
        return self.dtype == mstype.float32 and self.parameter_dtype == mstype.float32

    def graph(self, function, weights, static, keeping=None, of_operations=False):
        """SharedGraph whose weights come in the dtype of the activations."""
        compute_dtype = None if self.parameter_dtype == self.dtype else self.dtype
        return SharedGraph(function, weights, static, compute_dtype, keeping, of_operations)

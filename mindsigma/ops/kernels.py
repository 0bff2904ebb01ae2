"""Which implementation of the fused operations the graphs use: mathematics, native or Ascend kernels, or stand-ins."""

from mindspore import dtype as mstype

from mindsigma.errors import MindSigmaError
from mindsigma.ops.native import operations as native
from mindsigma.runtime import device

MATH = "math"  # compositions that every backend runs
FUSED = "fused"  # Ascend kernels: FlashAttentionScore, LayerNormExt, RmsNorm, GeLU, Addcmul, Dense
STAND_IN = "stand-in"  # the graph of FUSED with the documented semantics of its kernels in portable operations
NATIVE = "native"  # C++ kernels for the CPU (ops/native), in fp32; mathematics for other dtypes
TRAINING = "native-training"  # what has a gradient in place of NATIVE: linear maps and attention on its kernels

KERNELS = (MATH, FUSED, STAND_IN, NATIVE)

# What FlashAttentionScore takes; fp32 goes through the portable path on every device.
FLASH_DTYPES = (mstype.float16, mstype.bfloat16)


def resolve_kernels(name=None):
    """Return `name` if it is known; for None FUSED on Ascend, elsewhere NATIVE if that can be had."""
    if name is None:
        if device() == "Ascend":
            return FUSED
        return NATIVE if native.load() else MATH
    if name not in KERNELS:
        raise MindSigmaError(f"kernels must be one of {', '.join(KERNELS)}, not {name!r}")
    if name == NATIVE and not native.load():
        raise MindSigmaError("kernels native: MINDSIGMA_NATIVE is 0, or there is no C++ compiler")
    return name


def for_ascend(kernels):
    """Whether graphs are composed as for Ascend."""
    return kernels in (FUSED, STAND_IN)


def has_flash_attention(kernels, dtype):
    """Whether attention of this dtype is one FlashAttentionScore; its stand-in takes fp32, too, to be measured."""
    return kernels == STAND_IN or (kernels == FUSED and dtype in FLASH_DTYPES)


def differentiable(value):
    """`value`, unless it names kernels that have no gradient: then those that take their place."""
    if value == NATIVE:
        return TRAINING if native.load() else MATH
    return value


def has_written_gradients(kernels):
    """Whether gradients are composed for a CPU (ops/derivatives.py)."""
    return kernels in (MATH, TRAINING)


def is_native(x, kernels):
    """Whether what `kernels` names computes with x on the native kernels."""
    return kernels == NATIVE and native.takes(x)


def is_learning_natively(x, kernels):
    """Whether the native kernels that have a gradient compute with x."""
    return kernels == TRAINING and native.takes(x)

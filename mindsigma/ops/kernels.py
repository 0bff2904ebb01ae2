"""Which implementation of the fused operations the graphs use: portable mathematics, Ascend kernels, or stand-ins."""

from mindspore import dtype as mstype

from mindsigma.errors import MindSigmaError
from mindsigma.runtime import device

MATH = "math"  # compositions that every backend runs
FUSED = "fused"  # Ascend kernels: FlashAttentionScore, LayerNormExt, RmsNorm, GeLU, Addcmul, Dense
STAND_IN = "stand-in"  # the graph of FUSED with the documented semantics of its kernels in portable operations

KERNELS = (MATH, FUSED, STAND_IN)

# What FlashAttentionScore takes; fp32 goes through the portable path on every device.
FLASH_DTYPES = (mstype.float16, mstype.bfloat16)


def resolve_kernels(name=None):
    """Return `name` if it is known; for None FUSED on Ascend and MATH elsewhere."""
    if name is None:
        return FUSED if device() == "Ascend" else MATH
    if name not in KERNELS:
        raise MindSigmaError(f"kernels must be one of {', '.join(KERNELS)}, not {name!r}")
    return name


def for_ascend(kernels):
    """Whether graphs are composed as for Ascend."""
    return kernels in (FUSED, STAND_IN)


def has_flash_attention(kernels, dtype):
    """Whether attention of this dtype is one FlashAttentionScore; its stand-in takes fp32, too, to be measured."""
    return kernels == STAND_IN or (kernels == FUSED and dtype in FLASH_DTYPES)

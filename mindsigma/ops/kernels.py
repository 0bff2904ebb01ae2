"""Which implementation of the fused operations the graphs use: portable mathematics or Ascend kernels."""

from mindsigma.errors import MindSigmaError
from mindsigma.runtime import device

MATH = "math"  # compositions that every backend runs
FUSED = "fused"  # Ascend kernels: FlashAttentionScore (in half precision), LayerNorm, RmsNorm, Gelu

KERNELS = (MATH, FUSED)


def resolve_kernels(name=None):
    """Return `name` if it is known; for None FUSED on Ascend and MATH elsewhere."""
    if name is None:
        return FUSED if device() == "Ascend" else MATH
    if name not in KERNELS:
        raise MindSigmaError(f"kernels must be one of {', '.join(KERNELS)}, not {name!r}")
    return name

"""Which implementation of the fused operations the graphs use: portable mathematics or Ascend kernels."""

import mindspore as ms

MATH = "math"  # compositions that every backend runs
FUSED = "fused"  # Ascend kernels: FlashAttentionScore, LayerNorm, Gelu

KERNELS = (MATH, FUSED)


def default_kernels():
    """Return FUSED on an Ascend device target and MATH elsewhere."""
    return FUSED if ms.get_context("device_target") == "Ascend" else MATH

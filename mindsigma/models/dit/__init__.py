"""The diffusion transformer of PixArt-Σ (arXiv 2403.04692)."""

from mindsigma.models.dit.config import DiTConfig, KVCompression
from mindsigma.models.dit.dit import DiT

__all__ = ["DiT", "DiTConfig", "KVCompression"]

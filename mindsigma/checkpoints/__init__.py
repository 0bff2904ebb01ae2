"""Reading weights of other frameworks from disk, without executing anything found there."""

from mindsigma.checkpoints.reader import TensorSource, open_checkpoint

__all__ = ["TensorSource", "open_checkpoint"]

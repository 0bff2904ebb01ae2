"""Reading and writing weights of every framework, tensor by tensor, without executing anything found in a file."""

from mindsigma.weights.formats.reader import TensorSource, open_checkpoint

__all__ = ["TensorSource", "open_checkpoint"]

"""Adapters of a ControlNet, as SimpleTuner trains them: a ControlNet of no training beside a base, with one in it."""

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_reader import open_adapter
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.names.views import Extended, Without


class Copies(Extended):
    """A ControlNet before its training: copies of a DiT's first blocks, and linear maps of zeros.

    Args:
        base: view of the DiT under our names.
        layers: number of copies.
    """

    def __init__(self, base, layers):
        copied = tuple(f"blocks.{layer}." for layer in range(layers))
        others = [name for name in base.names() if not name.startswith(copied)]
        shape = base.shape("blocks.0.attn.proj.weight")
        weight, bias = np.zeros(shape, np.float32), np.zeros(shape[:1], np.float32)
        maps = ("before_proj", *(f"after_proj.{layer}" for layer in range(layers)))
        made = {f"{name}.{part}": value for name in maps for part, value in (("weight", weight), ("bias", bias))}
        super().__init__(Without(base, others), made)


class AdaptedCopies(Adapted):
    """The ControlNet of an adapter's file and the base that it was trained beside, fp32.

    Args:
        path: of the adapter.
        base: view of the DiT without adapters of its own, under our names.

    Attributes:
        layers: number of copies.
        notes, unexpected: as of MappedSource.

    Raises:
        MindSigmaError: it is damaged, of another kind, or of another base.
    """

    def __init__(self, path, base):
        opened = open_adapter(path, controlnet=True)
        places = [name.split(".") for name in opened.adapter.entries]
        self.layers = 1 + max((int(place[1]) for place in places if place[1:2] and place[1].isdigit()), default=-1)
        depth = 1 + max(int(name.split(".")[1]) for name in base.names() if name.startswith("blocks."))
        if not 1 <= self.layers < depth:
            raise MindSigmaError(
                f"{path}: an adapter of a ControlNet of {self.layers} blocks, but {base.path} has {depth}; "
                "give the model that it was trained beside"
            )
        super().__init__(Copies(base, self.layers), [(opened.adapter, 1.0)], np.float32)
        self.path, self.unexpected = path, []
        began = f"copies of the first {self.layers} blocks of {base.path.name}, as the adapter does not hold them"
        self.notes = [f"{path}: {line}" for line in (*opened.assumed, began)]

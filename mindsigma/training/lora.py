"""Adapters to train: which layers get one, how they start, and their tensors put beside a DiT's weights."""

import fnmatch
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np
from mindspore import Parameter, Tensor

from mindsigma.choices import LORA_TARGETS as TARGETS
from mindsigma.data import generator
from mindsigma.errors import MindSigmaError
from mindsigma.models.linear import Linear, LowRank
from mindsigma.weights.adapters.adapter_file import Adapter, Entry, part_names, place, scale_of, tensors_of
from mindsigma.weights.names.dit_names import DIFFUSERS
from mindsigma.weights.names.name_map import slots


@dataclass(frozen=True)
class AdapterConfig:
    """A new adapter.

    Attributes:
        rank: r.
        alpha: the change counts alpha / r times; None: r.
        targets: texts; a layer gets an adapter if one of them is a part of its name between dots, as `mlp`,
            `blocks.3`, `attn.qkv`, `attn.qkv.v` (of a fused layer that part alone) or `blocks.*.attn.proj`.
        rslora: alpha / sqrt(r) instead.
        dora: train magnitudes of the rows, too.
    """

    rank: int = 8
    alpha: Optional[float] = None
    targets: Tuple[str, ...] = TARGETS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if self.rank < 1:
            raise MindSigmaError(f"--lora-rank must be at least 1, not {self.rank}")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        if not (np.isfinite(self.alpha) and self.alpha > 0):
            raise MindSigmaError(f"--lora-alpha must be a positive number, not {self.alpha}")


def linear_layers(dit):
    """dict name -> Linear of the layers of a DiT that an adapter may change."""
    return {
        name: cell
        for name, cell in dit.cells_and_names()
        if isinstance(cell, Linear) and slots(DIFFUSERS, f"{name}.weight") is not None
    }


def chosen(names, targets):
    """Names of layers, and of parts of fused ones, that `targets` choose, in the order of `names`.

    A target chooses what has it as a part of its name between dots, with `*` as a wildcard.

    Raises MindSigmaError for a target that chooses nothing.
    """
    unused, result = set(targets), []
    for name in names:
        for candidates in ([name], part_names(name)):
            found = []
            for candidate in candidates:
                matching = {t for t in targets if fnmatch.fnmatchcase(f".{candidate}.", f"*.{t}.*")}
                unused -= matching
                found += [candidate] if matching else []
            result += found
            if found:
                break
    if unused:
        kinds = dict.fromkeys(name.split(".", 2)[-1] if name.startswith("blocks.") else name for name in names)
        raise MindSigmaError(
            f"--lora-targets {min(unused)}: no linear layer is called so; there are {', '.join(kinds)}"
        )
    return result


def new_adapter(dit, config, seed=0):
    """An Adapter without effect as yet: A uniform within 1 / sqrt(in), B zero, magnitudes the norms of W's rows.

    A follows from the seed and the layer's name alone.
    """
    layers, entries = linear_layers(dit), {}
    scale = scale_of(config.alpha, config.rank, config.rslora)
    for name in chosen(layers, config.targets):
        layer, index, count = place(name)
        weight = layers[layer].weight
        rows = weight.shape[0] // count
        bound = np.prod(weight.shape[1:]) ** -0.5
        shape = (config.rank, *weight.shape[1:])
        a = generator(seed, f"adapter {name}").uniform(-bound, bound, shape).astype(np.float32)
        magnitude = None
        if config.dora:
            part = weight.float().asnumpy()[index * rows : (index + 1) * rows]
            magnitude = np.sqrt(np.square(part.reshape(rows, -1), dtype=np.float64).sum(1)).astype(np.float32)
        entries[name] = Entry(a, np.zeros((rows, config.rank), np.float32), float(config.alpha), scale, magnitude)
    return Adapter(entries, config.rslora)


def attach(dit, adapter):
    """Put an Adapter's tensors beside the weights of a DiT, which are frozen.

    Returns dict name -> fp32 Parameter, the names those of the adapter's file. Raises MindSigmaError if the adapter was
    made for another network, or has magnitudes of columns, which are not trained.
    """
    layers, changes, named = linear_layers(dit), {}, {}
    for name, entry in adapter.entries.items():
        layer, index, count = place(name)
        shape = tuple(layers[layer].weight.shape) if layer in layers else None
        found = (entry.b.shape[0] * count, *entry.a.shape[1:])
        if shape != found:
            raise MindSigmaError(
                f"{adapter.path}: the adapter's '{name}' fits weights of shape {found}, the network has "
                f"{shape or 'no such layer'}; it was made for another model"
            )
        if entry.magnitude is not None and entry.magnitude.ndim != 1:
            raise MindSigmaError(f"{adapter.path}: '{name}' has DoRA magnitudes of its inputs, which are not trained")
        for key, array in tensors_of(name, entry).items():
            named[key] = Parameter(Tensor(np.array(array, np.float32)), name=key)
        a, b, magnitude = (named.get(f"{name}.{role}") for role in ("lora_A", "lora_B", "magnitude"))
        changes.setdefault(layer, []).append(LowRank(a, b, magnitude, index, count, entry.scale))
    for parameter in dit.get_parameters():
        parameter.requires_grad = False
    for layer, ranks in changes.items():
        layers[layer].change(ranks)
    return named

"""A DiT's weights with adapters added, tensor by tensor: sampling then costs what it costs without."""

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_file import place
from mindsigma.weights.formats.tensor_stream import release
from mindsigma.weights.names.views import View


class Adapted(View):
    """Weights W + weight * scale * B A; of a DoRA, these brought to its magnitudes row by row (or column by column).

    The weight of a DoRA multiplies its scale, not its magnitudes. Several adapters are merged one after the other, each
    on what those before it left; the norms that a DoRA divides by are those of the base with its own change alone. All
    this is as peft's `merge_and_unload` has it (version 0.21). Computed in float64, rounded once.

    Args:
        base: view of a DiT under our names.
        adapters: list of (Adapter, weight).
        dtype: of the tensors that change; None for those of the base.

    Raises:
        MindSigmaError: an adapter has a module, or shapes, that this DiT does not have; at reading, a result that is
            not finite.
    """

    def __init__(self, base, adapters, dtype=None):
        super().__init__(base)
        self._result = None if dtype is None else np.dtype(dtype)
        self._changes = {}
        held = frozenset(base.names())
        for adapter, weight in adapters:
            for name, entry in adapter.entries.items():
                layer, index, count = place(name)
                tensor = f"{layer}.weight"
                if tensor not in held:
                    raise MindSigmaError(
                        f"{adapter.path}: the adapter changes '{layer}', which {base.path} does not have; "
                        "it was made for another model"
                    )
                shape = base.shape(tensor)
                rows = entry.b.shape[0]
                if (rows * count, *entry.a.shape[1:]) != tuple(shape):
                    raise MindSigmaError(
                        f"{adapter.path}: the adapter's '{name}' fits weights of shape "
                        f"{(rows * count, *entry.a.shape[1:])}, {base.path} has {tuple(shape)}; "
                        "it was made for another model"
                    )
                self._changes.setdefault(tensor, []).append((adapter, name, index * rows, weight))

    def dtype(self, name):
        """NumPy dtype."""
        own = self.base.dtype(name)
        return own if self._result is None or name not in self._changes else self._result

    def read(self, name):
        """ndarray."""
        array = self.base.read(name)
        if name not in self._changes:
            return array
        base = array.astype(np.float64)
        release(array)
        changes = self._changes[name]
        changed = base.copy() if len(changes) > 1 else base
        for adapter, part, start, weight in changes:
            entry = adapter.entries[part]
            rows = slice(start, start + entry.b.shape[0])
            changed[rows] = with_entry(changed[rows], entry, weight, base[rows] if len(changes) > 1 else None)
        with np.errstate(over="ignore"):
            result = changed.astype(self.dtype(name))
        if not np.isfinite(result).all():
            whose = ", ".join(dict.fromkeys(str(adapter.path) for adapter, *_ in changes))
            raise MindSigmaError(
                f"{whose}: with this adapter '{name}' has values that are not finite in {result.dtype}"
            )
        return result


def with_entry(weights, entry, weight=1.0, base=None):
    """The weights, float64 (out, ...), of a layer or part with an Entry at some weight.

    `base`: the weights before any adapter, where `weights` has others already.
    """
    with np.errstate(all="ignore"):  # the caller looks for what is not finite
        a = entry.a.astype(np.float64).reshape(entry.rank, -1)
        change = ((entry.b.astype(np.float64) * (weight * entry.scale)) @ a).reshape(weights.shape)
        if entry.magnitude is None:
            change += weights
            return change
        alone = change + (weights if base is None else base)
        rowwise = entry.magnitude.ndim == 1
        cube = alone.reshape(*alone.shape[:2], -1)
        norms = np.sqrt(np.einsum("ijk,ijk->i" if rowwise else "ijk,ijk->j", cube, cube))
        norms[norms == 0] = 1  # a row of zeros stays one
        factor = entry.magnitude.astype(np.float64).reshape(-1) / norms
        result = alone if base is None else change + weights
        result *= factor.reshape([-1 if axis == (not rowwise) else 1 for axis in range(result.ndim)])
        return result

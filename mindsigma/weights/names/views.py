"""Views of named tensors: the same four questions (names, shape, dtype, read) answered with something changed.

A view reads a tensor only when asked for it, so that a chain of views streams a checkpoint of any size.
"""

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.floats import is_float
from mindsigma.weights.formats.tensor_stream import release
from mindsigma.weights.names.name_map import slots


class View:
    """Passes everything through to another view or source; subclasses change what they are about."""

    def __init__(self, base):
        self.base = base
        self.path = base.path

    def names(self):
        """list[str]."""
        return self.base.names()

    def __contains__(self, name):
        return name in self.names()

    def shape(self, name):
        """tuple[int, ...]."""
        return self.base.shape(name)

    def dtype(self, name):
        """NumPy dtype."""
        return self.base.dtype(name)

    def read(self, name):
        """ndarray of that shape and dtype."""
        return self.base.read(name)


class Cast(View):
    """Floating-point tensors in another dtype; a finite value that becomes infinite is an error that names it."""

    def __init__(self, base, dtype):
        super().__init__(base)
        self._dtype = np.dtype(dtype)

    def dtype(self, name):
        """NumPy dtype."""
        own = self.base.dtype(name)
        return self._dtype if is_float(own) else own

    def read(self, name):
        """ndarray in the view's dtype."""
        array = self.base.read(name)
        if not is_float(array.dtype) or array.dtype == self._dtype:
            return array
        cast = rounded(self.path, name, array, self._dtype)
        release(array)
        return cast


class Extended(View):
    """With further tensors, which replace those of the same name.

    Args:
        made: dict name -> ndarray.
    """

    def __init__(self, base, made):
        super().__init__(base)
        self._made = made

    def names(self):
        """list[str], the new ones last."""
        return self.base.names() + [name for name in self._made if name not in self.base]

    def shape(self, name):
        """tuple[int, ...]."""
        return self._made[name].shape if name in self._made else self.base.shape(name)

    def dtype(self, name):
        """NumPy dtype."""
        return self._made[name].dtype if name in self._made else self.base.dtype(name)

    def read(self, name):
        """ndarray."""
        return self._made[name] if name in self._made else self.base.read(name)


class Without(View):
    """Without the named tensors."""

    def __init__(self, base, left_out):
        super().__init__(base)
        self._left_out = frozenset(left_out)

    def names(self):
        """list[str]."""
        return [name for name in self.base.names() if name not in self._left_out]


class Joined(View):
    """The tensors of several views, each under its prefix.

    Args:
        views: dict prefix -> view.
    """

    def __init__(self, views):
        super().__init__(next(iter(views.values())))
        self._places = {prefix + name: (view, name) for prefix, view in views.items() for name in view.names()}

    def names(self):
        """list[str]."""
        return list(self._places)

    def shape(self, name):
        """tuple[int, ...]."""
        view, own = self._places[name]
        return view.shape(own)

    def dtype(self, name):
        """NumPy dtype."""
        view, own = self._places[name]
        return view.dtype(own)

    def read(self, name):
        """ndarray."""
        view, own = self._places[name]
        return view.read(own)


class Merged(View):
    """(1 - weight) * first + weight * second, computed in float64, rounded once; both must hold the same tensors.

    `dtype`: NumPy dtype of the result; None for the first's.
    """

    def __init__(self, first, second, weight, dtype=None):
        super().__init__(first)
        self._second, self._weight = second, weight
        self._result = None if dtype is None else np.dtype(dtype)
        one, two = set(first.names()), set(second.names())
        if one != two:
            raise MindSigmaError(f"{second.path}: tensor '{min(one ^ two)}' stands in only one of the two to be merged")
        for name in one:
            if first.shape(name) != second.shape(name):
                raise MindSigmaError(
                    f"{second.path}: tensor '{name}' has shape {second.shape(name)}, the other has {first.shape(name)}"
                )

    def dtype(self, name):
        """NumPy dtype."""
        own = self.base.dtype(name)
        return own if self._result is None or not is_float(own) else self._result

    def read(self, name):
        """ndarray."""
        a, b = self.base.read(name), self._second.read(name)
        if not is_float(a.dtype):
            return a
        mixed = a.astype(np.float64) * (1 - self._weight) + b.astype(np.float64) * self._weight
        release(a)
        release(b)
        return rounded(self.path, name, mixed, self.dtype(name))


class Foreign(View):
    """Our tensors under the foreign names of a rule table: renamed, or split where theirs are several.

    Attributes:
        unmapped: our names that the table cannot express.
    """

    def __init__(self, base, rule_table):
        super().__init__(base)
        self._recipes, self.unmapped = {}, []
        for name in base.names():
            found = slots(rule_table, name)
            if found is None:
                self.unmapped.append(name)
                continue
            for i, theirs in enumerate(found):
                self._recipes[theirs] = (name, i, len(found))

    def names(self):
        """list[str], foreign."""
        return list(self._recipes)

    def shape(self, name):
        """tuple[int, ...]."""
        ours, _, parts = self._recipes[name]
        shape = self.base.shape(ours)
        return (shape[0] // parts,) + shape[1:] if parts > 1 else shape

    def dtype(self, name):
        """NumPy dtype."""
        return self.base.dtype(self._recipes[name][0])

    def read(self, name):
        """ndarray; a view where ours is split."""
        ours, i, parts = self._recipes[name]
        array = self.base.read(ours)
        rows = array.shape[0] // parts if parts > 1 else 0
        return array[i * rows : (i + 1) * rows] if parts > 1 else array


def rounded(path, name, array, dtype):
    """The array in another float dtype; raises MindSigmaError where a finite value would become infinite, or NaN."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    finite = np.isfinite(cast)
    if not finite.all() and np.isfinite(array[~finite]).any():
        raise MindSigmaError(f"{path}: tensor '{name}' has values beyond {dtype}; use bf16 or fp32")
    return cast

"""From foreign tensor names to ours: rules as data, and the view of a checkpoint through them."""

import re
from dataclasses import dataclass
from functools import cache
from typing import Tuple

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.floats import common_dtype
from mindsigma.weights.formats.tensor_stream import release


@dataclass(frozen=True)
class Rule:
    """One tensor of ours from one or more of theirs.

    Attributes:
        ours: our name; `{}` stands for a block number, the same on both sides, in the order of appearance.
        theirs: foreign names; several are concatenated along axis 0.
        squeeze: theirs may be a 1x1 convolution of ours, a matrix: drop trailing axes of length 1.
    """

    ours: str
    theirs: Tuple[str, ...]
    squeeze: bool = False


def rules(*pairs, squeeze=False, suffixes=("weight", "bias")):
    """Rules for modules: each (ours, theirs, ...) stands for one rule a suffix; without suffixes, names are whole."""
    endings = [f".{suffix}" for suffix in suffixes] or [""]
    return tuple(
        Rule(ours + ending, tuple(name + ending for name in theirs), squeeze)
        for ours, *theirs in pairs
        for ending in endings
    )


@cache
def _pattern(template):
    # four digits: a number without bound would be taken for the depth of a network
    return re.compile(r"([0-9]{1,4})".join(re.escape(part) for part in template.split("{}")))


def slots(rule_table, ours):
    """Foreign names that one of our tensors goes to, in order, or None if no rule makes it."""
    for rule in rule_table:
        match = _pattern(rule.ours).fullmatch(ours)
        if match:
            return [template.format(*match.groups()) for template in rule.theirs]
    return None


class MappedSource:
    """A checkpoint seen under our names. Tensors are read, concatenated and reshaped when asked for.

    Args:
        source: TensorSource.
        rule_table: the Rules.
        drop: templates of names that are knowingly not used.

    Attributes:
        notes: what was assumed while looking for the tensors.
        dropped, unexpected: names of the source that are left out, knowingly or because no rule takes them.
    """

    def __init__(self, source, rule_table, drop=()):
        self.source = source
        self.path = source.path
        self.metadata = source.metadata
        self.notes = list(source.notes)
        self._recipes = {}
        names = source.names()
        left = dict.fromkeys(names)
        for rule in rule_table:
            first = _pattern(rule.theirs[0])
            for name in names:
                match = first.fullmatch(name)
                if match:
                    parts = [template.format(*match.groups()) for template in rule.theirs]
                    absent = [part for part in parts if part not in source]
                    if absent:
                        raise MindSigmaError(f"{self.path}: tensor '{absent[0]}' is missing beside '{name}'")
                    self._recipes[rule.ours.format(*match.groups())] = (parts, rule.squeeze)
                    for part in parts:
                        left.pop(part, None)
        patterns = [_pattern(template) for template in drop]
        self.dropped, self.unexpected = [], []
        for name in left:
            known = any(pattern.fullmatch(name) for pattern in patterns)
            (self.dropped if known else self.unexpected).append(name)

    def names(self):
        """Our names of what the checkpoint holds."""
        return list(self._recipes)

    def __contains__(self, name):
        return name in self._recipes

    def _parts(self, name):
        parts, squeeze = self._recipes[name]
        for part in parts:
            shape = self.source.shape(part)
            while squeeze and len(shape) > 2 and shape[-1] == 1:
                shape = shape[:-1]
            yield part, shape

    def shape(self, name):
        """Shape of our tensor `name`."""
        shapes = [shape for _, shape in self._parts(name)]
        if len(shapes) > 1:
            if any(shape[1:] != shapes[0][1:] for shape in shapes):
                raise MindSigmaError(f"{self.path}: the parts of '{name}' have shapes {shapes} and cannot be joined")
            return (sum(shape[0] for shape in shapes),) + shapes[0][1:]
        return shapes[0]

    def dtype(self, name):
        """NumPy dtype of our tensor `name`."""
        return common_dtype(self.source.dtype(part) for part in self._recipes[name][0])

    def read(self, name):
        """Our tensor `name`; a view of the file where it is one tensor there."""
        parts = [self.source.read(part).reshape(shape) for part, shape in self._parts(name)]
        if len(parts) == 1:
            return parts[0]
        dtype = self.dtype(name)
        joined = np.concatenate([part.astype(dtype, copy=False) for part in parts])
        for part in parts:
            release(part)
        return joined

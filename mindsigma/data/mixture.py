"""Several data sets as one, each with a weight: how often an epoch takes its records.

A mixture is a file NAME.mixture.json such as {"scenes": 1, "pages-index": 2.5}: data sets of any layout, below the
file's folder or whole paths, and their weights. All are images, or all are features that were made alike.
"""

from pathlib import Path

from mindsigma.data.columns import Column
from mindsigma.data.feature_set import FeatureSet
from mindsigma.data.records import Records, fingerprint
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes

SUFFIX = ".mixture.json"
LARGEST_FILE = 1 << 20  # bytes
LARGEST_WEIGHT = 1000.0


def is_mixture(path):
    """Whether a file describes a mixture."""
    return Path(path).name.endswith(SUFFIX) and Path(path).is_file()


def open_mixture(path, open_set):
    """Mixture, or FeatureMixture, of a file; open_set: function of a path that opens a data set.

    Raises MindSigmaError for weights that are none, for a mixture within it, and for sets that do not fit.
    """
    path = Path(path)
    described = load_json(path, read_bytes(path, LARGEST_FILE), "the description of a mixture")
    if not described:
        raise MindSigmaError(f'{path}: names no data set; write it as in {{"photos": 1, "scenes-index": 2.5}}')
    for name, weight in described.items():
        if type(weight) not in (int, float) or not 0 < weight <= LARGEST_WEIGHT or name.endswith(SUFFIX):
            raise MindSigmaError(
                f"{path}: {one_line(name)} must be a data set, no mixture, with a weight above 0, at most "
                f"{LARGEST_WEIGHT:g}, not {one_line(repr(weight), 40)}"
            )
    sources = [open_set(path.parent / name) for name in described]
    kind = FeatureMixture if any(isinstance(source, FeatureSet) for source in sources) else Mixture
    return kind(path, sources, [float(weight) for weight in described.values()])


class _Chain:
    """Sequences one after the other as one."""

    def __init__(self, parts):
        self.parts = parts
        self.sizes = Column([array for part in parts for array in _arrays(part.sizes)])
        self.firsts = [sum(map(len, parts[:i])) for i in range(len(parts) + 1)]

    def __len__(self):
        return self.firsts[-1]

    def __iter__(self):
        for part in self.parts:
            yield from part

    def place(self, index):
        """(the sequence, place within it) of a place."""
        index = range(len(self))[index]
        number = next(i for i, first in enumerate(self.firsts[1:]) if index < first)
        return self.parts[number], index - self.firsts[number]

    def __getitem__(self, index):
        part, place = self.place(index)
        return part[place]


class Mixture(Records):
    """Images of several data sets; stands where Records stand.

    Args:
        path: of the description. sources: list of Records. weights: list of float.

    Attributes:
        sets: list of (source, weight), in the order of the records.
        fingerprints: list of the fingerprint, as an Index has it.
    """

    def __init__(self, path, sources, weights):
        self._records, self.path, self.layout = _Chain(sources), str(path), "mixture"
        self.sizes, self.sets = self._records.sizes, list(zip(sources, weights))
        self.fingerprints = [self.fingerprint()]

    @property
    def bad(self):
        """list of BadRow of all sets."""
        return [row for source, _ in self.sets for row in source.bad]

    def fingerprint(self):
        """See Records."""
        return fingerprint((source.fingerprint(), weight) for source, weight in self.sets)


class FeatureMixture(FeatureSet):
    """Features of several folders; stands where a FeatureSet stands. Arguments and attributes as those of Mixture.

    Raises MindSigmaError unless all are features that were made with the same configuration.
    """

    def __init__(self, path, sources, weights):
        self.path = Path(path)
        for source in sources:
            if not isinstance(source, FeatureSet):
                raise MindSigmaError(f"{path}: mixes features with images ({source.path}); extract features of those")
            for name in dict.fromkeys([*source.config, *sources[0].config]):
                values = [one_line(repr(one.config.get(name)), 60) for one in (sources[0], source)]
                if values[0] != values[1]:
                    raise MindSigmaError(
                        f"{path}: {source.path} was made with {one_line(name)} {values[1]}, {sources[0].path} with "
                        f"{values[0]}; extract again"
                    )
        self.config = sources[0].config
        self._take_config()
        self._rows = _Chain(sources)
        self.sizes, self.sets = self._rows.sizes, list(zip(sources, weights))
        self.fingerprints = [self.fingerprint()]

    def fingerprint(self):
        """See Mixture."""
        return fingerprint((source.fingerprint(), weight) for source, weight in self.sets)

    def where(self, index):
        """See FeatureSet."""
        source, place = self._rows.place(index)
        return source.where(place)

    def place(self, index):
        """See FeatureSet."""
        source, place = self._rows.place(index)
        return source.place(place)

    def tensors(self, index):
        """See FeatureSet."""
        source, place = self._rows.place(index)
        return source.tensors(place)

    def null_caption(self, max_length=None):
        """See FeatureSet; all have the same."""
        return self.sets[0][0].null_caption(max_length)

    def _longest(self):
        return max(source._longest() for source, _ in self.sets)


def _arrays(sizes):
    return sizes.arrays if isinstance(sizes, Column) else [sizes]

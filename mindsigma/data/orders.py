"""The order in which an epoch takes the records of buckets: shuffled in memory if they are few, else computed.

Both take the batches of all buckets in an order of their own, and the records of a bucket in another.
"""

from collections import OrderedDict

import numpy as np

from mindsigma.data.permutation import Permutation
from mindsigma.data.randomness import generator
from mindsigma.weights.formats.tensor_stream import release

LARGEST_SHUFFLED = 1 << 20  # records whose order is shuffled in memory
EPOCHS_KEPT = 2  # so that a prefetch across the border of an epoch does not reshuffle again and again
KEYED = "keyed"


def order_of(source, seed):
    """The order for a source: Shuffled or Keyed. That of a mixture (`sets`) is always computed."""
    many = len(source.sizes) > LARGEST_SHUFFLED or getattr(source, "sets", None)
    return Keyed(seed) if many else Shuffled(seed)


class Shuffled:
    """Every epoch's order is drawn as a whole and kept."""

    keyed = False

    def __init__(self, seed):
        self._seed = seed

    def members(self, source, resolution):
        """dict from the number of a bucket to its records, int32 (n,); buckets without records are left out."""
        assigned = resolution.assign(source.sizes)
        order = np.argsort(assigned, kind="stable").astype(np.int32)
        bounds = np.searchsorted(assigned[order], np.arange(len(resolution.buckets()) + 1))
        return {i: order[a:b] for i, (a, b) in enumerate(zip(bounds, bounds[1:])) if b > a}

    def begin(self, members, batches, batch_size):
        """Take the members of the buckets, the batches that each makes in an epoch, and the records of a batch."""
        self._members, self._batches, self._batch_size = members, batches, batch_size
        self._epochs = OrderedDict()

    def batch(self, epoch, index):
        """(number of the bucket, records int64 (B,)) of a batch of an epoch."""
        if epoch not in self._epochs:
            self._epochs[epoch] = self._shuffled(epoch)
            while len(self._epochs) > EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        bucket, rows = self._epochs[epoch][index]
        return bucket, rows.astype(np.int64)

    def _shuffled(self, epoch):
        random = generator(self._seed, "order of records", epoch)
        result = []
        for (i, members), count in zip(self._members.items(), self._batches):
            # np.resize starts again at the front: what is repeated changes from epoch to epoch.
            rows = np.resize(random.permutation(members), count * self._batch_size)
            result += [(i, row) for row in rows.reshape(count, self._batch_size)]
        return [result[i] for i in random.permutation(len(result))]


class Keyed:
    """A batch is computed from its number: no memory grows with the records, and no epoch has to be begun."""

    keyed = True

    def __init__(self, seed):
        self._seed = seed

    def members(self, source, resolution):
        """See Shuffled; members are indexed by arrays of places. Of an index their numbers stay on the disk."""
        if getattr(source, "sets", None):
            return self._members_of_sets(source.sets, resolution)
        if getattr(source, "by_ratio", None):
            return members_by_ratio(source.by_ratio(), source.sizes, resolution)
        return Shuffled(self._seed).members(source, resolution)

    def _members_of_sets(self, sets, resolution):
        """dict from the number of a bucket to Weighted."""
        found, first = {}, 0
        for number, (source, weight) in enumerate(sets):
            for bucket, members in self.members(source, resolution).items():
                order = Permutation(len(members), self._seed, f"order of set {number} bucket {bucket}")
                found.setdefault(bucket, []).append((first, members, weight, order))
            first += len(source.sizes)
        return {bucket: Weighted(found[bucket]) for bucket in sorted(found)}

    def begin(self, members, batches, batch_size):
        """See Shuffled."""
        self._members, self._batch_size = members, batch_size
        self._numbers, self._ends = list(members), np.cumsum(batches)

    def batch(self, epoch, index):
        """See Shuffled."""
        steps = Permutation(int(self._ends[-1]), self._seed, "order of batches", epoch)
        batch = int(steps([index])[0])
        which = int(np.searchsorted(self._ends, batch, "right"))
        bucket, within = self._numbers[which], batch - int(self._ends[which - 1] if which else 0)
        members = self._members[bucket]
        order = Permutation(len(members), self._seed, f"order of bucket {bucket}", epoch)
        places = np.arange(within * self._batch_size, (within + 1) * self._batch_size) % len(members)
        taken = members.taken(order(places), epoch) if isinstance(members, Weighted) else members[order(places)]
        return bucket, np.asarray(taken, np.int64)


class Slices:
    """Records of a bucket as slices of the rows by height / width of an index's parts; nothing is listed.

    Args:
        slices: list of (number of the part's first row, its rows from there, in that order).
    """

    def __init__(self, slices):
        self._slices = slices
        self._ends = np.cumsum([len(rows) for _, rows in slices])

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, places):
        places = np.asarray(places)
        which = np.searchsorted(self._ends, places, "right")
        result = np.empty(places.shape, np.int64)
        for number in np.unique(which):
            first, rows = self._slices[number]
            here = which == number
            result[here] = first + rows[places[here] - self._ends[number] + len(rows)].astype(np.int64)
        return result


class Weighted:
    """Records of a bucket of several sets, each as often as its weight says; their number is that of an epoch.

    What an epoch takes of a set goes on where the epoch before ended, so that every record comes once before any comes
    again, whatever the weight.

    Args:
        sets: list of (number of the set's first record, its members, its weight, Permutation of these).
    """

    def __init__(self, sets):
        self._sets = sets
        self._counts = [max(1, round(len(members) * weight)) for _, members, weight, _ in sets]
        self._ends = np.cumsum(self._counts)

    def __len__(self):
        return int(self._ends[-1])

    def __getitem__(self, place):
        return self.taken(np.atleast_1d(place), 0)[0]

    def taken(self, places, epoch):
        """int64 (n,): the records at places (n,) of an epoch."""
        which = np.searchsorted(self._ends, places, "right")
        result = np.empty(len(places), np.int64)
        for number in np.unique(which):
            first, members, _, order = self._sets[number]
            count, here = self._counts[number], which == number
            within = places[here] - int(self._ends[number]) + count
            result[here] = first + np.asarray(members[order((epoch * count + within) % len(members))], np.int64)
        return result


def members_by_ratio(parts, sizes, resolution):
    """dict from the number of a bucket to Slices: where the ratios of a bucket begin is searched by halving.

    Args:
        parts: list of (number of the first row, rows from there by height / width).
        sizes: (n, 2), height and width of all rows.
    """
    buckets = np.arange(len(resolution.buckets()) + 1)
    found = {}
    for first, rows in parts:
        low, high = np.zeros(len(buckets), np.int64), np.full(len(buckets), len(rows))
        while (low < high).any():
            middle = (low + high) // 2
            at = np.minimum(middle, len(rows) - 1)
            before = (resolution.assign(sizes[first + rows[at].astype(np.int64)]) < buckets) & (low < high)
            low, high = np.where(before, middle + 1, low), np.where(before, high, np.minimum(high, middle))
        release(rows)
        for number, (a, b) in enumerate(zip(low, low[1:])):
            if b > a:
                found.setdefault(number, []).append((first, rows[a:b]))
    return {number: Slices(found[number]) for number in sorted(found)}

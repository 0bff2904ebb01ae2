"""Which records make the batch of a step: one bucket a batch, the same on every rank, computed from the step alone."""

from typing import NamedTuple

import numpy as np

from mindsigma.choices import INCOMPLETE
from mindsigma.data.orders import KEYED, order_of
from mindsigma.data.randomness import generator
from mindsigma.data.resolution import Bucket
from mindsigma.errors import MindSigmaError


class BucketCount(NamedTuple):
    """What an epoch does with a bucket: its records, its batches, records drawn again, records left out."""

    bucket: Bucket
    records: int
    batches: int
    repeated: int
    dropped: int


class Summary(NamedTuple):
    """What an epoch consists of."""

    buckets: list  # of BucketCount
    batch_size: int
    records: int
    steps: int
    repeated: int
    dropped: int

    def __str__(self):
        lines = [f"{'ratio':>6} {'height x width':>15} {'records':>9} {'batches':>8} {'repeated':>9} {'dropped':>8}"]
        for (ratio, height, width), records, batches, repeated, dropped in self.buckets:
            size = f"{height} x {width}"
            lines.append(f"{ratio:>6g} {size:>15} {records:>9} {batches:>8} {repeated:>9} {dropped:>8}")
        lines.append(f"{'all':>6} {'':>15} {self.records:>9} {self.steps:>8} {self.repeated:>9} {self.dropped:>8}")
        return "\n".join(lines)


class BucketSampler:
    """The sequence of global batches of a training run.

    An epoch takes every record once, in an order shuffled within and over the buckets. The last batch of a bucket is
    filled with records that the epoch already took from it, or left out; `summary()` counts both. Everything follows
    from the seed and the number of the step, so rank r of R takes rows r * B / R to (r + 1) * B / R of the same batch,
    and a run resumes from one integer. `orders.py` has the two orders, of few records and of many.

    Args:
        source: Records, FeatureSet, or anything with `sizes` (n, 2), height and width.
        batch_size: records of a step, over all ranks.
        resolution: Resolution.
        seed: int; another seed is another order.
        incomplete: what happens to the last batch of a bucket: "repeat" fills it, "drop" leaves it out.

    Raises:
        MindSigmaError: no record, batch_size below 1, or nothing left after dropping.
    """

    def __init__(self, source, batch_size, resolution, seed=0, incomplete="repeat"):
        if batch_size < 1:
            raise MindSigmaError(f"batch size must be at least 1, not {batch_size}")
        if incomplete not in INCOMPLETE:
            raise MindSigmaError(f"incomplete {incomplete!r} is unknown; choose from {', '.join(INCOMPLETE)}")
        self.batch_size = int(batch_size)
        self.resolution = resolution
        self.seed = seed
        self._buckets = resolution.buckets()
        self._order = order_of(source, seed)
        self._members = self._order.members(source, resolution)
        if not self._members:
            raise MindSigmaError("no record to draw batches from")
        self._counts = [self._count(i, incomplete) for i in self._members]
        self.steps_per_epoch = sum(count.batches for count in self._counts)
        if not self.steps_per_epoch:
            raise MindSigmaError(
                f"every bucket has fewer records than a batch of {self.batch_size}: "
                "take a smaller batch or fill incomplete batches"
            )
        self._order.begin(self._members, [count.batches for count in self._counts], self.batch_size)

    @property
    def order(self):
        """ "keyed" for the order of many records, which is computed place by place; None for that of the others."""
        return KEYED if self._order.keyed else None

    def __len__(self):
        return self.steps_per_epoch

    def buckets(self):
        """List of the Bucket that occur, by ascending aspect ratio: the shapes that a run compiles graphs for."""
        return [count.bucket for count in self._counts if count.batches]

    def summary(self):
        """Summary of an epoch; its text is a table."""
        totals = [sum(getattr(count, name) for count in self._counts) for name in ("records", "repeated", "dropped")]
        return Summary(self._counts, self.batch_size, totals[0], self.steps_per_epoch, *totals[1:])

    def position(self, step):
        """(epoch, step within it) of a global step."""
        return divmod(step, self.steps_per_epoch)

    def batch(self, step):
        """The global batch of a step, at any step in any order.

        Returns:
            (Bucket, record indices int64 (B,), draws int64 (B,)). A draw's number is unique in the run.
        """
        epoch, index = self.position(int(step))
        if epoch < 0:
            raise MindSigmaError(f"step must be at least 0, not {step}")
        bucket, rows = self._order.batch(epoch, index)
        draws = np.arange(self.batch_size, dtype=np.int64) + int(step) * self.batch_size
        return self._buckets[bucket], rows, draws

    def substitutes(self, bucket, draw, elsewhere=False):
        """Iterate over the records that may take the place of one of a draw, the same on every process.

        Args:
            bucket: Bucket of the batch.
            draw: number of the draw.
            elsewhere: go on with the records of other buckets, of the nearest aspect ratio first.

        Yields:
            indices of records: those of the bucket, once each, from one on that seed and draw tell.
        """
        random = generator(self.seed, "substitute", draw)
        ratios = {i: self._buckets[i].aspect_ratio / bucket.aspect_ratio for i in self._members}
        nearest = sorted(self._members, key=lambda i: (self._buckets[i] != bucket, max(ratios[i], 1 / ratios[i]), i))
        for i in nearest if elsewhere else nearest[:1]:
            members = self._members[i]
            first = int(random.integers(len(members)))
            for k in range(len(members)):
                yield int(members[(first + k) % len(members)])

    def _count(self, i, incomplete):
        records = len(self._members[i])
        batches, rest = divmod(records, self.batch_size)
        repeated = dropped = 0
        if rest and incomplete == "repeat":
            batches, repeated = batches + 1, self.batch_size - rest
        elif rest:
            dropped = rest
        return BucketCount(self._buckets[i], records, batches, repeated, dropped)

"""Batches of a rank from any step on: threads decode images or read features a bounded number of batches ahead."""

import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import List, Optional

import numpy as np

from mindsigma.choices import MAX_BAD_IMAGES
from mindsigma.data.feature_set import FeatureSet
from mindsigma.data.images import to_array, training_array
from mindsigma.data.randomness import generator
from mindsigma.errors import MindSigmaError, one_line

MAX_LENGTH = 300  # tokens of a caption in Sigma
CHECK = "find all such files with: tools/prepare_data.py DATA --check"
LARGEST_COVER = 16  # how many times a bucket's pixels an image has that was resized to cover it


@dataclass
class Batch:
    """A rank's share, n rows, of the batch of a step.

    Attributes:
        step: global step it belongs to.
        height, width: pixels of the bucket.
        draws: int64 (n,), number of each draw; it keys the random numbers of the sample.
        captions: n texts, after the choice between short and long.
        dropped: bool (n,), rows whose caption gives way to the null caption.
        images: float32 (n, 3, height, width) in [-1, 1], or None where features are read.
        control_images: the same of the conditions of a ControlNet, or None without them or where features are read.
        moments: float32 (n, 2 * c, height / 8, width / 8), mean and standard deviation of the VAE's posterior,
            unscaled.
        states: float32 (n, max_length, d), T5's states, zeros behind the caption; the caption's even if dropped.
        mask: int32 (n, max_length), 1 for tokens.
        image_size: float32 (n, 2), height and width of the size condition (Resolution.condition).
        aspect_ratio: float32 (n, 1), key of the bucket.
        replaced: number of rows where another record stands than the one that was drawn, which cannot be read.
        noise: float32 (n, c, height / 8, width / 8), what the latents were made of, of pairs, else None.
        control_moments: as `moments`, of the conditions, where features with them are read, else None.
        control_dropped: bool (n,), rows whose condition is to say nothing, or None.
    """

    step: int
    height: int
    width: int
    draws: np.ndarray
    captions: List[str]
    dropped: np.ndarray
    images: Optional[np.ndarray]
    moments: Optional[np.ndarray]
    states: Optional[np.ndarray]
    mask: Optional[np.ndarray]
    image_size: np.ndarray
    aspect_ratio: np.ndarray
    replaced: int = 0
    noise: Optional[np.ndarray] = None
    control_images: Optional[np.ndarray] = None
    control_moments: Optional[np.ndarray] = None
    control_dropped: Optional[np.ndarray] = None

    @property
    def size(self):
        """(height, width)."""
        return self.height, self.width


def training_image(records, index, height, width, resampling, condition=None):
    """float32 (3, height, width) in [-1, 1] of a record's image, covering that size, its centre cut out.

    With a Condition (6, height, width): its picture follows, cut in the same way. Raises MindSigmaError, which names
    the file, for one that cannot be read or is no image of anywhere near this shape.
    """
    image = records.image(index)
    scale = max(height / image.height, width / image.width)
    if scale * scale * image.height * image.width > LARGEST_COVER * height * width:
        raise MindSigmaError(
            f"{records[index].where}: is {image.height} x {image.width}, far from the shape of {height} x {width}"
        )
    array = training_array(image, height, width, resampling)
    if condition is None:
        return array
    control = condition.picture(records[index], image, height, width, resampling)
    return np.concatenate([array, to_array(control)])


class Loader:
    """Reads the batches that a sampler names.

    Every random choice is keyed by seed and draw, so the number of threads and of ranks changes nothing. Where a record
    cannot be read another of its bucket takes its place, with a warning, the same at every reading; if none is left,
    images of other buckets are cut to size.

    Args:
        source: Records, read as images, or FeatureSet.
        sampler: BucketSampler over the same source.
        rank, ranks: which equal share of every batch to read.
        seed: int, of the choices below.
        real_prompt_ratio: share of draws that take the short caption where there are both.
        caption_dropout: share of draws whose caption is marked as dropped.
        max_length: tokens that features are padded to.
        flip: share of draws mirrored left to right; images only, captions stay as they are.
        threads: images decoded at once.
        prefetch: batches that are read ahead.
        max_bad_images: how many records may turn out not to be readable; 0: the first one is an error.
        places: int (n,), index in `source` of each record of the sampler, -1 for one that is gone; None: they are the
            same.
        condition: Condition whose pictures are read beside images; features tell their own.
        condition_dropout: share of draws whose condition is marked as dropped.

    Attributes:
        bad: dict from the index in `source` of a record that could not be read to what is wrong with it.

    Raises:
        MindSigmaError: a share outside 0 ... 1, a batch that the ranks cannot share equally, features of another
            resolution or of longer captions.
    """

    def __init__(
        self,
        source,
        sampler,
        rank=0,
        ranks=1,
        seed=0,
        real_prompt_ratio=0.5,
        caption_dropout=0.1,
        max_length=MAX_LENGTH,
        flip=0.0,
        threads=4,
        prefetch=2,
        max_bad_images=MAX_BAD_IMAGES,
        places=None,
        condition=None,
        condition_dropout=0.0,
    ):
        for name, value in (
            ("real_prompt_ratio", real_prompt_ratio),
            ("caption_dropout", caption_dropout),
            ("flip", flip),
            ("condition_dropout", condition_dropout),
        ):
            if not 0 <= value <= 1:
                raise MindSigmaError(f"{name} must lie in 0 ... 1, not {value}")
        for name, value in (("threads", threads), ("prefetch", prefetch), ("max_length", max_length), ("ranks", ranks)):
            if value < 1:
                raise MindSigmaError(f"{name} must be at least 1, not {value}")
        if max_bad_images < 0:
            raise MindSigmaError(f"max_bad_images must be at least 0, not {max_bad_images}")
        if not 0 <= rank < ranks:
            raise MindSigmaError(f"rank {rank} of {ranks}: ranks count from 0")
        if sampler.batch_size % ranks:
            raise MindSigmaError(f"a batch of {sampler.batch_size} cannot be shared equally by {ranks} ranks")
        self.features = isinstance(source, FeatureSet)
        if self.features:
            source.check_use(sampler.resolution, max_length, flip)
        self.source, self.sampler = source, sampler
        self.condition, self.condition_dropout = condition, condition_dropout
        self.seed, self.max_length = seed, max_length
        self.real_prompt_ratio, self.caption_dropout, self.flip = real_prompt_ratio, caption_dropout, flip
        self.threads, self.prefetch = threads, prefetch
        self.max_bad_images, self.bad = max_bad_images, {}
        self._places = places
        share = sampler.batch_size // ranks
        self._rows = slice(rank * share, (rank + 1) * share)

    def batches(self, start=0, stop=None):
        """Iterate over the Batch of the steps start, start + 1, ... up to stop (exclusive); None never ends.

        Raises MindSigmaError that names a file where more cannot be read than may, at the step it belongs to. Closing
        the iterator, or leaving it, ends its threads.
        """
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        pending = deque()
        step = start
        try:
            while True:
                while len(pending) <= self.prefetch and (stop is None or step < stop):
                    pending.append(self._submit(pool, step))
                    step += 1
                if not pending:
                    return
                batch, tasks = pending.popleft()
                for task in tasks:
                    replaced, faults = task.result()
                    batch.replaced += replaced
                    self._note(faults)
                yield batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def names(self, step, rank):
        """list of texts: the records of the share of another rank, as they are drawn, of the batch of a step."""
        _, indices, _ = self.sampler.batch(step)
        share = self._rows.stop - self._rows.start
        drawn = indices[rank * share : (rank + 1) * share]
        places = [int(index) for index in (drawn if self._places is None else self._places[drawn])]
        where = getattr(self.source, "where", None) or (lambda place: self.source[place].where)
        return [one_line(where(place), 500) if place >= 0 else "one that is gone" for place in places]

    def choices(self, draw):
        """(short caption?, caption dropped?, mirrored?) of a draw."""
        draws = [
            generator(self.seed, purpose, draw).random() < share
            for purpose, share in (
                ("caption", self.real_prompt_ratio),
                ("dropout", self.caption_dropout),
                ("flip", self.flip),
            )
        ]
        return tuple(draws)

    def _dropped_conditions(self, draws):
        chances = [generator(self.seed, "condition dropout", draw).random() for draw in draws]
        return np.array(chances) < self.condition_dropout

    def _submit(self, pool, step):
        """An empty Batch and the tasks that fill it, each of which returns what `_fill` does."""
        bucket, indices, draws = self.sampler.batch(step)
        indices, draws = indices[self._rows], draws[self._rows]
        count = len(indices)
        choices = [self.choices(draw) for draw in draws]
        batch = Batch(
            step=step,
            height=bucket.height,
            width=bucket.width,
            draws=draws,
            captions=[""] * count,
            dropped=np.array([dropped for _, dropped, _ in choices], bool),
            images=None,
            moments=None,
            states=None,
            mask=None,
            image_size=np.empty((count, 2), np.float32),
            aspect_ratio=np.full((count, 1), bucket.aspect_ratio, np.float32),
            control_dropped=self._dropped_conditions(draws),
        )
        if self.features:
            width = self.source.state_width
            batch.moments = np.empty((count, *self.source.moments_shape(bucket)), np.float32)
            batch.states = np.zeros((count, self.max_length, width), np.float32)
            batch.mask = np.zeros((count, self.max_length), np.int32)
            if self.source.has_noise:
                batch.noise = np.empty(np.array(batch.moments.shape) // (1, 2, 1, 1), np.float32)
            if self.source.has_condition:
                batch.control_moments = np.empty_like(batch.moments)
        else:
            batch.images = np.empty((count, 3, bucket.height, bucket.width), np.float32)
            batch.control_images = None if self.condition is None else np.empty_like(batch.images)
        tasks = [pool.submit(self._fill, batch, bucket, row, int(i), choices[row]) for row, i in enumerate(indices)]
        return batch, tasks

    def _fill(self, batch, bucket, row, drawn, choices):
        """Fill a row with the record `drawn` of the sampler or, where it cannot be read, another.

        Returns (whether it is another, list of (index in the source, what is wrong with it) of those that failed).
        """
        fill = self._fill_features if self.features else self._fill_image
        faults = []
        for candidate in self._candidates(bucket, drawn, batch.draws[row]):
            index = candidate if self._places is None else int(self._places[candidate])
            if index < 0:
                continue
            try:
                fill(batch, row, index, choices)
            except MindSigmaError as error:
                faults.append((index, str(error)))
                if len(faults) > self.max_bad_images:
                    raise self._too_many(faults[0][1], len(faults)) from None
                continue
            batch.captions[row] = self.source.caption(index, choices[0])
            batch.image_size[row] = self.sampler.resolution.condition(self.source.sizes[index : index + 1])[0]
            return candidate != drawn, faults
        which = f"records of {bucket.height} x {bucket.width}" if self.features else "images"
        example = f", e.g. {faults[0][1]}" if faults else ""
        raise MindSigmaError(f"{self.source.path}: none of the {which} can be read{example}; {self._remedy()}")

    def _candidates(self, bucket, drawn, draw):
        yield drawn
        # Features are of one size; an image can be cut to any.
        for candidate in self.sampler.substitutes(bucket, draw, elsewhere=not self.features):
            if candidate != drawn:
                yield candidate

    def _note(self, faults):
        """Count records that cannot be read; warn, or raise if they are too many."""
        for index, fault in faults:
            if index in self.bad:
                continue
            self.bad[index] = fault
            if len(self.bad) > self.max_bad_images:
                raise self._too_many(fault, len(self.bad))
            warnings.warn(f"{fault}; another takes its place ({len(self.bad)} so far)", stacklevel=2)

    def _too_many(self, fault, count):
        more = f" (one of {count} that cannot be read)" if count > 1 else ""
        return MindSigmaError(f"{fault}{more}; {self._remedy()}; --max-bad-images N leaves out up to N")

    def _remedy(self):
        mend = "run tools/extract_features.py again" if self.features else f"mend or remove what is bad ({CHECK})"
        return f"{mend}, then the same command goes on"

    def _fill_image(self, batch, row, index, choices):
        resampling = self.sampler.resolution.resampling
        array = training_image(self.source, index, batch.height, batch.width, resampling, self.condition)
        array = array[:, :, ::-1] if choices[2] else array
        batch.images[row] = array[:3]
        if self.condition is not None:
            batch.control_images[row] = array[3:]

    def _fill_features(self, batch, row, index, choices):
        moments, states = self.source.read(index, choices[0])
        if batch.noise is not None:
            batch.noise[row] = self.source.noise(index)
        if batch.control_moments is not None:
            batch.control_moments[row] = self.source.condition(index)
        batch.moments[row] = moments
        batch.states[row, : len(states)] = states
        batch.mask[row, : len(states)] = 1

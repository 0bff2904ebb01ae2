"""Pairs for distillation in one step: noise, and the latents that a teacher makes of it for the captions of a data set.

They are features, as tools/extract_features.py writes them, of images that the teacher drew; a record's file holds the
noise, too.
"""

import numpy as np
from mindspore import Tensor

from mindsigma.data import generator
from mindsigma.data.features import CONDITION, MOMENTS, NOISE, STATES, FeatureFolder
from mindsigma.data.image_identity import find_identity
from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.captions import Caption
from mindsigma.training.extraction import STORED, identity_of


class Pairs:
    """The pairs of a folder of features.

    Args:
        source: FeatureSet, whose captions are drawn.
        folder: path of the pairs.
        pipeline: PixArtSigmaPipeline of the teacher.
        options: SamplingOptions.
        seed: of the noise; the noise of a record follows from it and from the record's place.

    Raises:
        MindSigmaError: the folder holds something else, or pairs made otherwise; the sampler draws noise of its own, so
            that the latents are no function of the first noise.
    """

    def __init__(self, source, folder, pipeline, options, seed=0):
        if options.solver(pipeline.convention).draws:
            raise MindSigmaError(f"--sampler {options.sampler}: draws noise at every step; take one that does not")
        self.source, self.pipeline, self.options, self.seed = source, pipeline, options, seed
        self.vae = pipeline.components.opened("vae").config
        made = {
            "dit": identity_of(pipeline.components.opened("dit").tensors),
            "convention": pipeline.convention,
            "seed": seed,
            **options.metadata(),
        }
        config = {name: value for name, value in source.config.items() if name != CONDITION}
        self.folder = FeatureFolder(folder, {**config, "moments_dtype": "fp32", "pairs": made})
        self.states_dtype = STORED[source.config.get("states_dtype", "fp32")]
        self.records = [self._record(i) for i in range(len(source))]

    def missing(self, rank=0, ranks=1):
        """Indices of this rank's records that have no good file yet, those of one bucket together."""
        share = [i for i in range(rank, len(self.records), ranks) if self.folder.tokens(self.records[i]) is None]
        return sorted(share, key=lambda i: (self.source.bucket(i), i))

    def run(self, indices, batch_size, progress=None):
        """Draw the records of these indices, `batch_size` at a time; `progress` gets the number of those done."""
        if not self.folder.has_null_caption():
            states, mask = self.source.null_caption()
            self.folder.write_null_caption(states, int(mask.sum()))
        while indices:
            bucket = self.source.bucket(indices[0])
            batch = [i for i in indices[:batch_size] if self.source.bucket(i) == bucket]
            self._draw(batch, batch_size, bucket)
            indices = indices[len(batch) :]
            if progress:
                progress(len(batch))

    def finish(self):
        """Write the index if all records are there; returns how many are to come."""
        tokens = [self.folder.tokens(record) for record in self.records]
        absent = tokens.count(None)
        if not absent:
            self.folder.write_index(self.records, tokens)
        return absent

    def _record(self, index):
        key, prompt, long_prompt, (height, width), _ = self.source[index]
        return Record(key, prompt or long_prompt, "", height, width, *self.source.place(index))

    def _draw(self, batch, batch_size, bucket):
        """Write the pairs of a batch, which is filled up so that there is one graph a bucket."""
        shape = self.folder.shapes.latents(bucket)
        noise = np.stack([generator(self.seed, "pair", i).standard_normal(shape, np.float32) for i in batch])
        captions = [self.source.read(i, True)[1] for i in batch]
        rows = np.arange(batch_size).clip(max=len(batch) - 1)
        states = np.zeros((batch_size, self.source.max_length, self.source.state_width), np.float32)
        mask = np.zeros((batch_size, self.source.max_length), np.int32)
        for row, i in enumerate(rows):
            states[row, : len(captions[i])], mask[row, : len(captions[i])] = captions[i], 1
        latents = self._denoised(noise[rows], Caption(Tensor(states), Tensor(mask)))
        mean = latents / self.vae.scaling_factor + self.vae.shift_factor
        for row, index in enumerate(batch):
            moments = np.concatenate([mean[row], np.zeros_like(mean[row])])
            if not np.isfinite(moments).all():
                raise MindSigmaError(f"{self.records[index].where}: the teacher's latents are not finite; use --dtype")
            tensors = {MOMENTS: moments, NOISE: noise[row], STATES: captions[row].astype(self.states_dtype)}
            self.folder.write(self.records[index], tensors, find_identity(self.records[index]))

    def _denoised(self, noise, caption):
        states, mask = self.source.null_caption()
        negative = Caption(Tensor(states[None]), Tensor(mask[None]))
        *_, last = self.pipeline.denoise(noise, caption, negative, self.options)
        return last.latents.asnumpy()

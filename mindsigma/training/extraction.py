"""Extraction of features: the VAE's moments and T5's states of a data set, by any number of processes, in any order."""

import hashlib
import warnings
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.data.feature_shards import FeatureShards
from mindsigma.data.features import CONDITION, LONG_STATES, MOMENTS, STATES, FeatureFolder
from mindsigma.data.image_identity import find_identity
from mindsigma.data.loader import CHECK, training_image
from mindsigma.data.record import UNREADABLE, BadRow
from mindsigma.data.shares import from_share
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline import memory
from mindsigma.pipeline.components import Components
from mindsigma.runtime import DTYPES, resolve_dtype
from mindsigma.weights.released import release_named

STORED = {"fp32": np.float32, "fp16": np.float16}

# Of each network, tensors whose bytes are part of its identity: the smallest ones, as T5-XXL takes minutes to read.
IDENTIFYING_TENSORS = 16
AHEAD = 2  # batches decoded while one is encoded


class Encoders:
    """VAE, T5 and tokenizer of a pipeline folder.

    Args:
        model: bundled or released name, hub id, or folder with vae/, text_encoder/ and tokenizer/.
        dtype: "fp32", "fp16", "bf16" or None for the device's default.
        text_encoder_memory: "whole", or "layers": T5's are read layer by layer for every batch; see open_t5.
    """

    def __init__(self, model, dtype=None, text_encoder_memory="whole"):
        release = release_named(model)
        if release is not None and not release.whole:
            model = release.components
        self.components = Components.of_folder(model, dtype, text_encoder_memory)
        vae, t5, tokenizer = (self.components.opened(name) for name in ("vae", "t5", "tokenizer"))
        self.identity = {
            "vae": identity_of(vae.tensors),
            "text_encoder": identity_of(t5.tensors),
            "tokenizer": hashlib.blake2b(tokenizer.path.read_bytes(), digest_size=8).hexdigest(),
            "dtype": next(name for name, value in DTYPES.items() if value == resolve_dtype(dtype)),
        }
        self.vae_config, self.state_width = vae.config, t5.config.d_model

    def memory(self, free=None):
        """Lines about the memory that the weights take, one or none; `free`: of memory.lines."""
        parts = [(memory.NAMES[name], memory.weight_bytes(self.components.opened(name))) for name in ("t5", "vae")]
        return memory.lines([parts], {"T5": "--text-encoder-memory layers reads it layer by layer"}, free)

    def load(self):
        """Read the weights, which until here were only checked."""
        self.components.network("vae")
        self.components.network("t5")

    def moments(self, images):
        """Mean and standard deviation of the posterior, unscaled, float32 (n, 2c, H / 8, W / 8), of (n, 3, H, W)."""
        moments = self.components.vae.encode(Tensor(images)).astype(ms.float32).asnumpy()
        mean, log_variance = np.split(moments, 2, axis=1)
        # The bounds of sample_posterior.
        return np.concatenate([mean, np.exp(0.5 * np.clip(log_variance, -30.0, 20.0))], axis=1)

    def states(self, texts, max_length, min_length=1):
        """(T5 states float32 (n, L, d), tokens of each text, number of texts that were cut at max_length)."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            caption = self.components.text_encoder(texts, max_length, min_length=min_length)
        cut = sum("cut off" in str(warning.message) for warning in caught)
        return caption.states.astype(ms.float32).asnumpy(), caption.mask.asnumpy().sum(1), cut


class Extraction:
    """The features of a data set in a folder.

    Args:
        records: Records.
        folder: path of the features.
        encoders: Encoders.
        resolution: Resolution.
        max_length: tokens at which captions are cut.
        batch_size: images encoded at once; incomplete batches are filled, so that there is one graph a bucket.
        states_dtype, moments_dtype: "fp16" or "fp32", of what is stored.
        threads: images decoded at once.
        strict: an image that cannot be read is an error; else it is noted and left out.
        shard_records: records of a shard; 0 writes a file a record.
        condition: Condition of a ControlNet, whose pictures' moments are stored, too, or None.

    Attributes:
        left_out: list of BadRow, images of all processes that cannot be read, known after `finish`.

    Raises:
        MindSigmaError: the folder holds something else, or features made otherwise.
    """

    def __init__(
        self,
        records,
        folder,
        encoders,
        resolution,
        max_length=300,
        batch_size=4,
        states_dtype="fp16",
        moments_dtype="fp32",
        threads=4,
        strict=False,
        shard_records=0,
        condition=None,
    ):
        for name, value in (("max_length", max_length), ("batch_size", batch_size), ("threads", threads)):
            if value < 1:
                raise MindSigmaError(f"{name} must be at least 1, not {value}")
        self.records, self.encoders, self.resolution = records, encoders, resolution
        self.max_length, self.batch_size, self.threads = max_length, batch_size, threads
        self.strict, self.left_out, self.condition = strict, [], condition
        self._states, self._moments = STORED[states_dtype], STORED[moments_dtype]
        config = {
            "resolution": resolution.as_dict(),
            **encoders.identity,
            "resampling": resolution.resampling,
            "max_length": max_length,
            "states_dtype": states_dtype,
            "moments_dtype": moments_dtype,
            "latent_channels": encoders.vae_config.latent_channels,
            "downsampling": encoders.vae_config.downsampling,
            "state_width": encoders.state_width,
        }
        if shard_records:
            self.folder = FeatureShards(folder, config, records, shard_records, condition)
        else:
            self.folder = FeatureFolder(folder, config, condition)
        self._sink = self.folder
        self.cut = 0  # captions longer than max_length, of those encoded by this object

    def missing(self, rank=0, ranks=1):
        """Indices of the records of this rank's share that have no good file yet, in order."""
        if not 0 <= rank < ranks:
            raise MindSigmaError(f"rank {rank} of {ranks}: ranks count from 0")
        share = range(rank, len(self.records), ranks)
        return [index for index, tokens in zip(share, self._tokens(share)) if tokens is None]

    def run(self, indices, progress=None):
        """Extract the records of these indices; every file is written beside its place and renamed.

        `progress` is called with the number of records done since the last call. Raises MindSigmaError for states that
        fp16 cannot hold and, if strict, for an image that cannot be read.
        """
        self._write_null_caption()
        if indices:
            self.encoders.load()
        self._run_chunks(self._chunks(indices), progress)

    def run_shards(self, rank=0, ranks=1, progress=None):
        """Extract the shards that nobody has and that no other process writes, this rank's share of them first.

        Returns the number of records extracted. `progress` and errors as of `run`.
        """
        self._write_null_caption()
        count = 0
        for number in from_share(self.folder.count, rank, ranks):
            if self.folder.is_there(number):
                continue
            with self.folder.claim(number) as mine:
                if mine and not self.folder.is_there(number):
                    count += self._run_shard(number, progress)
        return count

    def _run_shard(self, number, progress):
        chunks = list(self._chunks(self.folder.share(number)))
        buckets = {chunk[0]: bucket for bucket, chunk in chunks}
        with self.folder.open_shard(number, [chunk for _, chunk in chunks]) as self._sink:
            left = self._sink.left
            if left:
                self.encoders.load()
            self._run_chunks([(buckets[chunk[0]], chunk) for chunk in left], progress)
            self._sink.complete()
        return sum(map(len, left))

    def _write_null_caption(self):
        if not self.folder.has_null_caption():
            self.encoders.load()
            states, tokens, _ = self.encoders.states([""], self.max_length, min_length=self.max_length)
            self.folder.write_null_caption(states[0].astype(np.float32), int(tokens[0]))

    def _run_chunks(self, chunks, progress):
        """Extract (Bucket, indices of a batch) after each other, images decoded ahead."""
        with ThreadPoolExecutor(self.threads) as pool:
            pending = deque()
            try:
                for bucket, chunk in chunks:
                    pending.append((chunk, [pool.submit(self._image, index, bucket) for index in chunk]))
                    if len(pending) > AHEAD:
                        self._extract(*pending.popleft(), progress)
                while pending:
                    self._extract(*pending.popleft(), progress)
            finally:
                for _, tasks in pending:
                    for task in tasks:
                        task.cancel()

    def finish(self):
        """Write the index if every record of the data set has its features or cannot; returns how many are to come.

        Of shards it returns how many of them are to come. Raises MindSigmaError where no record has features.
        """
        if isinstance(self.folder, FeatureShards):
            absent, self.left_out = self.folder.finish()
            if not absent and len(self.left_out) == len(self.records):
                raise self._nothing(self.left_out)
            return absent
        tokens = self._tokens(range(len(self.records)))
        without = [self.records[index] for index, row in enumerate(tokens) if row is None]
        rows = [BadRow(record.where, UNREADABLE, self.folder.bad(record)) for record in without]
        self.left_out = [row for row in rows if row.detail]
        absent = len(rows) - len(self.left_out)
        if absent:
            return absent
        if len(rows) == len(tokens):
            raise self._nothing(rows)
        good = [index for index, row in enumerate(tokens) if row is not None]
        self.folder.write_index([self.records[i] for i in good], [tokens[i] for i in good], self.left_out)
        return 0

    def _nothing(self, rows):
        """MindSigmaError where all records are among the BadRows."""
        example = f"{rows[0].where}: {rows[0].detail}; " if rows else ""
        return MindSigmaError(f"{example}{self.records.path}: no image can be read; {CHECK}")

    def _tokens(self, indices):
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(lambda index: self.folder.tokens(self.records[index]), indices))

    def _chunks(self, indices):
        """(Bucket, indices of a batch), bucket after bucket."""
        if len(indices) == 0:
            return
        buckets = self.resolution.buckets()
        indices = np.asarray(indices)
        assigned = self.resolution.assign(self.records.sizes[indices])
        for number in np.unique(assigned):
            members = indices[assigned == number].tolist()
            for start in range(0, len(members), self.batch_size):
                yield buckets[number], members[start : start + self.batch_size]

    def _image(self, index, bucket):
        """(array or what is wrong with the image, its identity) of a record."""
        record = self.records[index]
        identity = find_identity(record, self.condition)
        try:
            size = bucket[1:]
            return training_image(self.records, index, *size, self.resolution.resampling, self.condition), identity
        except MindSigmaError as error:
            if self.strict:
                raise MindSigmaError(f"{error}; mend or remove it, or run without --strict; {CHECK}") from None
            return str(error).removeprefix(f"{record.where}: "), identity

    def _extract(self, chunk, tasks, progress):
        read = [(self.records[index], *task.result()) for index, task in zip(chunk, tasks)]
        for record, image, identity in read:
            if isinstance(image, str):
                self._sink.write_bad(record, image, identity)
        self._encode([row for row in read if not isinstance(row[1], str)])
        if self._sink is not self.folder:
            self._sink.sync()
        if progress:
            progress(len(chunk))

    def _encode(self, rows):
        """Write the features of at most `batch_size` (Record, array, identity)."""
        if not rows:
            return
        records, images, identities = zip(*rows)
        images = np.stack([*images, *[images[-1]] * (self.batch_size - len(rows))])
        moments = self.encoders.moments(images[:, :3])
        control = None if self.condition is None else self.encoders.moments(images[:, 3:])
        short = self._captions([record.prompt for record in records])
        long = self._captions([record.long_prompt for record in records])
        for row, record in enumerate(records):
            tensors = {MOMENTS: self._stored(moments[row], self._moments, record)}
            if control is not None:
                tensors[CONDITION] = self._stored(control[row], self._moments, record)
            for name, states in ((STATES, short[row]), (LONG_STATES, long[row])):
                if states is not None:
                    tensors[name] = self._stored(states, self._states, record)
            self._sink.write(record, tensors, identities[row])

    def _captions(self, texts):
        """T5 states (L, d) of each text, None for an empty one."""
        given = [text for text in texts if text]
        if not given:
            return [None] * len(texts)
        states, tokens, cut = self.encoders.states(given + [""] * (self.batch_size - len(given)), self.max_length)
        self.cut += cut
        rows = iter(zip(states, tokens))
        return [(lambda row: row[0][: row[1]])(next(rows)) if text else None for text in texts]

    def _stored(self, array, dtype, record):
        with np.errstate(over="ignore"):
            stored = np.ascontiguousarray(array, dtype)
        if not np.isfinite(stored).all():
            if np.isfinite(array).all():
                raise MindSigmaError(f"{record.where}: features exceed fp16; store them with fp32")
            raise MindSigmaError(f"{record.where}: features are not finite; extract with --dtype fp32")
        return stored


def identity_of(tensors):
    """Text that differs where the networks differ: of all names and shapes, and of the smallest tensors' values."""
    names = sorted(tensors.names())
    text = repr([(name, tensors.shape(name)) for name in names])
    smallest = sorted(names, key=lambda name: (int(np.prod(tensors.shape(name))), name))[:IDENTIFYING_TENSORS]
    crc = zlib.crc32(text.encode())
    for name in smallest:
        crc = zlib.crc32(np.ascontiguousarray(tensors.read(name), np.float32).tobytes(), crc)
    return f"{len(names)} tensors, {crc:08x}"

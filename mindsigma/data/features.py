"""Stored features of a data set: the VAE's moments and T5's states of every record, one safetensors file a record.

features.json                what they were made with
null_caption.safetensors     T5's states of the empty caption
samples/ab/ab...safetensors  moments and states of a record, or why its image cannot be read; moments of the condition
                             of a ControlNet if there is one; of pairs the noise, too
index.jsonl                  the records, written when all are there
left_out.txt                 those whose image cannot be read, if there are any

`feature_shards.py` has the form for many records, in which the same files are members of tar shards.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindsigma.data.image_identity import find_identity, is_same_image
from mindsigma.data.own_folder import Held
from mindsigma.data.prepared import write_bad_rows
from mindsigma.data.records import fingerprint
from mindsigma.data.resolution import Resolution
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes, understanding
from mindsigma.weights.formats.atomic import naming, replacing, write_json
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec

CONFIG, INDEX, NULL, SAMPLES = "features.json", "index.jsonl", "null_caption.safetensors", "samples"
LEFT_OUT = "left_out.txt"
FORMAT = "mindsigma-features"
FILES, SHARDS = 1, 2  # versions of the format: a file a record, or shards
MOMENTS, STATES, LONG_STATES = "moments", "states", "long_states"
NOISE = "noise"  # of pairs: what the teacher made the latents of
CONDITION = "condition"  # moments of the picture that a ControlNet is guided by; key of the config that tells its kind
BAD = "bad"  # key of the metadata that tells why there are no features
AGAIN = "run tools/extract_features.py again"
LARGEST_CONFIG = 1 << 16  # bytes
LARGEST = {"max_length": 2**16, "latent_channels": 2**10, "downsampling": 2**6, "state_width": 2**16}
DTYPES = (np.float32, np.float16)


def is_feature_folder(path):
    """Whether a folder holds features, finished or not."""
    return (Path(path) / CONFIG).is_file()


def is_sharded(path):
    """Whether the features of a folder are in shards; of a damaged description no."""
    file = Path(path) / CONFIG
    try:
        return load_json(file, read_bytes(file, LARGEST_CONFIG), "").get("format_version") == SHARDS
    except MindSigmaError:
        return False


def sample_file(folder, key):
    """Path of a record's file in a folder (Path). Named by a digest: a key may be anything."""
    try:
        data = key.encode("utf-8", "surrogateescape")  # a name of wrong UTF-8 as its bytes
    except UnicodeEncodeError:
        data = key.encode("utf-8", "surrogatepass")
    name = hashlib.blake2b(data, digest_size=16).hexdigest()
    return folder / SAMPLES / name[:2] / f"{name}.safetensors"


@dataclass(frozen=True)
class Shapes:
    """Sizes of a folder's arrays: what its config tells of them, a Resolution and whole numbers."""

    resolution: Resolution
    max_length: int
    latent_channels: int
    downsampling: int
    state_width: int

    @classmethod
    def of(cls, path, config):
        """From the config of the folder `path`. Raises MindSigmaError for what no extraction writes."""
        file = path / CONFIG
        with understanding(file, AGAIN):
            resolution = dict(config["resolution"])
            for name, kind in (("base", int), ("multi_scale", bool), ("table", str)):
                if type(resolution[name]) is not kind:
                    raise ValueError(f"resolution: {name} is {one_line(repr(resolution[name]), 40)}")
            numbers = {name: config[name] for name in LARGEST}
            for name, value in numbers.items():
                if type(value) is not int or not 1 <= value <= LARGEST[name]:
                    raise ValueError(f"{name} is {one_line(repr(value), 40)}, not a number of 1 to {LARGEST[name]}")
            side = numbers["downsampling"]
            try:
                shapes = cls(Resolution(**resolution), **numbers)
            except MindSigmaError as error:
                raise MindSigmaError(f"{file}: {error}; {AGAIN}") from None
            if any(bucket.height % side or bucket.width % side for bucket in shapes.resolution.buckets()):
                raise ValueError(f"downsampling is {side}, of which the resolution is no multiple")
        return shapes

    def moments(self, bucket):
        """Shape of the moments of an image of a bucket."""
        return 2 * self.latent_channels, bucket.height // self.downsampling, bucket.width // self.downsampling

    def latents(self, bucket):
        """Shape of the latents of an image of a bucket."""
        channels, height, width = self.moments(bucket)
        return channels // 2, height, width

    def bucket_of(self, height, width):
        """Bucket of an image of this size."""
        return self.resolution.buckets()[self.resolution.assign([(height, width)])[0]]

    def fault(self, tensors, bucket, names):
        """What is wrong with a record's arrays, of which `names` are asked for, or ""."""
        for name in (MOMENTS, *names):
            if name not in tensors:
                return f"holds no {name}"
            shape, dtype = tensors[name].shape, tensors[name].dtype
            if name in (MOMENTS, CONDITION, NOISE):
                wanted = self.latents(bucket) if name == NOISE else self.moments(bucket)
                fits = shape == wanted
            else:
                wanted = f"(1 to {self.max_length}, {self.state_width})"
                fits = len(shape) == 2 and shape[1] == self.state_width and 1 <= shape[0] <= self.max_length
            if not fits or dtype not in DTYPES:
                return f"its {name} are {dtype} {shape}, not floats of {wanted}"
        return ""


class FeatureWriter:
    """A folder of features while it is written, in either form, held so that no other kind of writer comes between.

    Args:
        path: the folder: absent, empty, or one of features.
        config: dict that tells what the features were made with; it is stored, and must be that of an earlier run.
        condition: Condition whose moments are part of a record's arrays, or None.

    Raises:
        MindSigmaError: the folder holds something else, or features made otherwise.
    """

    version = None  # of the format

    def __init__(self, path, config, condition=None):
        self.path, self.condition = Path(path), condition
        if condition is not None:
            config = {**config, CONDITION: condition.as_dict()}
        self.config = json.loads(json.dumps(config))
        self.shapes = Shapes.of(self.path, self.config)
        self._made_with = fingerprint([sorted(self.config.items())])
        self._require_free()
        self._held = Held(self.path, shared=True)
        if is_feature_folder(self.path):
            stored = read_config(self.path, self.version)
            for name in dict.fromkeys([*self.config, *stored]):
                if stored.get(name) != self.config.get(name):
                    old, new = (one_line(repr(config.get(name)), 200) for config in (stored, self.config))
                    raise MindSigmaError(
                        f"{self.path}: holds features made with {one_line(name)} {old}, now it is {new}; choose "
                        "another folder, or delete this one"
                    )
        else:
            description = {"format": FORMAT, "format_version": self.version, "config": self.config}
            write_json(self.path / CONFIG, description)

    def write_null_caption(self, states, tokens):
        """Write T5's states of the empty caption (max_length, d), of which the first `tokens` are of real tokens."""
        self._write(self.path / NULL, {STATES: states}, {"tokens": str(tokens)})

    def has_null_caption(self):
        """Whether the null caption is there and sound."""
        try:
            read_null_caption(self.path, self.shapes)
        except MindSigmaError:
            return False
        return True

    def write_left_out(self, rows):
        """Write, or remove, the list of BadRow of images that cannot be read."""
        if rows:
            write_bad_rows(self.path / LEFT_OUT, rows)
        else:
            with naming(self.path / LEFT_OUT):
                (self.path / LEFT_OUT).unlink(missing_ok=True)

    def _require_free(self):
        """Raise unless the folder is absent, one of features, or empty but for what is hidden, as leftovers are."""
        if not self.path.is_dir():
            return
        with naming(self.path):
            foreign = [name for name in os.listdir(self.path) if not name.startswith(".")]
        if foreign and not is_feature_folder(self.path):  # asked last: another process may just begin
            raise MindSigmaError(
                f"{self.path}: holds something else, such as {one_line(foreign[0])}; choose an empty folder"
            )

    def identity(self, record):
        """What a record's file of features says of itself: dict of texts."""
        source = (record.key, record.prompt, record.long_prompt, record.height, record.width)
        return {"source": fingerprint([source]), "config": self._made_with}

    @staticmethod
    def _write(path, tensors, metadata):
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
        write_safetensors(path, specs, tensors.__getitem__, metadata)


class FeatureFolder(FeatureWriter):
    """A folder of features, a file a record, while it is written."""

    version = FILES

    def sample_file(self, key):
        """Path of a record's file."""
        return sample_file(self.path, key)

    def write(self, record, tensors, image=None):
        """Write a record's arrays by name, whole or not at all; `image`: what image_identity.find_identity gave."""
        self._withdraw_index(record)
        self._write(self.sample_file(record.key), tensors, {**self.identity(record), **(image or {})})

    def write_bad(self, record, reason, image=None):
        """Note that a record's image cannot be read, in the place of its arrays."""
        self._withdraw_index(record)
        note = {**self.identity(record), **(image or {}), BAD: one_line(reason, 500)}
        self._write(self.sample_file(record.key), {BAD: np.zeros(1, np.uint8)}, note)  # a file of no tensor is none

    def tokens(self, record):
        """(tokens of the short caption, of the long one), 0 where there is none; None if the record has no good file.

        A file is good if it is sound and was made of the same image, captions and size with the same configuration.
        """
        tensors, metadata = self._read(record)
        names = [name for name, text in ((STATES, record.prompt), (LONG_STATES, record.long_prompt)) if text]
        wanted = [*names, *([CONDITION] if self.condition else [])]
        if tensors is None or self.shapes.fault(tensors, self.shapes.bucket_of(record.height, record.width), wanted):
            return None
        if BAD in metadata or not self._is_current(record, metadata):
            return None
        return tuple(len(tensors[name]) if name in names else 0 for name in (STATES, LONG_STATES))

    def bad(self, record):
        """Why the record's image, as it is now, could not be read; "" unless that was noted."""
        _, metadata = self._read(record)
        return metadata[BAD] if metadata and BAD in metadata and self._is_current(record, metadata) else ""

    def _is_current(self, record, metadata):
        return is_current(record, metadata, condition=self.condition)

    def write_index(self, records, tokens, left_out=()):
        """Declare the folder complete: lists of Record, of what `tokens` told of them, and of BadRow."""
        target = self.path / INDEX
        self.write_left_out(left_out)
        with naming(target), replacing(target) as file:
            for record, (short, long) in zip(records, tokens):
                row = {
                    "key": record.key,
                    "prompt": record.prompt,
                    "sharegpt4v": record.long_prompt,
                    "height": record.height,
                    "width": record.width,
                    "tokens": [short, long],
                }
                # A key may hold bytes that are no UTF-8, as JSON's own escapes.
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))

    def _withdraw_index(self, record):
        """What replaces a record's file makes the folder incomplete until all that changed is done again."""
        if os.path.lexists(self.sample_file(record.key)):
            with naming(self.path / INDEX):
                (self.path / INDEX).unlink(missing_ok=True)

    def _read(self, record):
        """(tensors, metadata) of a record's file, (None, None) if it is absent, damaged or of something else."""
        try:
            tensors, metadata = read_safetensors(self.sample_file(record.key))
        except MindSigmaError:
            return None, None
        same = all(metadata.get(name) == value for name, value in self.identity(record).items())
        return (tensors, metadata) if same else (None, None)


def is_current(record, metadata, stored=str, condition=None):
    """Whether the metadata of a file of features are of a Record's image as it is now; arguments of is_same_image."""
    if BAD in metadata and "stamp" not in metadata:
        return not find_identity(record, condition)
    return is_same_image(record, metadata, stored, condition)


def read_config(path, version=FILES):
    """What the features of a folder (Path), in this form, were made with, a dict. Raises MindSigmaError."""
    file = path / CONFIG
    document = load_json(file, read_bytes(file, LARGEST_CONFIG), "the description of features")
    if document.get("format") == FORMAT and document.get("format_version") in {FILES, SHARDS} - {version}:
        forms = {FILES: "a file a record", SHARDS: "shards"}
        other = forms[document["format_version"]]
        raise MindSigmaError(f"{file}: these features are {other}, not {forms[version]}; choose another folder")
    if document.get("format") != FORMAT or document.get("format_version") != version:
        raise MindSigmaError(f"{file}: another format than this version's; extract into another folder")
    if not isinstance(document.get("config"), dict):
        raise MindSigmaError(f"{file}: does not tell what the features were made with; extract into another folder")
    return document["config"]


def read_null_caption(path, shapes):
    """(states float32 (max_length, d), number of its tokens) of the null caption of a folder. Raises MindSigmaError."""
    file = path / NULL
    tensors, metadata = read_safetensors(file)
    wanted = shapes.max_length, shapes.state_width
    states, tokens = tensors.get(STATES), metadata.get("tokens", "")
    if states is None or states.shape != wanted or states.dtype not in DTYPES:
        raise MindSigmaError(f"{file}: holds no states {wanted} of the null caption; delete it and {AGAIN}")
    if not (tokens.isascii() and tokens.isdigit() and len(tokens) < 6 and 1 <= int(tokens) <= shapes.max_length):
        raise MindSigmaError(f"{file}: does not tell the tokens of the null caption; delete it and {AGAIN}")
    return states.astype(np.float32), int(tokens)

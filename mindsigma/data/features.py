"""Stored features of a data set: the VAE's moments and T5's states of every record, one safetensors file a record."""

import hashlib
import json
from pathlib import Path

import numpy as np

from mindsigma.checkpoints.atomic import naming, replacing, write_json
from mindsigma.checkpoints.safetensors_file import read_safetensors
from mindsigma.checkpoints.safetensors_writer import write_safetensors
from mindsigma.checkpoints.tensor_stream import TensorSpec
from mindsigma.data.records import fingerprint
from mindsigma.data.resolution import Resolution
from mindsigma.errors import MindSigmaError

CONFIG, INDEX, NULL, SAMPLES = "features.json", "index.jsonl", "null_caption.safetensors", "samples"
FORMAT = {"format": "mindsigma-features", "format_version": 1}
MOMENTS, STATES, LONG_STATES = "moments", "states", "long_states"
AGAIN = "run tools/extract_features.py again"


def is_feature_folder(path):
    """Whether a folder holds features, finished or not."""
    return (Path(path) / CONFIG).is_file()


class FeatureFolder:
    """Files of a folder of features, as they are written.

    Args:
        path: the folder.
        config: dict that tells what the features were made with; it is stored, and must be that of an earlier run.

    Raises:
        MindSigmaError: the folder holds features made otherwise.
    """

    def __init__(self, path, config):
        self.path = Path(path)
        self.config = json.loads(json.dumps(config))
        if is_feature_folder(self.path):
            _, stored = _read_config(self.path)
            for name in dict.fromkeys([*self.config, *stored]):
                if stored.get(name) != self.config.get(name):
                    raise MindSigmaError(
                        f"{self.path}: holds features made with {name} {stored.get(name)!r}, now it is "
                        f"{self.config.get(name)!r}; choose another folder, or delete this one"
                    )
        else:
            write_json(self.path / CONFIG, {**FORMAT, "config": self.config})

    def sample_file(self, key):
        """Path of a record's file. Named by a digest: a key may be anything."""
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        return self.path / SAMPLES / name[:2] / f"{name}.safetensors"

    def write(self, record, tensors):
        """Write a record's arrays by name, whole or not at all."""
        self._write(self.sample_file(record.key), tensors, self._identity(record))

    def write_null_caption(self, states, tokens):
        """Write T5's states of the empty caption (max_length, d), of which the first `tokens` are of real tokens."""
        self._write(self.path / NULL, {STATES: states}, {"tokens": str(tokens)})

    def has_null_caption(self):
        """Whether the null caption is there and readable."""
        return _tensors(self.path / NULL)[0] is not None

    def tokens(self, record):
        """(tokens of the short caption, of the long one), 0 where there is none; None if the record has no good file.

        A file is good if it is complete and was made of the same captions and size with the same configuration.
        """
        tensors, metadata = _tensors(self.sample_file(record.key))
        if tensors is None or MOMENTS not in tensors or metadata != self._identity(record):
            return None
        return tuple(len(tensors[name]) if name in tensors else 0 for name in (STATES, LONG_STATES))

    def write_index(self, records, tokens):
        """Declare the folder complete: list of Record and of what `tokens` told of them."""
        target = self.path / INDEX
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
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())

    def _identity(self, record):
        """What a file of features says of itself."""
        source = (record.key, record.prompt, record.long_prompt, record.height, record.width)
        return {"source": fingerprint([source]), "config": fingerprint([sorted(self.config.items())])}

    @staticmethod
    def _write(path, tensors, metadata):
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
        write_safetensors(path, specs, tensors.__getitem__, metadata)


class FeatureSet:
    """Features as tools/extract_features.py wrote them; stands where Records stand.

    Attributes:
        path: the folder.
        config: dict, what the features were made with.
        resolution: Resolution that the images were cut for.
        sizes: int64 (n, 2), height and width of each image in pixels before it was cut.
        state_width: channels of T5's states.

    Raises:
        MindSigmaError: no features there, or not complete.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not is_feature_folder(self.path):
            raise MindSigmaError(f"{self.path}: no folder of features ({CONFIG} is absent)")
        self.config = _read_config(self.path)[1]
        try:
            self.resolution = Resolution(**self.config["resolution"])
            self.state_width = int(self.config["state_width"])
            self.max_length = int(self.config["max_length"])
            self._channels, self._downsampling = (int(self.config[n]) for n in ("latent_channels", "downsampling"))
        except (KeyError, TypeError, ValueError) as error:
            raise MindSigmaError(f"{self.path / CONFIG}: not as this version writes it ({error}); {AGAIN}") from None
        self._folder = FeatureFolder(self.path, self.config)
        self._rows = self._read_index()
        self.sizes = np.array([row[3] for row in self._rows], np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self._rows)

    def caption(self, index, real):
        """Caption of a record, as Record.caption."""
        _, prompt, long_prompt, _, _ = self._rows[index]
        return (prompt or long_prompt) if real else (long_prompt or prompt)

    def moments_shape(self, bucket):
        """Shape of the moments of an image of a bucket."""
        side = self._downsampling
        return 2 * self._channels, bucket.height // side, bucket.width // side

    def read(self, index, real):
        """(moments float32 (2c, h, w), T5 states float32 (L, d) without padding) of a record and the caption chosen."""
        key, prompt, long_prompt, _, _ = self._rows[index]
        name = STATES if (real and prompt) or not long_prompt else LONG_STATES
        file = self._folder.sample_file(key)
        tensors, _ = read_safetensors(file)
        if MOMENTS not in tensors or name not in tensors or tensors[name].shape[1:] != (self.state_width,):
            raise MindSigmaError(f"{file}: holds no {MOMENTS} or no {name} of {self.state_width} channels; {AGAIN}")
        return tensors[MOMENTS].astype(np.float32), tensors[name].astype(np.float32)

    def null_caption(self, max_length=None):
        """T5's states of the empty caption: (states float32 (max_length, d), mask int32 (max_length,)).

        All rows are T5's, as in the official null embedding, also those behind the caption, whose mask is 0.
        """
        tensors, metadata = read_safetensors(self.path / NULL)
        states = tensors[STATES].astype(np.float32)
        length = max_length or len(states)
        if length > len(states):
            raise MindSigmaError(
                f"{self.path}: the null caption was extracted for {len(states)} tokens, not for {length}; "
                f"extract again with --max-length {length}"
            )
        mask = np.zeros(length, np.int32)
        mask[: int(metadata["tokens"])] = 1
        return states[:length], mask

    def check_use(self, resolution, max_length, flip=0.0):
        """Raise MindSigmaError unless training at this Resolution and caption length can use these features."""
        if resolution != self.resolution:
            raise MindSigmaError(f"{self.path}: features are of {self.resolution}, training wants {resolution}")
        longest = max((max(row[4]) for row in self._rows), default=0)
        cut = longest == self.max_length and max_length > self.max_length
        if longest > max_length or cut:
            raise MindSigmaError(
                f"{self.path}: captions were extracted with at most {self.max_length} tokens (longest: {longest}), "
                f"training wants {max_length}; extract again with --max-length {max_length}"
            )
        if flip:
            raise MindSigmaError(f"{self.path}: features cannot be mirrored; train from images, or without flip")

    def fingerprint(self):
        """Text that differs where the features or their order differ: what a resumed run must find again."""
        return fingerprint([sorted(self.config.items()), *self._rows])

    def _read_index(self):
        file = self.path / INDEX
        if not file.is_file():
            raise MindSigmaError(f"{self.path}: the extraction is not finished ({INDEX} is absent); {AGAIN}")
        rows = []
        try:
            with open(file, encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    size = int(row["height"]), int(row["width"])
                    tokens = tuple(int(count) for count in row["tokens"])
                    rows.append((row["key"], row["prompt"], row["sharegpt4v"], size, tokens))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MindSigmaError(f"{file}: damaged ({error}); delete it and {AGAIN}") from None
        return rows


def _read_config(path):
    """(whole document, its config) of a folder of features."""
    file = path / CONFIG
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT["format"] or document["format_version"] != FORMAT["format_version"]:
            raise MindSigmaError(f"{file}: another format than this version's; extract into another folder")
        return document, dict(document["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, MindSigmaError):
            raise
        raise MindSigmaError(f"{file}: not readable as a description of features ({error})") from None


def _tensors(file):
    """(tensors, metadata) of a file, (None, None) if it is absent or damaged."""
    try:
        return read_safetensors(file)
    except MindSigmaError:
        return None, None

"""Features as training reads them, in the place of records."""

import os
from pathlib import Path

import numpy as np

from mindsigma.data.features import (
    AGAIN,
    CONDITION,
    CONFIG,
    FILES,
    INDEX,
    LONG_STATES,
    MOMENTS,
    NOISE,
    STATES,
    Shapes,
    is_feature_folder,
    read_config,
    read_null_caption,
    sample_file,
)
from mindsigma.data.records import fingerprint
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, open_regular, understanding
from mindsigma.weights.formats.safetensors_file import read_safetensors

LONGEST_LINE = 16 << 20  # bytes of a row of the index: two captions of at most 1 MB, as JSON
LARGEST_INDEX = 16 << 30  # bytes; some 50 million records
LARGEST_SIDE = 2**31  # pixels


class FeatureSet:
    """Features as tools/extract_features.py wrote them; stands where Records stand.

    Attributes:
        path: the folder.
        config: dict, what the features were made with.
        resolution: Resolution that the images were cut for.
        sizes: int64 (n, 2), height and width of each image in pixels before it was cut.
        max_length: tokens at which captions were cut.
        state_width: channels of T5's states.

    Raises:
        MindSigmaError: no features there, not complete, or not as an extraction writes them.
    """

    version = FILES

    def __init__(self, path):
        self.path = Path(path)
        if not is_feature_folder(self.path):
            raise MindSigmaError(f"{self.path}: no folder of features ({CONFIG} is absent)")
        self.config = read_config(self.path, self.version)
        self._take_config()
        self._rows, self.sizes = self._read_index()

    def _take_config(self):
        self._shapes = Shapes.of(self.path, self.config)
        self.resolution, self.max_length = self._shapes.resolution, self._shapes.max_length
        self.state_width = self._shapes.state_width
        self._buckets = self.resolution.buckets()

    @property
    def has_noise(self):
        """Whether these are pairs (tools/make_pairs.py): latents that a teacher made of noise, and the noise."""
        return "pairs" in self.config

    @property
    def has_condition(self):
        """Whether each record has the moments of a condition of a ControlNet, too."""
        return CONDITION in self.config

    def __len__(self):
        return len(self._rows)

    def __iter__(self):
        """(key, prompt, long prompt, (height, width), (tokens of the short caption, of the long one)) of each."""
        return iter(self._rows)

    def __getitem__(self, index):
        """What iteration gives of a record."""
        return self._rows[index]

    def bucket(self, index):
        """Bucket of a record."""
        return self._buckets[self.resolution.assign(self.sizes[index : index + 1])[0]]

    def caption(self, index, real):
        """Caption of a record, as Record.caption."""
        _, prompt, long_prompt, _, _ = self._rows[index]
        return (prompt or long_prompt) if real else (long_prompt or prompt)

    def moments_shape(self, bucket):
        """Shape of the moments of an image of a bucket."""
        return self._shapes.moments(bucket)

    def where(self, index):
        """Path of a record's file."""
        return sample_file(self.path, self._rows[index][0])

    def place(self, index):
        """(path of the file with a record's arrays, offset, bytes); 0 bytes are the whole file."""
        return str(self.where(index)), 0, 0

    def tensors(self, index):
        """dict of the arrays of a record by name, all that are there, as they are stored."""
        return read_safetensors(self.where(index))[0]

    def require_sound(self, index):
        """Raise MindSigmaError, which names the file, unless a record's arrays are there and whole."""
        *_, tokens = self._rows[index]
        tensors = self.tensors(index)
        names = [name for name, count in zip((STATES, LONG_STATES), tokens) if count]
        names += [NOISE] * self.has_noise + [CONDITION] * self.has_condition
        fault = self._shapes.fault(tensors, self.bucket(index), names)
        if fault:
            raise MindSigmaError(f"{self.where(index)}: {fault}; delete it and {AGAIN}")

    def read(self, index, real):
        """(moments float32 (2c, h, w), T5 states float32 (L, d) without padding) of a record and the caption chosen."""
        _, prompt, long_prompt, _, tokens = self._rows[index]
        short = bool((real and prompt) or not long_prompt)
        name = STATES if short else LONG_STATES
        tensors = self.tensors(index)
        fault = self._shapes.fault(tensors, self.bucket(index), [name])
        if not fault and len(tensors[name]) != tokens[not short]:
            fault = f"its {name} are of {len(tensors[name])} tokens, where {INDEX} tells {tokens[not short]}"
        if fault:
            raise MindSigmaError(f"{self.where(index)}: {fault}; delete it and {AGAIN}")
        return tensors[MOMENTS].astype(np.float32), tensors[name].astype(np.float32)

    def noise(self, index):
        """float32 (c, h, w), what the latents of a record were made of; of pairs only."""
        return self._array(index, NOISE, "run tools/make_pairs.py again")

    def condition(self, index):
        """float32 (2c, h, w), moments of the condition of a record; where there are some only."""
        return self._array(index, CONDITION, AGAIN)

    def _array(self, index, name, remedy):
        tensors = self.tensors(index)
        fault = self._shapes.fault(tensors, self.bucket(index), [name])
        if fault:
            raise MindSigmaError(f"{self.where(index)}: {fault}; delete it and {remedy}")
        return tensors[name].astype(np.float32)

    def null_caption(self, max_length=None):
        """T5's states of the empty caption: (states float32 (max_length, d), mask int32 (max_length,)).

        All rows are T5's, as in the official null embedding, also those behind the caption, whose mask is 0.
        """
        states, tokens = read_null_caption(self.path, self._shapes)
        length = max_length or len(states)
        if length > len(states):
            raise MindSigmaError(
                f"{self.path}: the null caption was extracted for {len(states)} tokens, not for {length}; "
                f"train with --max-length {len(states)}, or extract again with --max-length {length}"
            )
        mask = np.zeros(length, np.int32)
        mask[:tokens] = 1
        return states[:length], mask

    def check_use(self, resolution, max_length, flip=0.0):
        """Raise MindSigmaError unless training at this Resolution and caption length can use these features."""
        if resolution != self.resolution:
            raise MindSigmaError(f"{self.path}: features are of {self.resolution}, training wants {resolution}")
        longest = self._longest()
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

    def _longest(self):
        """Tokens of the longest caption."""
        return max((max(row[4]) for row in self._rows), default=0)

    def _read_index(self):
        """(the rows, sizes as the attribute)."""
        file = self.path / INDEX
        if not file.is_file():
            raise MindSigmaError(f"{self.path}: the extraction is not finished ({INDEX} is absent); {AGAIN}")
        rows = []
        with open_regular(file) as lines, understanding(file):
            size = lines.seek(0, os.SEEK_END)
            if size > LARGEST_INDEX:
                raise MindSigmaError(f"{file}: {size} bytes, more than the {LARGEST_INDEX} that are read")
            lines.seek(0)
            while line := lines.readline(LONGEST_LINE):
                where = f"{file}: line {len(rows) + 1}"
                if not line.endswith(b"\n"):
                    raise MindSigmaError(f"{where} is cut off or too long; delete the file and {AGAIN}")
                with understanding(where, f"delete the file and {AGAIN}"):
                    rows.append(self._row(where, line))
        if not rows:
            raise MindSigmaError(f"{file}: tells no record; delete it and {AGAIN}")
        if len({row[0] for row in rows}) != len(rows):
            raise MindSigmaError(f"{file}: tells a record twice; delete it and {AGAIN}")
        return rows, np.array([row[3] for row in rows], np.int64).reshape(-1, 2)

    def _row(self, where, line):
        """Row of a line of the index. Raises what `understanding` expects for one that no extraction writes."""
        row = load_json(where, line, "the row")
        key, *texts = (row[name] for name in ("key", "prompt", "sharegpt4v"))
        size, tokens = (row["height"], row["width"]), row["tokens"]
        if not all(isinstance(text, str) for text in (key, *texts)) or not any(texts):
            raise ValueError("key, prompt and sharegpt4v must be texts, and one of the captions must not be empty")
        if not all(type(side) is int and 1 <= side < LARGEST_SIDE for side in size):
            raise ValueError(f"height and width are {one_line(size, 60)}")
        fits = isinstance(tokens, list) and len(tokens) == 2 and all(type(count) is int for count in tokens)
        if not fits or any(not bool(t) <= n <= self.max_length * bool(t) for t, n in zip(texts, tokens)):
            raise ValueError(f"tokens are {one_line(tokens, 60)}, of captions of at most {self.max_length}")
        return key, *texts, size, tuple(tokens)

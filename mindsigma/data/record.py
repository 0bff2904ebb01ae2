"""One captioned image, what is wrong with a row that is none, and the making of one from the values of a row."""

import math
import os
from typing import NamedTuple

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json

# Names that the columns of a table or the keys of a JSON entry may have; the first that is present counts.
IMAGE_NAMES = ("path", "image", "file_name", "filename", "file")
IMAGE_NAMES += ("image_path", "img_path", "file_path", "filepath", "img")
PROMPT_NAMES = ("prompt", "caption", "text")
LONG_NAMES = ("sharegpt4v", "long_caption", "long_prompt")
TAG_NAMES = ("tags",)  # taken where there is no caption
KEY = "\0key"  # of a row that a JSON object names by its key: no name of a column

# Suffixes, in lower case, of a text that is the caption of the image beside it, and of a side-car with more.
CAPTION_SUFFIXES = (".txt", ".caption", ".cap", ".captions", ".text", ".tags")
SIDE_CAR = ".json"
LARGEST_TEXT = 2**20  # bytes of either

BROKEN, OUTSIDE, ABSENT, UNREADABLE = "broken row", "outside the folder", "no image file", "not a readable image"
NO_CAPTION, BAD_SIZE, DUPLICATE, RATIO = "no caption", "bad size", "duplicate", "aspect ratio out of range"
NOT_READ = "kind of file that is not read"


class Record(NamedTuple):
    """A captioned image.

    Attributes:
        key: unique within the data set; the image's path below it, for shards with the shard's name before.
        prompt, long_prompt: short and long caption; at most one is "".
        height, width: pixels, upright; 0 while unknown.
        file: path of the image, or of the shard that holds it.
        offset, length: bytes of the image within a shard; length 0 is the whole file.
    """

    key: str
    prompt: str
    long_prompt: str
    height: int
    width: int
    file: str
    offset: int = 0
    length: int = 0

    @property
    def where(self):
        """The image's name for messages."""
        return f"{self.file}: {self.key}" if self.length else self.file

    def caption(self, real):
        """The prompt if `real`, else the long prompt; whichever there is if one is missing."""
        return (self.prompt or self.long_prompt) if real else (self.long_prompt or self.prompt)


class BadRow(NamedTuple):
    """A row that cannot be trained on: where it stands, one of the reasons above, and what precisely."""

    where: str
    reason: str
    detail: str = ""

    def shown(self):
        """The row as it may be printed: what it tells comes from strangers."""
        return BadRow(one_line(self.where, 500), self.reason, one_line(self.detail, 300))


class RowError(Exception):
    """Why a row is bad: reason and detail; caught by the layouts' readers."""


def first_caption(texts, read):
    """The first text that is not empty of those beside an image, or "".

    Args:
        texts: dict from suffix, of CAPTION_SUFFIXES, to whatever `read` takes.
        read: function from that to at most LARGEST_TEXT bytes.
    """
    captions = (text_of(read(texts[suffix]), suffix) for suffix in CAPTION_SUFFIXES if suffix in texts)
    return next((caption for caption in captions if caption.strip()), "")


def side_car_values(data):
    """Dict that the bytes of a side-car tell. Raises MindSigmaError."""
    return load_json(SIDE_CAR, text_of(data, SIDE_CAR), "the text beside the image")


def captions_of(values):
    """(prompt, long prompt) from a dict of a row, stripped; RowError if both are empty."""
    prompt, long_prompt = (_first_text(values, names) for names in (PROMPT_NAMES, LONG_NAMES))
    if not prompt and not long_prompt:
        prompt = _first_text(values, TAG_NAMES)
    if not prompt and not long_prompt:
        raise RowError(NO_CAPTION, f"none of {', '.join(PROMPT_NAMES + LONG_NAMES)} holds a text")
    return prompt, long_prompt


def size_of(values):
    """(height, width) from a dict of a row, (0, 0) if it does not tell; RowError for sizes that cannot be."""
    sides = [values.get(name) for name in ("height", "width")]
    if any(side is None or side == "" for side in sides):
        return 0, 0
    result = []
    for side in sides:
        try:
            number = float(side)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(side, bool) or not 0 < number < 2**31 or number != int(number):
            raise RowError(BAD_SIZE, f"height {sides[0]!r}, width {sides[1]!r}")
        result.append(int(number))
    return tuple(result)


def image_path(values):
    """Path of the image as a row tells it; RowError if it tells none."""
    for name in IMAGE_NAMES:
        if values.get(name) not in (None, ""):
            if not isinstance(values[name], str) or "\0" in values[name]:
                raise RowError(BROKEN, f"{name} {values[name]!r} is no path")
            return values[name].strip()
    raise RowError(BROKEN, f"none of {', '.join(IMAGE_NAMES)} is given")


def below(root, path):
    """(path of the file, its name relative to root) of a row's path below the folder `root`, both texts.

    Links are not followed: a data set may be made of them. Raises RowError if the path leaves the folder.
    """
    root = os.path.abspath(root)
    full = os.path.normpath(os.path.join(root, path))
    if not full.startswith(root.rstrip(os.sep) + os.sep):
        raise RowError(OUTSIDE, f"{path} lies outside {root}")
    return full, os.path.relpath(full, root)


def text_of(data, what):
    """Bytes as text, UTF-8 with or without a byte order mark, or UTF-16 with one; MindSigmaError naming `what`."""
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise MindSigmaError(f"{what}: not UTF-8 text") from None


def _first_text(values, names):
    for name in names:
        value = values.get(name)
        if isinstance(value, list) and all(isinstance(part, str) for part in value) and name in TAG_NAMES:
            value = ", ".join(value)
        if isinstance(value, str) and value.strip():
            # JSON can hold halves of surrogate pairs, which no tokenizer takes.
            return value.strip().encode("utf-8", "replace").decode()
    return ""

"""What the page takes from those who use it: bounds of every number and text, and of pictures that are uploaded."""

import io
from dataclasses import dataclass

from PIL import Image

from mindsigma.data import images
from mindsigma.errors import MindSigmaError

LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Limits:
    """The bounds.

    Attributes:
        bytes: of an upload. pixels: of a picture, uploaded or drawn.
        steps, pictures: of one drawing. waiting: drawings in the queue, and each user's among them.
        characters: of a prompt.
    """

    bytes: int = 20 << 20
    pixels: int = 4096 * 4096
    steps: int = 100
    pictures: int = 8
    waiting: int = 16
    waiting_of_one: int = 2
    characters: int = 4000

    def text(self, name, value):
        """A text of bounded length."""
        value = "" if value is None else value
        if not isinstance(value, str) or len(value) > self.characters:
            raise MindSigmaError(f"{name}: at most {self.characters} characters")
        return value.replace("\0", "")

    def upload(self, data):
        """Bytes of an upload, of bounded size."""
        if not isinstance(data, bytes) or not data or len(data) > self.bytes:
            raise MindSigmaError(f"upload: give a file of at most {self.bytes >> 20} MB")
        return data

    def picture(self, value):
        """A new RGB PIL image of an uploaded one (bytes, or a PIL image that was decoded already)."""
        if isinstance(value, Image.Image):
            opened, decode = value, images.of_pil
            size = value.size
        else:
            opened, decode = io.BytesIO(self.upload(value)), images.decode
            size = images.read_size(opened)
            opened.seek(0)
        if size[0] * size[1] > self.pixels:
            raise MindSigmaError(f"upload: {size[0]} x {size[1]} pixels, more than the {self.pixels:,} that are taken")
        return decode(opened)

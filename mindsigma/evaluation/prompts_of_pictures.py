"""Which prompt belongs to a picture: one beside it as a text, or the one that it tells itself."""

from mindsigma.data.record import Record
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.drawing import texts_of_picture
from mindsigma.foreign import read_text

LARGEST_TEXT = 1 << 20  # bytes


def prompt_of(path):
    """The prompt of a picture's file (Path): of NAME.txt beside it, or of the PNG's metadata; "" of neither.

    Of a Record it is its short caption, else the long one.
    """
    if isinstance(path, Record):
        return path.caption(True)
    beside = path.with_suffix(".txt")
    if beside.is_file():
        try:
            return read_text(beside, LARGEST_TEXT).strip()
        except MindSigmaError:
            return ""
    return texts_of_picture(path).get("prompt", "")

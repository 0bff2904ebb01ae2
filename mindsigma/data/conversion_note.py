"""The note in a folder that a data set is written to: what it is made of, and whether it is complete."""

import os

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json, read_bytes

STATE = ".prepare.json"  # the note's name
LARGEST_NOTE = 1 << 16  # bytes


def read_note(folder):
    """The note of a folder (Path), a dict of any content. Raises MindSigmaError."""
    return load_json(folder / STATE, read_bytes(folder / STATE, LARGEST_NOTE), "the note of a conversion")


def is_complete(folder):
    """Whether a folder (Path) is no unfinished conversion: its note says so, or there is none."""
    if not os.path.lexists(folder / STATE):
        return True
    try:
        return read_note(folder).get("complete") is True
    except MindSigmaError:
        return False

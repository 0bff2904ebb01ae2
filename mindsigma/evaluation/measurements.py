"""What was measured on each picture, kept as it is found, so that a stopped run measures nothing twice.

A line of a JSON-lines file is one measurement: the picture (name, checksum of its bytes), what was measured by what (a
text such as an engine with its settings), the value. Each process appends to a file of its own.
"""

import hashlib
import json
from pathlib import Path

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json, open_regular, read_bytes
from mindsigma.weights.formats.atomic import naming

LONGEST_LINE = 1 << 21  # bytes
LARGEST_PICTURE = 1 << 30  # bytes


class Measurements:
    """The measurements in a folder.

    Args:
        folder: Path.
        rank: number of this process.
    """

    def __init__(self, folder, rank=0):
        self.folder, self.rank, self._known, self._file = Path(folder), rank, {}, None

    def read(self):
        """Read what all processes have written by now."""
        for path in sorted(self.folder.glob("measured-*.jsonl")):
            with open_regular(path) as file:
                while (line := file.readline(LONGEST_LINE)).endswith(b"\n"):  # a kill may have cut off the last one
                    try:
                        entry = load_json(path, line, "a line")
                        key = entry["picture"], entry["checksum"], entry["what"]
                    except (MindSigmaError, KeyError):
                        continue
                    if all(isinstance(part, str) for part in key):
                        self._known[key] = entry.get("value")

    def get(self, picture, checksum, what):
        """The value, or None where it was not measured."""
        return self._known.get((picture, checksum, what))

    def add(self, picture, checksum, what, value):
        """Keep a value: of JSON."""
        path = self.folder / f"measured-{self.rank}.jsonl"
        entry = {"picture": picture, "checksum": checksum, "what": what, "value": value}
        with naming(path):
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "ab")
                if self._file.tell():
                    self._file.write(b"\n")  # ends what a kill cut off; an empty line is passed over
            self._file.write(json.dumps(entry).encode() + b"\n")
            self._file.flush()
        self._known[picture, checksum, what] = value

    def close(self):
        """Close this process's file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def checksum(path):
    """Checksum of a file's bytes, a text of 32 characters. Raises MindSigmaError."""
    return hashlib.blake2b(read_bytes(path, LARGEST_PICTURE), digest_size=16).hexdigest()


def label(about):
    """A short text that stands for a dict, such as what an engine is; equal for equal ones."""
    return json.dumps(about, sort_keys=True)

"""The note in a folder that a data set is written to, what it is made of and whether it is complete; its writing."""

import io
import os
import threading

from mindsigma.data.own_folder import is_free, is_own_file
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json, open_regular, read_bytes
from mindsigma.weights.formats.atomic import naming, replacing, write_json

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


class NotedFolder:
    """Puts files below `target`; the note there says "complete" only while every file is what the task makes.

    Args:
        target: Path of the folder, for which `require_own` holds and which nobody else writes to.
        task: dict for the note, of JSON values: all that the files follow from.
    """

    def __init__(self, target, task):
        self.target, self.task = target, task
        self._lock, self._marked = threading.Lock(), False
        if not is_own_file(target / STATE):
            self._mark()

    def put(self, name, write):
        """Let write(file) make the file `name` unless it already is what that makes."""
        path = self.target / name
        if is_own_file(path) and _makes(path, write):
            return
        self._mark()
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            write(file)

    def complete(self):
        """Every file is there."""
        if self._marked or not is_complete(self.target):
            write_json(self.target / STATE, {**self.task, "complete": True})

    def _mark(self):
        with self._lock:
            if not self._marked:
                write_json(self.target / STATE, {**self.task, "complete": False})
                self._marked = True


class _Differs(Exception):
    pass


class _Comparison(io.RawIOBase):
    """A file to write to that raises _Differs unless what is written are the bytes of another."""

    def __init__(self, file):
        super().__init__()
        self._file = file

    def writable(self):
        return True

    def tell(self):
        return self._file.tell()

    def write(self, data):
        if self._file.read(len(data)) != data:
            raise _Differs
        return len(data)


def _makes(path, write):
    """Whether write(file) makes just the bytes of the file `path`."""
    with open_regular(path) as file:
        try:
            write(_Comparison(file))
        except _Differs:
            return False
        return not file.read(1)


def require_own(target, task):
    """Raise MindSigmaError unless the folder is free or holds what an earlier run of this task wrote."""
    if is_own_file(target / STATE):
        try:
            stored = read_note(target)
        except MindSigmaError:
            stored = {}
        if any(stored.get(name) != value for name, value in task.items()):
            raise MindSigmaError(
                f"{target}: holds another conversion, or one of other captions, sizes, order or options; choose "
                "another folder, or delete this one"
            )
    elif not is_free(target, STATE):
        raise MindSigmaError(f"{target}: is not an empty folder; choose another target")

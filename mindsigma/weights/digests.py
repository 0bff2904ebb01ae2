"""SHA-256 of weight files, so that a picture can tell what drew it; those of large files are remembered."""

import contextlib
import hashlib
import json
import os
import threading
from pathlib import Path

from mindsigma.backends.compiled import Unavailable, trusted_folder
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json, open_regular, read_bytes, understanding
from mindsigma.weights.formats.atomic import write_json
from mindsigma.weights.formats.weight_files import find_weights, read_index

PIECE = 8 << 20  # bytes read at once
REMEMBERED = 256 << 20  # bytes from which on a file's digest is remembered
MOST = 1000  # digests that are remembered
NAME = "digests.json"
ADAPTERS = ("adapter_model.safetensors", "adapter.safetensors", "pytorch_lora_weights.safetensors")


def digest_of(path):
    """SHA-256, 64 hexadecimal digits, of a weight file or of a folder's; of shards that of the list of theirs.

    Raises MindSigmaError.
    """
    path = Path(path)
    adapter = next((path / name for name in ADAPTERS if (path / name).is_file()), None)
    file = adapter or find_weights(path).file
    if not file.name.endswith(".json"):
        return _of_file(file)
    shards = sorted(set(read_index(file).values()))
    text = "".join(f"{name} {_of_file(file.parent / name)}\n" for name in shards)
    return hashlib.sha256(text.encode()).hexdigest()


def _of_file(path):
    with open_regular(path) as file, understanding(path):
        status = os.fstat(file.fileno())
        key = [str(Path(path).resolve()), status.st_size, status.st_mtime_ns]
        known = _remembered() if status.st_size >= REMEMBERED else {}
        if known.get(key[0], [])[:2] == key[1:]:
            return known[key[0]][2]
        result = hashlib.sha256()
        while piece := file.read(PIECE):
            result.update(piece)
    if status.st_size >= REMEMBERED:
        _remember(key, result.hexdigest())
    return result.hexdigest()


def _remembered():
    with contextlib.suppress(MindSigmaError, Unavailable, OSError):
        file = trusted_folder() / NAME
        if file.is_file():
            table = load_json(file, read_bytes(file, 1 << 20), "the list of digests")
            return {name: entry for name, entry in table.items() if isinstance(entry, list) and len(entry) == 3}
    return {}


def _remember(key, digest):
    with contextlib.suppress(MindSigmaError, Unavailable, OSError):
        table = {**_remembered(), key[0]: [*key[1:], digest]}
        write_json(trusted_folder() / NAME, json.loads(json.dumps(dict(list(table.items())[-MOST:]))))


class Digests:
    """The digests of several paths, computed in a thread from now on, while other things are done.

    Args:
        paths: dict name -> path.
    """

    def __init__(self, paths):
        self._paths, self._found = dict(paths), {}
        self._thread = threading.Thread(target=self._run, daemon=True)  # whoever ends before does not wait for it
        self._thread.start()

    def _run(self):
        for name, path in self._paths.items():
            with contextlib.suppress(MindSigmaError, OSError):  # moved away since it was opened
                self._found[name] = digest_of(path)

    def result(self):
        """dict name -> digest, without what could not be read; waits for what is not ready."""
        self._thread.join()
        return dict(self._found)

"""The files of a checkpoint with their sizes and SHA-256, by which damage is told before anything is read from them."""

import hashlib
import json
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular, understanding

PIECE = 4 << 20  # bytes hashed at once
THREADS = 4  # files hashed at once; hashing leaves the interpreter to others
MOST_FILES = 100_000
HEX = re.compile("[0-9a-f]{64}")


def digest_of(path):
    """SHA-256 of a regular file, in hexadecimal digits. Raises MindSigmaError."""
    result = hashlib.sha256()
    with open_regular(path) as file, understanding(path):
        while piece := file.read(PIECE):
            result.update(piece)
    return result.hexdigest()


def files_of(folder):
    """Sorted paths, relative and with slashes, of all below a folder that is no folder; links are not followed.

    Raises MindSigmaError where there is no end of them.
    """
    found = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [(Path(root) / name).relative_to(folder).as_posix() for name in names + links]
        if len(found) > MOST_FILES:
            raise MindSigmaError(f"{folder}: holds more than {MOST_FILES} files; this is no checkpoint of a run")
    return sorted(found)


def manifest_of(folder):
    """dict path -> [bytes, SHA-256] of all files below a folder."""
    paths = files_of(folder)
    with ThreadPoolExecutor(THREADS) as threads:
        digests = list(threads.map(lambda path: digest_of(folder / path), paths))
    return {path: [os.stat(folder / path).st_size, digest] for path, digest in zip(paths, digests)}


def check_files(folder, manifest, besides):
    """Raise MindSigmaError, naming the file, unless a folder holds exactly the files of its manifest, whole.

    Args:
        folder: Path.
        manifest: of `manifest_of`, from a file.
        besides: path of the file that holds the manifest.
    """
    there = files_of(folder)
    for path in sorted(set(manifest) - set(there)):
        raise MindSigmaError(f"{folder / path}: is missing")
    for path in sorted(set(there) - set(manifest) - {besides}):
        raise MindSigmaError(f"{folder / path}: is no part of this checkpoint; move it away")
    for path, (size, _) in manifest.items():
        with understanding(folder / path):  # a link that leads nowhere
            status = os.stat(folder / path)
        if not stat.S_ISREG(status.st_mode):
            raise MindSigmaError(f"{folder / path}: not a regular file")
        if status.st_size != size:
            raise MindSigmaError(f"{folder / path}: has {status.st_size} bytes, was written with {size}")
    with ThreadPoolExecutor(THREADS) as threads:
        digests = threads.map(lambda path: digest_of(folder / path), manifest)
        for path, digest in zip(manifest, digests):
            if digest != manifest[path][1]:
                raise MindSigmaError(f"{folder / path}: is damaged, or of another checkpoint: its SHA-256 does not fit")


def is_manifest(value):
    """Whether what a file gives as a manifest is one."""
    return isinstance(value, dict) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and type(entry[0]) is int
        and isinstance(entry[1], str)
        and HEX.fullmatch(entry[1])
        and path
        and all(part not in ("", ".", "..") for part in path.split("/"))
        and "\0" not in path
        for path, entry in value.items()
    )


def sealed(document):
    """A JSON object with the SHA-256 of what it says, under "sha256"."""
    return {**document, "sha256": _seal(document)}


def check_seal(path, document):
    """Raise MindSigmaError unless the document `path` says what it was sealed with; one without a seal passes."""
    seal = document.get("sha256")
    if seal is not None and seal != _seal({key: value for key, value in document.items() if key != "sha256"}):
        raise MindSigmaError(f"{path}: is damaged: its SHA-256 {one_line(seal, 70)} does not fit")


def _seal(document):
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()

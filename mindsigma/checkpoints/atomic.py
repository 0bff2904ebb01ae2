"""Writing a file whole or not at all: under a hidden name beside the target, renamed when it is complete."""

import contextlib
import errno
import json
import os
import re
import time

from mindsigma.errors import MindSigmaError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IDLE_SECONDS = 600  # a partial file untouched for so long, whose process is gone, is the leftover of a kill


@contextlib.contextmanager
def replacing(path):
    """A binary file, seekable, that takes the place of `path` (Path) when the block ends well.

    Until then it is `.{name}.{pid}.part` in the same folder; whatever ends the block early removes it and leaves
    `path` as it was. Raises MindSigmaError, of one line naming `path`, for an OSError in the block: a full disk, no
    permission, no such folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _remove_leftovers(path)
        partial.unlink(missing_ok=True)
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_json(path, value):
    """Write a JSON document; the folder is made if it is absent. Raises as `replacing` does."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def copy_file(source, path):
    """Copy a small file; the folder is made if it is absent. Raises as `replacing` does."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(source.read_bytes())


@contextlib.contextmanager
def naming(path):
    """Turn an OSError of the block into a MindSigmaError of one line that names the target `path`."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in NO_SPACE else "check the folder and its permissions"
        raise MindSigmaError(
            f"{path}: cannot be written ({error.strerror or 'input/output error'}); {remedy}, or choose another target"
        ) from error


def _remove_leftovers(path):
    """Partial files of the same target that a killed process left behind."""
    name = re.compile(re.escape(f".{path.name}.") + r"([1-9]\d{0,8})\.part")
    with contextlib.suppress(OSError):
        for entry in path.parent.iterdir():
            match = name.fullmatch(entry.name)
            if match and not _running(int(match[1])) and time.time() - entry.lstat().st_mtime > IDLE_SECONDS:
                entry.unlink()


def _running(pid):
    if os.name == "nt":  # os.kill would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

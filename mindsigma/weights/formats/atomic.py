"""Writing a file whole or not at all: under a hidden name beside the target, renamed when it is complete."""

import contextlib
import errno
import fcntl
import json
import os
import re
import time

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import read_bytes

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IDLE_SECONDS = 600  # where files cannot be locked: a partial file untouched for so long is the leftover of a kill
LEFTOVER = re.compile(r"\.(.+)\.([1-9]\d{0,8})\.part", re.DOTALL)  # name of the target, process


class Taken(Exception):
    """There is a file of that name by now."""


@contextlib.contextmanager
def replacing(path, new=False):
    """A binary file, seekable, that takes the place of `path` (Path) when the block ends well.

    `new`: nothing is replaced; Taken is raised if there is something of that name at the end.

    Until then it is `.{name}.{pid}.part` in the same folder; whatever ends the block early removes it and leaves
    `path` as it was. Raises MindSigmaError, of one line naming `path`, for an OSError in the block: a full disk, no
    permission, no such folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():  # as root it would take the place of /dev/null
            raise MindSigmaError(f"{path}: is no regular file; remove it, or choose another target")
        remove_leftovers(path.parent, path.name)
        partial.unlink(missing_ok=True)
        try:
            with open(partial, "xb") as file:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield file
                file.flush()
                os.fsync(file.fileno())
            if new:
                _put_new(partial, path)
            else:
                os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def _put_new(partial, path):
    """Give a partial file its name, unless something has it: Taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise Taken(path) from None
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise Taken(path) from None
        os.replace(partial, path)
    else:
        partial.unlink()


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
        file.write(read_bytes(source))


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


def sync_entries(folder):
    """Bring the entries of a folder to the disk, so that what was renamed in it stays so after a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder, name=None):
    """Remove the partial files that killed processes left in a folder (Path): of the target `name`, or of all.

    One that a living process writes is locked, or else its process is seen to run, and stays.
    """
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            match = LEFTOVER.fullmatch(entry.name)
            ours = match and name in (None, match[1])
            if ours and entry.is_file(follow_symlinks=False) and not _running(int(match[2])) and _abandoned(entry):
                os.unlink(entry.path)


def _abandoned(entry):
    """Whether nobody holds the lock of a partial file; without locks, whether nobody has touched it for long."""
    with open(entry.path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - entry.stat(follow_symlinks=False).st_mtime > IDLE_SECONDS
    return True


def _running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True

"""A folder that a tool fills: held while it is written, leftovers of kills removed, obstructions told first."""

import contextlib
import fcntl
import os
import re
import stat
from pathlib import Path

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.atomic import naming

LEFTOVER = re.compile(r"\.(.+)\.[1-9]\d{0,8}\.part", re.DOTALL)  # the name that atomic.replacing writes under


class Held:
    """A folder, made if absent, that is held until `close` or the end of the process, however it ends.

    Whoever comes first, while nobody else holds the folder, removes what killed processes left unfinished in it.
    Folders that links lead to are left alone. On a file system without locks nothing is held, and leftovers stay until
    `atomic.replacing` finds them old.

    Args:
        path: Path of the folder.
        shared: whether others may hold it at the same time, all sharing.

    Raises:
        MindSigmaError: another process holds it and does not share.
    """

    def __init__(self, path, shared=False):
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_leftovers(path)
            if shared:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        except BlockingIOError:
            if not shared:
                self.close()
                raise MindSigmaError(
                    f"{path}: another process is writing there; wait for it, or choose another folder"
                ) from None
            fcntl.flock(self._descriptor, fcntl.LOCK_SH)  # waits for who comes first
        except OSError:  # a file system without locks
            pass

    def close(self):
        """Let go of the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def is_free(path, note):
    """Whether a folder is absent, or empty but for what a kill left of the first writing of its file `note`."""
    if not os.path.lexists(path):
        return True
    if not path.is_dir():
        return False
    with naming(path):
        matches = [LEFTOVER.fullmatch(name) for name in os.listdir(path)]
    return all(match and match[1] == note for match in matches)


def check_places(root, names):
    """Raise MindSigmaError unless a file can be put at each of `names`, relative texts, below the folder `root` (Path).

    In its way are a folder of its name, and a file or a link where a folder has to be: no link leads out of `root`.
    A link in the place of the file is none: it is replaced, and what it leads to is not touched.
    """
    seen = set()
    for name in names:
        folders = [str(parent) for parent in Path(name).parents][:-1]  # the last is "."
        for place, is_file in [(name, True), *((folder, False) for folder in folders if folder not in seen)]:
            kind = _kind(root / place)
            if kind is not None and (kind == stat.S_IFDIR) == is_file:
                what = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}.get(kind, "no folder")
                raise MindSigmaError(f"{root / place}: {what} is in the way; move it away, or choose another target")
        seen.update(folders)


def is_own_file(path):
    """Whether `path` (Path) is a regular file and no link to one."""
    return _kind(path) == stat.S_IFREG


def _kind(path):
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except OSError:  # absent, or its folder is; writing tells whatever else it may be
        return None


def _remove_leftovers(root):
    for folder, _, names in os.walk(root):  # which follows no link
        for name in names:
            if LEFTOVER.fullmatch(name):
                with contextlib.suppress(OSError):  # the next run's
                    os.unlink(os.path.join(folder, name))

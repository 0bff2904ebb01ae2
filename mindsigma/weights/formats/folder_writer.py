"""Writing a folder of several files whole or not at all: into a hidden folder in it, exchanged when it is complete."""

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path, PurePosixPath

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.atomic import LEFTOVER, naming, remove_leftovers, replacing
from mindsigma.weights.formats.exchange import ASIDE, alone_in, check_file, check_own_folder, exchange, planned, recover
from mindsigma.weights.formats.safetensors_shards import older_weights

STAGING, MARKER = ".converting.new", ".converting"
LONGEST_MARKER = 2**10  # bytes
OURS = (STAGING, MARKER, ASIDE)


@contextlib.contextmanager
def replacing_files(root, identity=None, leaving=()):
    """A folder (Path) to write files into that take their places in `root` (Path) when the block ends well.

    They replace files of the same names, and weights replace all that belongs to weights of the same stem (shards,
    index). Nothing else in `root` is touched, no link in it is followed. Whatever ends the block early leaves `root` as
    it was; a kill while the files move in leaves a plan, by which the next call puts the old ones back.

    Args:
        root: is made if it is absent.
        identity: text that is equal for the same files only; what a kill or an interrupt left of the same is there
            again in the next block. None: nothing is kept.
        leaving: places of further files that go.

    Raises:
        MindSigmaError: of one line naming what cannot be replaced or written, or an OSError of the block; or another
            process is writing to `root`.
    """
    root = Path(root)
    place = root / STAGING
    with naming(root):
        made = [folder for folder in [*reversed(root.parents), root] if not folder.exists()]
        root.mkdir(parents=True, exist_ok=True)
    try:
        with alone_in(root):
            recover(root)
            remove_leftovers(root)
            resumed = False
            try:
                with naming(root):
                    resumed = _begin(place, identity)
                    yield place
                    exchange(root, *_moves(root, place, leaving))
            except BaseException as error:
                kept = resumed or (identity is not None and not isinstance(error, Exception))
                # Where the old files could not be put back, a later run needs the new ones to do it.
                if not kept and not os.path.lexists(root / ASIDE):
                    shutil.rmtree(place, ignore_errors=True)
                raise
            shutil.rmtree(place, ignore_errors=True)
            with contextlib.suppress(OSError):
                (root / MARKER).unlink()
    except BaseException:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # somebody else's file has come
                folder.rmdir()
        raise


def check_folder_target(root, overwrite):
    """Raise where files cannot be put into the folder `root` (Path), absent or not, or where it is not empty.

    `overwrite`: what is there may be replaced.
    """
    if root.is_symlink() and not root.exists():
        raise MindSigmaError(f"{root}: a link that leads nowhere; remove it, or give another target")
    with naming(root):
        there = next(folder for folder in (root, *root.absolute().parents) if os.path.lexists(folder))
        _check_home(there)
        check_own_folder(root / STAGING)
        check_own_folder(root / ASIDE)
        planned(root)
        if there == root and not overwrite and not is_empty(root):
            raise MindSigmaError(f"{root}: is not empty; give another target, or --overwrite")


def check_file_target(path, overwrite):
    """Raise where a file cannot be put at `path` (Path), or where there is one; `overwrite`: it may be replaced."""
    if os.path.lexists(path) and not overwrite:
        raise MindSigmaError(f"{path}: exists; give another target, or --overwrite")
    with naming(path):
        _check_home(path.parent)
    check_file(path)


def _check_home(folder):
    """Raise OSError unless `folder` is one that can be written to."""
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def is_empty(folder):
    """Whether nothing is in a folder (Path), or below it, but what a kill of `replacing_files` left."""
    moves, made = planned(folder)
    if any(target.parts[0] == ASIDE for _, target in moves):
        return False
    ours = {*map(str, made), *(str(target) for _, target in moves), *OURS}
    entries = list(folder.iterdir())
    while entries:
        entry = entries.pop()
        name = entry.relative_to(folder).as_posix()
        if name in map(str, made):
            entries += entry.iterdir()
        elif name not in ours and not LEFTOVER.fullmatch(entry.name):
            return False
    return True


def _begin(place, identity):
    """Make the staging folder, empty unless it is left from the same work; returns whether it is."""
    marker = place / MARKER
    check_own_folder(place)
    readable = marker.is_file() and not marker.is_symlink() and marker.stat().st_size < LONGEST_MARKER
    if identity is not None and readable and marker.read_bytes() == identity.encode():
        return True
    if place.exists():
        shutil.rmtree(place)
    place.mkdir()
    with replacing(marker) as file:
        file.write((identity or "").encode())
    return False


def _moves(root, place, leaving):
    """Arguments of `exchange` for all files in the staging folder `place`."""
    files = sorted(file.relative_to(place) for file in place.rglob("*") if file.is_file())
    files = [file for file in files if file.name != MARKER and not LEFTOVER.fullmatch(file.name)]
    arriving = {file: PurePosixPath(STAGING) / file for file in files}
    going = list(map(PurePosixPath, leaving))
    for folder in {file.parent for file in arriving}:
        names = {file.name for file in arriving if file.parent == folder}
        going += [folder / name for name in older_weights(root / folder, names)]
    return arriving, going

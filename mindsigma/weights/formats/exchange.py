"""Several files of a folder replaced together: in the end all of the new ones stand there, or all of the old ones.

The old files are moved aside into a hidden folder, then the new ones move in, each by one rename within the folder. A
plan of all moves is on the disk before the first of them: an error plays it backwards, and after a kill `recover` does.
Until all is done no mixture can be read: old weights go before new ones come, and what is read first goes first and
comes last.
"""

import contextlib
import fcntl
import os
import shutil
import stat
from pathlib import Path, PurePosixPath

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes, understanding
from mindsigma.weights.formats.atomic import naming, sync_entries, write_json

ASIDE, PLAN = ".replaced", "plan.json"
READ_FIRST = (".safetensors.index.json", ".safetensors")
OTHER_TARGET = "or choose another target"


def exchange(root, arriving, leaving=()):
    """Move files into a folder and others out of it, all or none.

    Args:
        root: Path of the folder.
        arriving: dict place -> where the new file waits, both relative to `root`. What stands at a place is replaced.
        leaving: places of files that go without another in their stead.

    Raises:
        MindSigmaError: a file cannot be put at one of the places (see `check_places`), or a rename failed. All the old
            files are then where they were and the new ones wait where they waited.
    """
    root = Path(root)
    arriving = {PurePosixPath(place): PurePosixPath(waiting) for place, waiting in arriving.items()}
    going = dict.fromkeys([*map(PurePosixPath, leaving), *arriving])
    check_places(root, going)
    going = sorted((place for place in going if os.path.lexists(root / place)), key=_reading_order)
    coming = sorted(arriving, key=_reading_order, reverse=True)
    moves = [(place, ASIDE / place) for place in going] + [(arriving[place], place) for place in coming]
    parents = dict.fromkeys(parent for place in coming for parent in reversed(place.parents))
    made = [parent for parent in parents if not os.path.lexists(root / parent)]
    with naming(root):
        (root / ASIDE).mkdir()
        plan = {"made": list(map(str, made)), "moves": [[str(one), str(two)] for one, two in moves]}
        try:
            write_json(root / ASIDE / PLAN, plan)
            sync_entries(root)
            for source, target in moves:
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                os.replace(root / source, root / target)
            for folder in {(root / place).parent for place in going + coming}:
                sync_entries(folder)
            (root / ASIDE / PLAN).unlink()
        except BaseException:
            _undo(root, moves, made)
            raise
        shutil.rmtree(root / ASIDE, ignore_errors=True)


def recover(root):
    """Put back what an `exchange` in the folder `root` (Path), ended by a kill, had moved; else do nothing.

    Raises MindSigmaError where that is not possible.
    """
    aside = root / ASIDE
    check_own_folder(aside)
    if not aside.exists():
        return
    moves, made = planned(root)
    with naming(root):
        _undo(root, moves, made)


def planned(root):
    """(moves, folders made) of an `exchange` that a kill ended in the folder `root` (Path), empty where there is none.

    A move is a pair of relative paths, from and to; old files go to ASIDE. Raises MindSigmaError.
    """
    plan = root / ASIDE / PLAN
    if not os.path.lexists(plan):
        return [], []
    with understanding(plan, "move the files beside it back by hand"):
        table = load_json(plan, read_bytes(plan), "the plan of a conversion")
        moves = [(_inside(root, one), _inside(root, two)) for one, two in table["moves"]]
        return moves, [_inside(root, folder) for folder in table["made"]]


def check_own_folder(path):
    """Raise MindSigmaError unless at `path` (Path) is a folder that was made here, or nothing."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise MindSigmaError(f"{path}: is no folder of a conversion; remove it, {OTHER_TARGET}")


def check_places(root, places):
    """Raise MindSigmaError where a file cannot be moved to one of `places`, relative to the folder `root`.

    On the way there may only be folders, on the device of `root`, that can be written to; no link is followed. At the
    place itself may be nothing, a file or a link, which is then replaced itself.
    """
    seen = set()
    _check_folder(root, os.stat(root))
    device = os.stat(root).st_dev
    for place in map(PurePosixPath, places):
        for folder in list(place.parents)[-2::-1]:
            if folder in seen:
                continue
            seen.add(folder)
            where = root / folder
            try:
                found = os.lstat(where)
            except FileNotFoundError:
                break
            except OSError as error:
                raise MindSigmaError(f"{where}: cannot be looked at ({error.strerror}); {OTHER_TARGET[3:]}") from None
            if stat.S_ISLNK(found.st_mode):
                raise MindSigmaError(
                    f"{where}: a link, and what it leads to lies outside of the target; remove it, {OTHER_TARGET}"
                )
            _check_folder(where, found)
            if found.st_dev != device:
                raise MindSigmaError(
                    f"{where}: lies on another device than {root}, so that nothing can be moved in; "
                    f"give it as the target by itself, {OTHER_TARGET}"
                )
        check_file(root / place)


def check_file(path):
    """Raise MindSigmaError unless at `path` stands nothing, a file, or a link, which is to be replaced itself."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = os.lstat(path).st_mode
        if stat.S_ISDIR(mode):
            raise MindSigmaError(
                f"{path}: is a folder where a file is to be written (Is a directory); move it away, {OTHER_TARGET}"
            )
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise MindSigmaError(f"{path}: is no regular file; move it away, {OTHER_TARGET}")


@contextlib.contextmanager
def alone_in(folder):
    """Keep other processes that ask for the same out of a folder; raises MindSigmaError where one is in it."""
    with naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MindSigmaError(f"{folder}: another process is writing there; wait for it, {OTHER_TARGET}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _reading_order(place):
    return next((i for i, suffix in enumerate(READ_FIRST) if place.name.endswith(suffix)), len(READ_FIRST)), str(place)


def _check_folder(path, found):
    if not stat.S_ISDIR(found.st_mode):
        raise MindSigmaError(f"{path}: is not a folder (Not a directory); move it away, {OTHER_TARGET}")
    if not os.access(path, os.W_OK | os.X_OK):
        raise MindSigmaError(
            f"{path}: cannot be written (Permission denied); check the folder and its permissions, {OTHER_TARGET}"
        )


def _undo(root, moves, made):
    """Play backwards the moves that were done. Raises MindSigmaError where that fails; `recover` then tries again."""
    try:
        for source, target in reversed(moves):
            if os.path.lexists(root / target) and not os.path.lexists(root / source):
                (root / source).parent.mkdir(parents=True, exist_ok=True)
                os.replace(root / target, root / source)
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # absent, or not empty any more
                (root / folder).rmdir()
        (root / ASIDE / PLAN).unlink(missing_ok=True)
    except OSError as error:
        raise MindSigmaError(
            f"{root}: the old files could not be put back ({error.strerror or error}); they are in {root / ASIDE}: "
            "mend the cause, then run the same command again, which puts them back first"
        ) from error
    shutil.rmtree(root / ASIDE, ignore_errors=True)


def _inside(root, text):
    """A relative path of a plan, which must stay within `root` and lead through no link."""
    place = PurePosixPath(text)
    plain = place.parts and not place.is_absolute() and ".." not in place.parts
    if not plain or any((root / parent).is_symlink() for parent in place.parents[:-1]):
        raise ValueError(f"it moves {one_line(text)}")
    return place

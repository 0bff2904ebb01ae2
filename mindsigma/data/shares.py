"""Work in numbered shares that any number of processes take one after another, each share by one of them at a time."""

import contextlib
import fcntl
import os

from mindsigma.weights.formats.atomic import naming


@contextlib.contextmanager
def claim(folder, name):
    """Whether this process has the share `name` of the work in a folder (Path) while the block lasts.

    A lock on a file there says so. It ends with the process, however that ends. On a file system without locks
    everybody has every share: work is done twice, and comes to the same.
    """
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        mine = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mine = False
        except OSError:
            pass
        yield mine
    finally:
        os.close(descriptor)


def from_share(count, rank, ranks):
    """The numbers of `count` shares in the order of a process: its own equal part first, then those of the others.

    Processes that come to the others' parts help where somebody is slow or has died.
    """
    first = rank * count // ranks
    return [*range(first, count), *range(first)]

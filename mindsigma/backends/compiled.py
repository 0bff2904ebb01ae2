"""What is compiled here at first use: the compiler, the processor that it compiles for, and a cache folder to trust.

A compiled library runs with all rights of this user, so nothing is taken from a folder that another one can write to.
"""

import atexit
import contextlib
import fcntl
import functools
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindsigma.errors import MindSigmaError, say

CACHE = "MINDSIGMA_CACHE"  # folder of what is compiled, by default ~/.cache/mindsigma
SECONDS = 300  # a compilation takes about ten
LOCK = ".native.lock"


class Unavailable(MindSigmaError):
    """Nothing can be compiled; the message says why, in one line."""


def compiler_version():
    """The C++ compiler's command, CXX or g++, and what it says of its version, as bytes. Raises Unavailable."""
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        raise Unavailable(f"no C++ compiler: {compiler} does not run") from None
    return compiler, version


def trusted_folder():
    """The cache folder; one for this process alone, with a line on stderr, where others can write to it.

    Raises:
        Unavailable: if it cannot be made.
    """
    named, folder = os.environ.get(CACHE), None
    try:
        folder = Path(named or Path.home() / ".cache" / "mindsigma").resolve()
        reason = _prepare(folder, mend=not named)
        if reason:
            say(
                f"note: the kernels are compiled for this process alone: {reason}; {CACHE} names a folder",
                to=sys.stderr,
            )
            folder = _private_folder()
    except (OSError, RuntimeError, ValueError) as error:  # no home, a loop of links
        fault = getattr(error, "strerror", None) or error
        raise Unavailable(f"{folder}: {fault}; {CACHE} names another folder") from None
    return folder


def _prepare(folder, mend):
    """Make the folder. Returns why nothing may be taken from it or kept there; empty if all is well.

    `mend`: take others' right to write away, which a lax umask once gave them, if the folder is ours.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir(mode=0o700)
    status = folder.stat()
    if mend and status.st_uid == os.getuid() and others_write(status):
        folder.chmod(status.st_mode & 0o755)
    for place in (folder, *folder.parents):
        status = place.stat()
        # In a folder with the sticky bit, as /tmp, nobody can put another file in the place of ours. Above the folder a
        # group may write: many systems give everybody one of their own.
        open_to = 0o022 if place == folder else 0o002
        if status.st_mode & open_to and not status.st_mode & stat.S_ISVTX:
            return f"other users can write to {place}"
        if place == folder and status.st_uid not in (os.getuid(), 0):
            return f"{place} belongs to another user"
    return ""


def others_write(status):
    return bool(status.st_mode & 0o022)


@functools.cache
def _private_folder():
    """A folder that only this user can enter, gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mindsigma-")).resolve()
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@contextlib.contextmanager
def locked(folder):
    """Hold the folder's lock; raises Unavailable if another process has it for longer than a compilation takes."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    lock, end = os.open(folder / LOCK, flags, 0o600), time.monotonic() + SECONDS
    try:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the file is closed
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Unavailable(
                        f"{folder / LOCK} is held by another process; {CACHE} names another folder"
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(lock)


def processor():
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    seen = dict.fromkeys(line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted)
    return "\n".join([platform.machine(), *seen]).encode()

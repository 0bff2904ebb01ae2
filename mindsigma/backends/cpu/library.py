"""The shared library of the C++ kernels: compiled on first use for this very processor, then kept in a cache folder."""

import atexit
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mindspore

from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.foreign import read_bytes

SWITCH = "MINDSIGMA_NATIVE"  # 0: do without
CACHE = "MINDSIGMA_CACHE"  # folder of the compiled library, by default ~/.cache/mindsigma
THREADS = "MINDSIGMA_THREADS"  # of the kernels at most, by default one a core; read when they first run
SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wl,-z,nodelete")
SECONDS = 300  # a compilation takes about ten
LARGEST = 64 << 20  # bytes of the library, which has less than one million
LOCK = ".native.lock"


class Unavailable(Exception):
    """There is no library; the message says why, in one line."""


@functools.cache
def library():
    """The library, compiled if need be, as a ctypes.CDLL; None with a line on stderr where that is impossible.

    None without a word where MINDSIGMA_NATIVE is 0.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        products = _products()
        loaded = ctypes.CDLL(str(build()))
        loaded.use_products(products)
        loaded.block_floats.restype = ctypes.c_long
        return loaded
    except (AttributeError, OSError, Unavailable) as reason:  # made on another system, whose C++ runtime is not here
        say(f"note: no native kernels, MindSpore's own are slower ({one_line(reason, 400)})", to=sys.stderr)
        return None


def _products():
    """oneDNN's product of matrices, from the library that MindSpore brings along. Raises Unavailable."""
    folder = Path(mindspore.__file__).parent / "lib"
    for path in sorted(folder.glob("libdnnl.so*")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(str(path)).dnnl_sgemm, ctypes.c_void_p)
    raise Unavailable(f"{folder} has no libdnnl.so with dnnl_sgemm")


def build():
    """Path of the library; compiles it unless the cache has it, whole and written by us. Raises Unavailable.

    The library runs with all rights of this user, so nothing is taken from a folder that another one can write to:
    there is then a private folder for this process alone.
    """
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        raise Unavailable(f"no C++ compiler: {compiler} does not run") from None
    sources = sorted(SOURCE.glob("*.cpp"))
    contents = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    key = hashlib.sha256(b"\0".join([*contents, version, _processor(), " ".join(FLAGS).encode()])).hexdigest()[:16]
    try:
        named = os.environ.get(CACHE)
        folder = Path(named or Path.home() / ".cache" / "mindsigma").resolve()
        reason = _prepare(folder, mend=not named)
        if reason:
            say(
                f"note: the kernels are compiled for this process alone: {reason}; {CACHE} names a folder",
                to=sys.stderr,
            )
            folder = _private_folder()
        target = folder / f"native-{key}.so"
        if not _usable(target):
            with _locked(folder):  # of two processes one compiles
                if not _usable(target):
                    _compile(compiler, sources, target)
    except (OSError, RuntimeError, ValueError) as error:  # no home, a loop of links
        fault = getattr(error, "strerror", None) or error
        raise Unavailable(f"{folder}: {fault}; {CACHE} names another folder") from None
    return target


def _prepare(folder, mend):
    """Make the folder. Returns why nothing may be taken from it or kept there; empty if all is well.

    `mend`: take others' right to write away, which a lax umask once gave them, if the folder is ours.
    """
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            folder.mkdir(mode=0o700)
    status = folder.stat()
    if mend and status.st_uid == os.getuid() and _others_write(status):
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


def _others_write(status):
    return bool(status.st_mode & 0o022)


@functools.cache
def _private_folder():
    """A folder that only this user can enter, gone when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="mindsigma-")).resolve()
    owner = os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


@contextlib.contextmanager
def _locked(folder):
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


def _checksum_file(path):
    return path.with_name(f"{path.name}.sha256")


def _usable(path):
    """Whether the library is there, whole, and nobody else could have put it there."""
    try:
        for file in (path, _checksum_file(path)):
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.getuid(), 0) or _others_write(status):
                return False
        expected = read_bytes(_checksum_file(path), 100).decode("ascii", "replace").strip()
        return hashlib.sha256(read_bytes(path, LARGEST)).hexdigest() == expected
    except (OSError, MindSigmaError):
        return False


def _compile(compiler, sources, target):
    """Compile into `target` and write its checksum; a kill leaves nothing that `_usable` takes. The lock is held."""
    for leftover in target.parent.glob(".native-*.part"):  # nobody else compiles here
        leftover.unlink(missing_ok=True)
    handle, partial = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
    os.close(handle)
    try:
        say("note: compiling the kernels for this processor, once", to=sys.stderr)
        command = [compiler, *FLAGS, "-o", partial, *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it gave no message"]
            raise Unavailable(f"{compiler} failed: {lines[0]}")
        os.chmod(partial, 0o755)
        digest = hashlib.sha256(read_bytes(partial, LARGEST)).hexdigest()
        _sync(partial)
        os.replace(partial, target)
        _write_whole(_checksum_file(target), digest + "\n")
        _sync(target.parent)
    except MindSigmaError as error:
        raise Unavailable(f"{compiler} made no library: {error}") from None
    except subprocess.SubprocessError:
        raise Unavailable(f"{compiler} did not end within {SECONDS} seconds") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _write_whole(path, text):
    """A small file, replaced whole; what stood there, a link or a pipe, is not followed."""
    handle, partial = tempfile.mkstemp(".part", ".native-", path.parent)
    with open(handle, "w", encoding="ascii") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.chmod(partial, 0o644)
    os.replace(partial, path)


def _sync(path):
    """Bring a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _processor():
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    seen = dict.fromkeys(line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted)
    return "\n".join([platform.machine(), *seen]).encode()

"""The shared library of the C++ kernels: compiled on first use for this very processor, then kept in a cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import mindspore

from mindsigma.backends.compiled import (
    CACHE,
    SECONDS,
    Unavailable,
    compiler_version,
    locked,
    others_write,
    processor,
    trusted_folder,
)
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.foreign import read_bytes

SWITCH = "MINDSIGMA_NATIVE"  # 0: do without
THREADS = "MINDSIGMA_THREADS"  # of the kernels at most, by default one a core; read when they first run
SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wl,-z,nodelete")
LARGEST = 64 << 20  # bytes of the library, which has less than one million


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
    compiler, version = compiler_version()
    sources = sorted(SOURCE.glob("*.cpp"))
    contents = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    key = hashlib.sha256(b"\0".join([*contents, version, processor(), " ".join(FLAGS).encode()])).hexdigest()[:16]
    target = trusted_folder() / f"native-{key}.so"
    try:
        if not _usable(target):
            with locked(target.parent):  # of two processes one compiles
                if not _usable(target):
                    _compile(compiler, sources, target)
    except OSError as error:
        raise Unavailable(f"{target.parent}: {error.strerror or error}; {CACHE} names another folder") from None
    return target


def _checksum_file(path):
    return path.with_name(f"{path.name}.sha256")


def _usable(path):
    """Whether the library is there, whole, and nobody else could have put it there."""
    try:
        for file in (path, _checksum_file(path)):
            status = file.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid not in (os.getuid(), 0) or others_write(status):
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
    except Unavailable:
        raise
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

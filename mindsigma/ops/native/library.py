"""The shared library of the C++ kernels: compiled on first use for this very processor, then kept in a cache folder."""

import fcntl
import functools
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

SWITCH = "MINDSIGMA_NATIVE"  # 0: do without
CACHE = "MINDSIGMA_CACHE"  # folder of the compiled library, by default ~/.cache/mindsigma
THREADS = "MINDSIGMA_THREADS"  # of the kernels at most, by default one a core; read when they first run
# MINDSIGMA_AMX=0: no products on AMX tiles; read when they first run
WHITE_LIST = "MS_CUSTOM_AOT_WHITE_LIST"  # MindSpore loads no library from outside it
SOURCE = Path(__file__).parent / "source"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-pthread", "-Wl,-z,nodelete")
SECONDS = 300  # a compilation takes about ten


class Unavailable(Exception):
    """There is no library; the message says why, in one line."""


@functools.cache
def library():
    """Path of the library, compiled if need be; None with a line on stderr where that is impossible.

    None without a word where MINDSIGMA_NATIVE is 0.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return None
    try:
        return str(build())
    except Unavailable as reason:
        print(f"note: no native kernels, MindSpore's own are slower ({reason})", file=sys.stderr)
        return None


def build():
    """Path of the library; compiles it unless the cache has it. Raises Unavailable."""
    compiler = os.environ.get("CXX", "g++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        raise Unavailable(f"no C++ compiler: {compiler} does not run") from None
    sources = sorted(SOURCE.glob("*.cpp"))
    contents = [path.read_bytes() for path in sorted(SOURCE.iterdir())]
    key = hashlib.sha256(b"\0".join([*contents, version, _processor(), " ".join(FLAGS).encode()])).hexdigest()[:16]
    folder = Path(os.environ.get(CACHE) or Path.home() / ".cache" / "mindsigma").resolve()
    if ":" in str(folder):
        raise Unavailable(f"{folder}: MindSpore takes no colon in the path; {CACHE} names another folder")
    if os.path.realpath(os.environ.get(WHITE_LIST, "/")) not in str(folder):
        raise Unavailable(f"{folder} is not in {WHITE_LIST}; {CACHE} names another folder")
    target = folder / f"native-{key}.so"
    if _usable(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".native.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of two processes one compiles; released when the file is closed
            if not _usable(target):
                _compile(compiler, sources, target)
    except OSError as error:
        raise Unavailable(f"{folder}: {error.strerror}; {CACHE} names another folder") from None
    return target


def _usable(path):
    """Whether the library is there and nobody else could have put it there."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _compile(compiler, sources, target):
    handle, partial = tempfile.mkstemp(".part", f".{target.name}.", target.parent)
    os.close(handle)
    try:
        print("note: compiling the kernels for this processor, once", file=sys.stderr)
        command = [compiler, *FLAGS, "-o", partial, *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["it gave no message"]
            raise Unavailable(f"{compiler} failed: {lines[0]}")
        os.chmod(partial, 0o755)
        os.replace(partial, target)
    except subprocess.SubprocessError:
        raise Unavailable(f"{compiler} did not end within {SECONDS} seconds") from None
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def _processor():
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    wanted = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU part", "Features")
    seen = dict.fromkeys(line for line in lines if line.split("\t")[0].split(":")[0].strip() in wanted)
    return "\n".join([platform.machine(), *seen]).encode()

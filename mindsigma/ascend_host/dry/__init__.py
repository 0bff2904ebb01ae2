"""What a dry run loads first: a library that makes MindSpore's thread wait for reports, and another allocator."""

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

from mindsigma.ascend_host.build import wheel
from mindsigma.backends.compiled import SECONDS, compiler_version, locked, processor, trusted_folder
from mindsigma.errors import MindSigmaError, one_line

SOURCE = Path(__file__).parent / "report.cpp"
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC")
PRELOAD, SETTINGS = "LD_PRELOAD", "MALLOC_CONF"
LARGE_PAGES = "narenas:1,thp:always"  # one heap, in pages of 2 MiB


def preloading():
    """dict of the environment variables with which a process loads these before all others.

    The library is built unless the cache has it.

    Raises:
        MindSigmaError: without a C++ compiler.
    """
    ours = [str(_library()), *_allocator()]
    others = [name for name in os.environ.get(PRELOAD, "").split() if name not in ours]
    return {PRELOAD: " ".join([*ours, *others]), SETTINGS: os.environ.get(SETTINGS, LARGE_PAGES)}


def _allocator():
    """Path of jemalloc, which MindSpore's wheel brings along, as a list; empty if it has none, or for other pages.

    MindSpore's compiler asks for memory in small pieces, by the million.
    """
    jemalloc = wheel() / "lib" / "libjemalloc.so.2"
    return [str(jemalloc)] if jemalloc.is_file() and os.sysconf("SC_PAGE_SIZE") == 4096 else []


def _library():
    compiler, version = compiler_version()
    digest = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, processor(), " ".join(FLAGS).encode()]))
    folder = trusted_folder()
    target = folder / f"ascend-dry-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    with locked(folder):
        partial = folder / f".{target.name}.part"
        try:
            command = [compiler, *FLAGS, "-o", str(partial), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
            if done.returncode:
                raise MindSigmaError(f"{compiler} failed: {one_line(done.stderr or 'it gave no message', 300)}")
            os.replace(partial, target)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    return target

"""A library that a dry run loads first, so that MindSpore's thread that waits for reports does wait."""

import contextlib
import hashlib
import os
import subprocess
from pathlib import Path

from mindsigma.backends.compiled import SECONDS, compiler_version, locked, processor, trusted_folder
from mindsigma.errors import MindSigmaError, one_line

SOURCE = Path(__file__).parent / "report.cpp"
FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC")
PRELOAD = "LD_PRELOAD"


def preloading():
    """dict of the environment variable with which a process loads the library before all others.

    It is built unless the cache has it.

    Raises:
        MindSigmaError: without a C++ compiler.
    """
    ours = str(_library())
    return {PRELOAD: " ".join([ours, *(name for name in os.environ.get(PRELOAD, "").split() if name != ours)])}


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

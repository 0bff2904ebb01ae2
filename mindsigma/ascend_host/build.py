"""Builds the stand-in for CANN: libraries of CANN's names, in a folder laid out as CANN's, kept in the cache.

What MindSpore's wheel wants from CANN is read from its own libraries when the host is built, so that another version
of it finds every name. A function that nobody wrote ends the run with its name, or is refused by its name where the
interface has a way to refuse.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from mindsigma.ascend_host.python.hccl.sys_version import __sys_version__ as VERSION
from mindsigma.backends.compiled import compiler_version, locked, processor, trusted_folder
from mindsigma.errors import MindSigmaError, say

SOURCE = Path(__file__).parent / "source"
PYTHON = Path(__file__).parent / "python"  # packages of CANN's names
# The wheel's libraries were built with the old layout of std::string.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fPIC", "-fno-math-errno", "-D_GLIBCXX_USE_CXX11_ABI=0", "-pthread")
SECONDS = 600  # of one compilation at most

# Libraries that MindSpore opens by name, beside those that its own are linked with.
OPENED = (
    "libascendcl", "libopapi", "libnnopbase", "libacl_op_compiler", "libacl_tdt_channel", "libacl_tdt_queue", "libhccl",
    "libmsprofiler", "libprofapi", "libruntime", "libge_runner",
)  # fmt: skip
NAMES = re.compile(rb"(?<=\0)(?:acl[a-z]{2,8}[A-Z]\w+|acl[A-Z]\w+|Hccl[A-Z]\w+|Hcom[A-Z]\w+)(?=\0)")
PLAIN = ("Initialize", "Finalize", "GetOpsKernelInfoStores", "_Z9DlogFlushv", "_Z13CheckLogLevelii")
WANTED = re.compile(r"(?:acl[a-z]*[A-Z]|Hccl|Hcom|hal[A-Z]|mm[A-Z]|_ZNK?2ge|_ZT[VIS]N2ge|_ZNK?3Adx)\w*$")


def wheel():
    """Folder of MindSpore's package, without importing it. Raises MindSigmaError."""
    spec = find_spec("mindspore")
    if spec is None or not spec.origin:
        raise MindSigmaError("MindSpore is not installed: pip install -r requirements.txt")
    return Path(spec.origin).parent


def _ascend_libraries(package):
    libraries = package / "lib"
    plugin = libraries / "plugin"
    found = sorted([*plugin.glob("libmindspore*ascend.so*"), *(plugin / "ascend").glob("*.so")])
    if not any("libmindspore_ascend.so" in path.name for path in found):
        raise MindSigmaError(
            f"{plugin} has no libmindspore_ascend.so: this MindSpore was built without Ascend; take PyPI's for Linux"
        )
    return found + sorted(libraries.glob("libmindspore_ge_backend.so*"))


def _tool(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise MindSigmaError(f"{command[0]} is needed (Debian: apt install g++) and failed: {error}") from None
    return done.stdout


def symbols(path, kind):
    """Names of a library's dynamic symbols: kind "undefined" without the weak ones, or "defined"."""
    names = set()
    for line in _tool("nm", "-D", f"--{kind}-only", str(path)).splitlines():
        parts = line.split()
        if len(parts) >= 2 and parts[-2] not in ("w", "v"):
            names.add(parts[-1].split("@")[0])
    return names


def _linked(path):
    """Names of the libraries that a library is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.+)\]", _tool("readelf", "-d", str(path)))


def wanted_names(package):
    """Functions that the wheel's Ascend libraries want from CANN, undefined or looked up by name, as a sorted list."""
    undefined, defined, looked_up = set(), set(), set()
    for path in _ascend_libraries(package):
        undefined |= symbols(path, "undefined")
        defined |= symbols(path, "defined")
        looked_up |= {name.decode() for name in NAMES.findall(path.read_bytes())}
    kernels = {name.replace("GetWorkspaceSize", "") for name in looked_up if name.startswith("aclnn")}
    looked_up |= kernels | {f"{name}GetWorkspaceSize" for name in kernels}
    return sorted({name for name in undefined - defined if WANTED.match(name) or name in PLAIN} | looked_up)


def wanted_libraries(package):
    """Names of the libraries to stand in for: linked with, and neither in the wheel nor on this system."""
    own = {path.name for path in package.rglob("*.so*")}
    names = {f"{name}.so" for name in OPENED}
    for path in _ascend_libraries(package):
        names |= {name for name in _linked(path) if name not in own and not _on_system(name)}
    return sorted(names)


@functools.cache
def _on_system(name):
    with contextlib.suppress(OSError):
        ctypes.CDLL(name)
        return True
    return name.startswith(("libc.", "libm.", "ld-linux", "libmindspore"))


def _stubs(names):
    """C source of the functions that nobody wrote."""
    lines = ["int host_missing(const char *name);", "int host_missing_kernel(const char *name);"]
    for number, name in enumerate(names):
        kernel = name.startswith("aclnn") and name.endswith("GetWorkspaceSize")
        answer = f'host_missing{"_kernel" if kernel else ""}("{name}")'
        if name.startswith(("_ZTV", "_ZTI", "_ZTS")):  # of classes that are never made here
            lines.append(f'const void *table{number}[64] __asm__("{name}");')
            continue
        lines.append(f'int stub{number}(void) __asm__("{name}");')
        lines.append(f"int stub{number}(void) {{ return {answer}; }}")
    return "\n".join(lines) + "\n"


def build():
    """Folder of the host, built unless the cache has it: `lib64`, `opp`, `python`, ... below `latest`.

    Raises:
        MindSigmaError: without a C++ compiler or binutils, or for a MindSpore without Ascend.
    """
    package = wheel()
    compiler, version = compiler_version()
    digest = hashlib.sha256()
    for path in [Path(__file__), *sorted(SOURCE.iterdir()), *sorted(PYTHON.rglob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(b"\0".join([version, processor(), " ".join(FLAGS).encode()]))
    for path in _ascend_libraries(package):
        status = path.stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    folder = trusted_folder()
    target = folder / f"ascend-host-{digest.hexdigest()[:16]}"
    if not target.exists():
        with locked(folder):
            if not target.exists():
                _build(package, compiler, target)
    return target / "latest"


def _build(package, compiler, target):
    """Build beside `target` and rename: a kill leaves nothing that is taken for a host."""
    for leftover in target.parent.glob(".ascend-host-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)
    say("note: building the Ascend host, once", to=sys.stderr)
    partial = Path(tempfile.mkdtemp(".part", ".ascend-host-", target.parent))
    try:
        _fill(package, compiler, partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(package, compiler, folder):
    latest, objects = folder / "latest", folder / "objects"
    libraries = latest / "lib64"
    for made in (objects, libraries / "driver", latest / "opp", latest / "opp_kernel", latest / "compiler"):
        made.mkdir(parents=True)
    (latest / "compiler" / "version.info").write_text(f"Version={VERSION}\n")
    shutil.copytree(PYTHON, latest / "python", ignore=shutil.ignore_patterns("__pycache__"))

    products = sorted((package / "lib").glob("libdnnl.so*"))
    if not products:
        raise MindSigmaError(f"{package / 'lib'} has no libdnnl.so, whose product of matrices the kernels use")
    options = [*FLAGS, f'-DMINDSPORE_DNNL="{products[0]}"']
    sources = sorted(SOURCE.glob("*.cpp"))
    made = [objects / f"{source.stem}.o" for source in sources]

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(_compile, compiler, [*options, "-c", source, "-o", out]) for source, out in zip(sources, made)
        ]
        wanted = wanted_names(package)
        names = wanted_libraries(package)
        for job in jobs:
            job.result()
    defined = set()
    for path in made:
        for line in _tool("nm", "--defined-only", str(path)).splitlines():
            defined.add(line.split()[-1])
    stubs = objects / "stubs.c"
    stubs.write_text(_stubs([name for name in wanted if name not in defined]))
    core = libraries / "libascend_host.so"
    _compile(compiler, ["-x", "c", "-fPIC", "-O1", "-w", "-c", stubs, "-o", objects / "stubs.o"])
    _compile(compiler, ["-shared", "-o", core, *made, objects / "stubs.o", "-pthread", "-ldl", "-lrt",
                        "-Wl,-soname,libascend_host.so"])  # fmt: skip
    marker = objects / "marker.c"
    marker.write_text("int ascend_host;\n")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda name: _forward(compiler, marker, libraries, name), [*names, "driver/libascend_hal.so"]))
    shutil.rmtree(objects)


def _forward(compiler, marker, libraries, name):
    """A small library of a name of CANN that hands on to the one with everything."""
    up = "/.." if "/" in name else ""
    _compile(compiler, ["-x", "c", "-shared", "-fPIC", "-o", libraries / name, marker, "-x", "none", f"-L{libraries}",
                        "-Wl,--no-as-needed", f"-Wl,-rpath,$ORIGIN{up}", f"-Wl,-soname,{Path(name).name}",
                        "-lascend_host"])  # fmt: skip


def _compile(compiler, arguments):
    done = subprocess.run(
        [compiler, *map(str, arguments)], capture_output=True, text=True, errors="replace", timeout=SECONDS
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "undefined" in line]
        raise MindSigmaError(f"{compiler} failed: {(lines or ['it gave no message'])[0]}")

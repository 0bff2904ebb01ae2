"""What a process needs to run on the Ascend host, and when it must not."""

import glob
import os
from pathlib import Path

from mindsigma.ascend_host.build import build
from mindsigma.ascend_host.dry import preloading
from mindsigma.errors import MindSigmaError

MEMORY = "MINDSIGMA_HOST_GIB"  # of the card that is played, by default 64
TRACE = "MINDSIGMA_HOST_TRACE"  # file that gets a line a launch
DRY = "MS_SIMULATION_LEVEL"  # MindSpore's own: 1 compiles and plans, and launches nothing
# MindSpore's compiler asks for memory in small pieces, by the million: it takes a fifth less time with larger caches of
# them, and another quarter less in pages of 2 MiB.
TUNABLES = "glibc.malloc.tcache_count=20000:glibc.malloc.trim_threshold=1000000000:glibc.malloc.hugetlb=1"
OF_A_REAL_ONE = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH", "ASCEND_AICPU_PATH")
PLACES = ("/dev/davinci[0-9]*", "/usr/local/Ascend/*/lib64", "/usr/local/Ascend/ascend-toolkit")


def real_cann():
    """Where a real CANN or an NPU shows on this machine, as a text; None if there is none."""
    ours = Path(os.environ.get("ASCEND_OPP_PATH", "/")).parent / "lib64" / "libascend_host.so"
    if not ours.is_file():
        for name in OF_A_REAL_ONE:
            if os.environ.get(name):
                return f"{name}={os.environ[name]}"
    for pattern in PLACES:
        for found in sorted(glob.glob(pattern)):
            return found
    return None


def host_environment(dry=False, gib=None, cards=1, rank=0, trace=None):
    """Changes of a process's environment that put it on the Ascend host, as a dict; builds the host if need be.

    Args:
        dry: compile, select kernels and plan memory, but compute nothing.
        gib: memory of the card, in GiB.
        cards, rank: in a dry run, of how many cards this process plays which.
        trace: file that gets a line for every kernel that is launched.

    Raises:
        MindSigmaError: beside a real CANN, which must not be disturbed; or if the host cannot be built.
    """
    found = real_cann()
    if found:
        raise MindSigmaError(
            f"{found}: this machine has a real CANN or an NPU; run the command on it, without the host"
        )
    latest = build()
    changes = {"ASCEND_OPP_PATH": str(latest / "opp")}
    for name, place in (("LD_LIBRARY_PATH", latest / "lib64"), ("PYTHONPATH", latest / "python")):
        rest = [part for part in os.environ.get(name, "").split(os.pathsep) if part and part != str(place)]
        changes[name] = os.pathsep.join([str(place), *rest])
    changes["GLIBC_TUNABLES"] = os.environ.get("GLIBC_TUNABLES", TUNABLES)
    # MindSpore's warnings speak of compilers and drivers that are not here.
    changes["GLOG_v"] = os.environ.get("GLOG_v", "3")  # noqa: SIM112
    if dry:
        changes |= {DRY: "1", **preloading()}
    if cards > 1:
        changes |= {"RANK_SIZE": str(cards), "RANK_ID": str(rank)}
    if gib:
        changes[MEMORY] = str(gib)
    if trace:
        changes[TRACE] = str(Path(trace).resolve())
    return changes

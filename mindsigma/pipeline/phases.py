"""Where the time and the memory of a run go, phase by phase."""

import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms
from mindspore.common.api import cells_compile_cache

from mindsigma.ops import shared_graph
from mindsigma.runtime import device


@dataclass
class Phase:
    """seconds: wall time; graphs: newly compiled ones; compile_seconds: their first calls, contained in seconds;
    peak_bytes: peak memory of the process on the CPU, of the device's allocator on Ascend."""

    name: str
    seconds: float = 0.0
    compile_seconds: float = 0.0
    graphs: int = 0
    peak_bytes: int = 0


class PhaseClock:
    """Collects Phases; a phase entered again adds to its first entry."""

    def __init__(self):
        self.phases = {}

    @contextmanager
    def phase(self, name):
        """Measure the body as (a part of) phase `name`."""
        phase = self.phases.setdefault(name, Phase(name))
        _reset_peak()
        graphs, compiling, start = compiled_graphs(), shared_graph.compile_seconds(), time.perf_counter()
        try:
            yield phase
        finally:
            phase.seconds += time.perf_counter() - start
            phase.graphs += compiled_graphs() - graphs
            phase.compile_seconds += shared_graph.compile_seconds() - compiling
            phase.peak_bytes = max(phase.peak_bytes, peak_bytes())

    def table(self):
        """The phases as text, one a line."""
        lines = [f"{'phase':<10} {'seconds':>8} {'compile':>8} {'graphs':>6} {'peak GB':>8}"]
        whole = ms.get_context("mode") == ms.GRAPH_MODE  # MindSpore compiles networks whole and does not tell how long
        for phase in self.phases.values():
            compiling = "-" if whole else f"{phase.compile_seconds:.2f}"
            lines.append(
                f"{phase.name:<10} {phase.seconds:8.2f} {compiling:>8} {phase.graphs:>6} {phase.peak_bytes / 1e9:8.2f}"
            )
        return "\n".join(lines)


def compiled_graphs():
    """Number of graphs compiled so far: shared ones (PyNative) and whole networks (graph mode)."""
    return shared_graph.compiled_graphs() + sum(map(len, cells_compile_cache.values()))


def peak_bytes():
    """Peak memory since the last reset, in bytes: resident set on the CPU, device allocator on Ascend."""
    if device() == "Ascend":
        return ms.runtime.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak():
    if device() == "Ascend":
        ms.runtime.reset_max_memory_allocated()
        return
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear:
            clear.write("5")
    except OSError:
        pass  # the peak is then that of the process so far

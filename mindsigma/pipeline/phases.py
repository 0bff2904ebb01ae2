"""Where the time and the memory of a run go, phase by phase."""

import resource
import time
from contextlib import contextmanager
from dataclasses import dataclass

import mindspore as ms

from mindsigma.runtime import device


@dataclass
class Phase:
    """seconds: wall time, with compilation; processor: seconds of this process on all cores; graphs: newly compiled
    ones; peak_bytes: peak memory of the process on the CPU, of the device's allocator on Ascend."""

    name: str
    seconds: float = 0.0
    processor: float = 0.0
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
        graphs, start, processor = compiled_graphs(), time.perf_counter(), time.process_time()
        try:
            yield phase
        finally:
            phase.seconds += time.perf_counter() - start
            phase.processor += time.process_time() - processor
            phase.graphs += compiled_graphs() - graphs
            phase.peak_bytes = max(phase.peak_bytes, peak_bytes())

    def table(self):
        """The phases as text, one a line."""
        lines = [f"{'phase':<10} {'seconds':>8} {'graphs':>6} {'peak GB':>8}"]
        for phase in self.phases.values():
            lines.append(f"{phase.name:<10} {phase.seconds:8.2f} {phase.graphs:>6} {phase.peak_bytes / 1e9:8.2f}")
        return "\n".join(lines)


def compiled_graphs():
    """Number of networks compiled so far: in graph mode, which is Ascend's; a CPU compiles none."""
    from mindspore.common.api import cells_compile_cache  # the only place that tells; outside of every loop

    return sum(map(len, cells_compile_cache.values()))


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

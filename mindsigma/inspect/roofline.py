"""Least time of a graph on an NPU of known peaks: every node bounded by its arithmetic or its memory traffic."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Optional

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.cost import CUBE

# Seconds a guided step of batch 1, one card, MindSpore 2.5.0, graph mode: README of mindone's PixArt-Sigma example
# (Ascend 910*, Atlas 800T A2).
PUBLISHED_910B = {256: 0.073, 512: 0.076, 1024: 0.167, 2048: 1.130}


@dataclass(frozen=True)
class Npu:
    """Peaks of an NPU in operations and bytes a second, None where unknown; see configs/npu.yaml."""

    name: str
    fp16_tflops: Optional[float] = None
    fp32_tflops: Optional[float] = None
    vector_tflops: Optional[float] = None
    bandwidth_gbs: Optional[float] = None
    hccs_gbs: Optional[float] = None
    roce_gbs: Optional[float] = None

    def operations_a_second(self, unit, dtype):
        """Peak of a unit, or None."""
        if unit == CUBE:
            tera = self.fp16_tflops if dtype in ("fp16", "bf16") else self.fp32_tflops
        else:
            tera = self.vector_tflops
        return None if tera is None else tera * 1e12


def read_npus(file):
    """dict name -> Npu of a YAML file; an unknown key or a peak that is no positive number is an error."""
    import yaml

    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MindSigmaError(f"{file}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:
        raise MindSigmaError(f"{file}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict) or not all(isinstance(peaks, dict) for peaks in content.values()):
        raise MindSigmaError(f"{file}: expected `NAME:` entries with peaks under them")
    known = [field.name for field in fields(Npu)][1:]
    for name, peaks in content.items():
        for key, value in peaks.items():
            if key not in known:
                raise MindSigmaError(f"{file}: {name} has the unknown key {key!r}; known: {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise MindSigmaError(f"{file}: {name}'s {key} must be a positive number, not {value!r}")
    return {str(name): Npu(str(name), **peaks) for name, peaks in content.items()}


@dataclass
class Bound:
    """Estimate in seconds.

    Attributes:
        seconds: sum over the nodes of the larger of both bounds.
        arithmetic, memory: sums of either bound alone.
        kinds: dict kind -> (seconds, part of them bounded by memory).
        unbounded: kinds of nodes for which a peak was missing, so that they count only by the other bound.
    """

    seconds: float
    arithmetic: float
    memory: float
    kinds: dict
    unbounded: list


def bound_of(report, npu, efficiency=1.0):
    """Bound of a report's graph on an Npu.

    Args:
        efficiency: part of the peaks that is reached, 0 ... 1; 1 is the bound itself.
    """
    if not 0 < efficiency <= 1:
        raise MindSigmaError(f"--efficiency must lie in (0, 1], not {efficiency}")
    bandwidth = None if npu.bandwidth_gbs is None else npu.bandwidth_gbs * 1e9
    total = arithmetic_total = memory_total = 0.0
    kinds, unbounded = {}, set()
    for kind, unit, dtype, operations, moved, count in report["costs"]:
        speed = npu.operations_a_second(unit, dtype)
        arithmetic = 0.0 if speed is None else operations * count / speed / efficiency
        memory = 0.0 if bandwidth is None else moved * count / bandwidth / efficiency
        if bandwidth is None or (speed is None and operations and unit == CUBE):
            unbounded.add(kind)
        seconds = max(arithmetic, memory)
        total += seconds
        arithmetic_total += arithmetic
        memory_total += memory
        before = kinds.get(kind, (0.0, 0.0))
        kinds[kind] = (before[0] + seconds, before[1] + (seconds if memory >= arithmetic else 0.0))
    return Bound(total, arithmetic_total, memory_total, kinds, sorted(unbounded))


def lines_of(report, npu, efficiency=1.0, kinds=0):
    """Text lines of one report on one Npu, each marked as an estimate.

    Args:
        kinds: how many of the most expensive kinds of nodes to list.
    """
    bound = bound_of(report, npu, efficiency)
    request = report["request"]
    pixels = request["height"]
    compressed = "KV" if request["kv_compression"] or request["model"].endswith("-KV") else ""
    published = None
    if npu.name.startswith("910B") and request["part"] == "step" and not compressed and request["width"] == pixels:
        published = PUBLISHED_910B.get(pixels)
    lines = [
        f"estimate  {npu.name:<8} {request['part']:<10} {pixels:>5} {compressed:<2} {request['dtype']:<4} "
        f"{bound.seconds * 1e3:9.1f} {bound.arithmetic * 1e3:9.1f} {bound.memory * 1e3:9.1f} "
        + (f"{published * 1e3:9.1f} {published / bound.seconds:6.1f}" if published else " " * 16)
        + ("  no bandwidth known" if npu.bandwidth_gbs is None else "")
    ]
    costly = sorted(bound.kinds.items(), key=lambda item: -item[1][0])[:kinds]
    for kind, (seconds, by_memory) in costly:
        lines.append(
            f"estimate  {'':<8}   {kind:<24} {seconds * 1e3:9.2f} ms, {by_memory / seconds if seconds else 0:4.0%} "
            "of it bounded by memory"
        )
    return lines


HEADER = (
    f"{'':<9} {'npu':<8} {'part':<10} {'px':>5} {'':<2} {'':<4} {'ms':>9} {'arith.':>9} {'memory':>9} "
    f"{'published':>9} {'ratio':>6}"
)

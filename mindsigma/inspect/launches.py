"""What MindSpore's Ascend backend would launch for a graph, and the memory that it plans: a dry run on the Ascend host.

The graph is compiled by MindSpore's own passes, its kernels are selected and its memory is planned by its real
allocator for a card; nothing is computed. All figures are planned ones, not measured on an NPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mindsigma.ascend_host.environment import host_environment
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.inspect.launch_lines import launch_lines, saving_graphs

# MindSpore's types of kernels, and what each means on a device.
FAST, LEGACY, VIEW, OTHER = "fast", "legacy", "view", "other"
TYPES = {"opapi_kernel": FAST, "acl_kernel": LEGACY, "rt_kernel": VIEW}
SELECTED = re.compile(r"kernel opname:(\w+), kernel type:(\w+)")
PEAK = re.compile(r"Used peak memory usage \(without fragments\): (\d+)M")
WITH_FRAGMENTS = re.compile(r"Actual peak memory usage \(with fragments\): (\d+)M")
LARGEST_CARD = 1024  # GiB: whatever is asked for is planned, and then compared with a card's memory
COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast")
SECONDS = 7200  # of one dry run at most


@dataclass(frozen=True)
class Plan:
    """What was planned for a Request.

    Attributes:
        launches: dict type -> dict kind -> number, of one call of the graph; views launch nothing.
        peak_mb, fragments_mb: peak of device memory in MiB, without and with the allocator's fragments.
        weight_mb, state_mb: of them, parameters of the network and what a training step keeps besides, in MiB.
        compile_seconds, dispatch_seconds: of the first call, and of the second, in which nothing computes. Of this
            host, whatever else it does.
        sent_mb: what leaves a card for collectives in one call, in rings, in MiB.
        collectives: launches of them, on a stream of their own.
        early: how many of these come before the last kernel of the backward pass, beside which they can run.
        lines: dict "file:line" -> dict kind -> number, where each launch comes from; empty unless asked for.
    """

    launches: dict
    peak_mb: int
    fragments_mb: int
    weight_mb: float
    state_mb: float
    compile_seconds: float
    dispatch_seconds: float
    sent_mb: float
    lines: dict = field(default_factory=dict)
    collectives: int = 0
    early: int = 0

    @property
    def total(self):
        """dict type -> number of launches."""
        return {name: sum(kinds.values()) for name, kinds in self.launches.items()}


def plan(request, cards=1, zero=0, lines=False):
    """Plan of a Request (inspect/parts.py) on a card.

    Args:
        request: Request.
        cards: processes that train together, of which this is the first.
        zero: stage of ZeRO of a training step.
        lines: whether to tell the source line of each launch.

    Raises:
        MindSigmaError: if the dry run failed, with the line that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        changes = host_environment(dry=True, gib=LARGEST_CARD, cards=cards)
        changes["GLOG_v"] = "3"
        changes["MS_SUBMODULE_LOG_v"] = "{DEVICE:1}"
        changes.update(saving_graphs(f"{folder}/graphs") if lines else {})
        given = json.dumps({"request": asdict(request), "cards": cards, "zero": zero, "out": f"{folder}/plan.json"})
        root = Path(__file__).resolve().parents[2]
        changes["PYTHONPATH"] = os.pathsep.join([changes["PYTHONPATH"], str(root)])
        command = [sys.executable, "-m", "mindsigma.inspect.dry_run", given]
        with open(f"{folder}/log", "w", encoding="utf-8", errors="replace") as log:
            try:
                done = subprocess.run(
                    command, cwd=folder, env={**os.environ, **changes}, stdout=log, stderr=log, timeout=SECONDS
                )
            except subprocess.TimeoutExpired:
                raise MindSigmaError(f"the dry run did not end within {SECONDS} s") from None
        text = Path(f"{folder}/log").read_text(encoding="utf-8", errors="replace")
        if done.returncode or not Path(f"{folder}/plan.json").is_file():
            raise MindSigmaError(f"the dry run failed: {_reason(text)}")
        counted = json.loads(Path(f"{folder}/plan.json").read_text(encoding="utf-8"))
        found = _plan(text, counted)
        if lines:
            launched = {kind for name, kinds in found.launches.items() if name != VIEW for kind in kinds}
            found = replace(found, lines=launch_lines(Path(folder) / "graphs", launched))
        return found


def _reason(text):
    """The line of a log that says why, bounded."""
    lines = [line for line in text.splitlines() if re.match(r"([\w.]+Error|error)\b", line)]
    lines += [line for line in text.splitlines() if "out of memory" in line.lower() or "not enough" in line.lower()]
    return one_line((lines or text.splitlines() or ["it said nothing"])[0], 300)


def _plan(text, counted):
    launches = {name: Counter() for name in (FAST, LEGACY, VIEW, OTHER)}
    text = text[text.find(counted.pop("marker")) :]
    order = SELECTED.findall(text)  # that of the launches, too
    last = max((i for i, (kind, _) in enumerate(order) if "Grad" in kind), default=0)
    sent = [i for i, (kind, _) in enumerate(order) if kind in COLLECTIVES]
    for kind, kernel_type in order:
        name = VIEW if kind.endswith("View") else TYPES.get(kernel_type, OTHER)
        launches[name][kind] += 1
    peaks = [int(found[-1]) for found in (PEAK.findall(text), WITH_FRAGMENTS.findall(text)) if found]
    if len(peaks) != 2:
        raise MindSigmaError("the dry run told no peak of memory; is this MindSpore 2.7?")
    ordered = {name: dict(kinds.most_common()) for name, kinds in launches.items()}
    return Plan(ordered, *peaks, **counted, collectives=len(sent), early=sum(i < last for i in sent))


def largest_batch(request, gib, cards=1, zero=0, share=0.97):
    """(largest batch, Plan of it) that fits `share` of a card's memory with fragments, or (0, None).

    The peak grows evenly with the batch from some size on: it is extended from two plans, then planned and corrected.
    """
    room = gib * 1024 * share
    first = plan(replace(request, batch=2), cards, zero)
    second = plan(replace(request, batch=4), cards, zero)
    each = max((second.fragments_mb - first.fragments_mb) / 2, 1.0)
    batch = int((room - first.fragments_mb) / each) + 2
    while batch > 0:
        found = plan(replace(request, batch=batch), cards, zero)
        if found.fragments_mb <= room:
            return batch, found
        batch -= max(1, int((found.fragments_mb - room) / each))
    return 0, None

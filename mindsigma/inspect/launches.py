"""What MindSpore's Ascend backend would launch for a graph, and the memory that it plans: a dry run on the Ascend host.

The graph is compiled by MindSpore's own passes, its kernels are selected and its memory is planned by its real
allocator for a card; nothing is computed. All figures are planned ones, not measured on an NPU.
"""

import json
import math
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
from mindsigma.inspect.launch_lines import by_number, launch_lines, quoted, saving_graphs
from mindsigma.inspect.parts import config_of, fewer_blocks

# MindSpore's types of kernels, and what each means on a device.
FAST, LEGACY, VIEW, OTHER = "fast", "legacy", "view", "other"
TYPES = {"opapi_kernel": FAST, "acl_kernel": LEGACY, "rt_kernel": VIEW}
SELECTED = re.compile(r"kernel opname:(\w+), kernel type:(\w+)")
ORDERED = re.compile(
    r"PrintGraphExecuteOrder\] (?:(Graph \d+ execution order)"
    r"|Index\[\d+\], node name\[(.*?)\], logic id\[\d+\], stream id\[(\d+)\].*?(?:, event id\[(\d+)\])?$)",
    re.MULTILINE,
)
BACKWARD = "Gradients/"  # where the names of the backward pass begin
PEAK = re.compile(r"Used peak memory usage \(without fragments\): (\d+)M")
WITH_FRAGMENTS = re.compile(r"Actual peak memory usage \(with fragments\): (\d+)M")
# Of a card's memory: the driver leaves some 15/16, of which MindSpore takes 15/16, unless set_memory(max_size=...) says
# more.
SHARE = (15 / 16) ** 2
LARGEST_CARD = 64  # GiB, MindSpore's in a dry run: what fits it is planned, and then compared with a card's memory
TOO_LARGE = re.compile(r"memory isn't enough|[Oo]ut of memory|[Mm]emory not enough")
COLLECTIVES = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast")
DRY_RUN = ("-m", "mindsigma.inspect.dry_run")
SECONDS = 7200  # of one dry run at most


class TooLarge(MindSigmaError):
    """A graph for which no card is large enough, of those that MindSpore plans for."""


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
        tenths: how many of these in each tenth of the backward pass, by its kernels, list of 10.
        waits: how often the stream that computes waits for that of the collectives before the backward pass is over.
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
    tenths: list = field(default_factory=list)
    waits: int = 0

    @property
    def total(self):
        """dict type -> number of launches."""
        return {name: sum(kinds.values()) for name, kinds in self.launches.items()}


def plan(request, cards=1, zero=0, lines=False, zero_group=0):
    """Plan of a Request (inspect/parts.py) on a card.

    Args:
        request: Request.
        cards: processes that train together, of which this is the first.
        zero: stage of ZeRO of a training step.
        lines: whether to tell the source line of each launch.
        zero_group: cards that divide among themselves; 0: all.

    Raises:
        TooLarge: if even the largest card has too little memory.
        MindSigmaError: if the dry run failed, with the line that says why.
    """
    with tempfile.TemporaryDirectory() as folder:
        changes = host_environment(dry=True, cards=cards)
        changes["GLOG_v"] = "3"
        changes["MS_SUBMODULE_LOG_v"] = "{DEVICE:1,SESSION:1}"
        changes.update(saving_graphs(f"{folder}/graphs") if lines else {})
        asked = {"request": asdict(request), "cards": cards, "zero": zero, "zero_group": zero_group}
        given = json.dumps({**asked, "out": f"{folder}/plan.json"})
        root = Path(__file__).resolve().parents[2]
        changes["PYTHONPATH"] = os.pathsep.join([changes["PYTHONPATH"], str(root)])
        command = [sys.executable, *DRY_RUN, given]
        with open(f"{folder}/log", "w", encoding="utf-8", errors="replace") as log:
            try:
                done = subprocess.run(
                    command, cwd=folder, env={**os.environ, **changes}, stdout=log, stderr=log, timeout=SECONDS
                )
            except subprocess.TimeoutExpired:
                raise MindSigmaError(f"the dry run did not end within {SECONDS} s") from None
        text = Path(f"{folder}/log").read_text(encoding="utf-8", errors="replace")
        if done.returncode or not Path(f"{folder}/plan.json").is_file():
            if TOO_LARGE.search(text):
                raise TooLarge(f"more than {LARGEST_CARD} GiB would be needed: {_reason(text)}")
            raise MindSigmaError(f"the dry run failed: {_reason(text, done.returncode)}")
        counted = json.loads(Path(f"{folder}/plan.json").read_text(encoding="utf-8"))
        found = _plan(text, counted)
        if lines:
            launched = {kind for name, kinds in found.launches.items() if name != VIEW for kind in kinds}
            found = replace(found, lines=launch_lines(Path(folder) / "graphs", launched))
        return found


def stored_launches(request):
    """dict of what a stored report of a Request tells of its launches: by MindSpore's type, and the line of each."""
    found = plan(request, lines=True)
    return {
        "launches": {name: kinds for name, kinds in found.launches.items() if kinds},
        "lines": quoted(found.lines),
    }


def _reason(text, code=0):
    """The line of a log that says why, bounded; or by which signal a process ended that had no time to say it."""
    lines = [line for line in text.splitlines() if re.match(r"([\w.]+Error|error)\b", line)]
    lines += [line for line in text.splitlines() if "out of memory" in line.lower() or "not enough" in line.lower()]
    if not lines and code < 0:
        return f"its process was ended by signal {-code}; 9 may be the system's, for want of memory"
    return one_line((lines or text.splitlines() or ["it said nothing"])[0], 300)


def _plan(text, counted):
    launches = {name: Counter() for name in (FAST, LEGACY, VIEW, OTHER)}
    text = text[text.find(counted.pop("marker")) :]
    order = SELECTED.findall(text)
    for kind, kernel_type in order:
        name = VIEW if kind.endswith("View") else TYPES.get(kernel_type, OTHER)
        launches[name][kind] += 1
    peaks = [int(found[-1]) for found in (PEAK.findall(text), WITH_FRAGMENTS.findall(text)) if found]
    if len(peaks) != 2:
        raise MindSigmaError("the dry run told no peak of memory; is this MindSpore 2.7?")
    ordered = {name: by_number(kinds) for name, kinds in launches.items()}
    return Plan(ordered, *peaks, **counted, **beside_backward(text))


def beside_backward(text):
    """dict of the fields of a Plan that tell where collectives stand beside the backward pass.

    text: of a log of MindSpore's order of execution, with streams and events; of several graphs the longest counts.
    """
    graphs = [[]]
    for begins, name, stream, event in ORDERED.findall(text):
        if begins:
            graphs.append([])
        else:
            graphs[-1].append((re.sub(r"-op\d+$", "", name.rsplit("/", 1)[-1]), name, stream, event))
    rows = max(graphs, key=len)
    sent = [i for i, (kind, *_) in enumerate(rows) if kind in COLLECTIVES]
    backward = [i for i, (kind, name, *_) in enumerate(rows) if name.startswith(BACKWARD) and kind not in COLLECTIVES]
    if not sent or not backward:
        return {"collectives": len(sent)}
    computing = rows[backward[0]][2]
    passed = [sum(i < each for i in backward) for each in sent]
    early = [count for count in passed if count < len(backward)]
    waits = [event for kind, _, stream, event in rows[: backward[-1]] if kind == "StreamRecv" and stream == computing]
    links = {event for kind, _, stream, event in rows if kind == "StreamSend" and stream != computing}
    return {
        "collectives": len(sent),
        "early": len(early),
        "tenths": [sum(10 * count // len(backward) == tenth for count in early) for tenth in range(10)],
        "waits": sum(event in links for event in waits),
    }


def fits(planned, gib):
    """Whether a Plan fits a card of so many GiB: by the peak without fragments, see ascend_host/README.md."""
    return planned is not None and planned.peak_mb <= gib * 1024 * SHARE


def _planner(cards, zero, zero_group):
    """Function from a Request to its Plan, or None if no card is large enough."""

    def planned(request):
        try:
            return plan(request, cards, zero, zero_group=zero_group)
        except TooLarge:
            return None

    return planned


def largest_batches(request, gibs, cards=1, zero=0, zero_group=0):
    """The largest batch of a Request that fits cards of these sizes in GiB.

    Plans of a few blocks tell where to look (`sizes_by_few_blocks`), plans of all of them what fits.

    Returns a list of (batch, Plan of it, the smallest batch that does not fit, or None); the batch is 0 and its Plan
    None where not even a batch of 1 fits.
    """
    plans, planned = {}, _planner(cards, zero, zero_group)

    def peak(batch):
        if batch not in plans:
            plans[batch] = planned(replace(request, batch=batch))
        return plans[batch].peak_mb if plans[batch] else math.inf

    rooms = [gib * 1024 * SHARE for gib in gibs]
    expected = sizes_by_few_blocks(request, planned)
    if expected is None:
        peak(request.batch)
        peak(2 * request.batch if plans[request.batch] else max(request.batch // 2, 1))
    else:
        for room in rooms:
            peak(number_in(expected, room))
    result = []
    for room in rooms:
        batch, refused = largest_that_fits(peak, list(plans), room, expected=expected)
        result.append((batch, plans.get(batch), refused))
    return result


FEW = (2, 4)  # blocks


def sizes_by_few_blocks(request, planned):
    """The peak of a Request as a line: what grows with a block, with an image, and with an image of a block.

    Args:
        request: Request.
        planned: function from a Request to its Plan, or None.

    Returns:
        (peak of no image, of each image) in MiB; None for a network of few blocks, or if no plan was had.
    """
    depth = request.depth or config_of(request)[0].depth if request.part == "train" else 0
    if depth < 4 * max(FEW):
        return None
    batches = request.batch, 2 * request.batch
    corners = []
    for few in FEW:
        found = [planned(replace(fewer_blocks(request, few), batch=batch)) for batch in batches]
        if None in found:
            return None
        each = (found[1].peak_mb - found[0].peak_mb) / (batches[1] - batches[0])
        corners.append((found[0].peak_mb - each * batches[0], each))
    reach = (depth - FEW[0]) / (FEW[1] - FEW[0])
    base, each = (low + (high - low) * reach for low, high in zip(*corners))
    return (base, each) if each > 0 else None


def batches_by_few_blocks(request, gibs, cards=1, zero=0, zero_group=0):
    """The line of `sizes_by_few_blocks` of a Request, and the largest batch that it tells for cards of these sizes.

    A tenth of the time of `largest_batches`, which checks it. 0 where not even a batch of 1 fits.

    Raises:
        MindSigmaError: where there is no such line.
    """
    if request.control_layers:
        raise MindSigmaError("--few-blocks: beside few blocks a ControlNet tells 1.4 times what it takes; leave it out")
    line = sizes_by_few_blocks(request, _planner(cards, zero, zero_group))
    if line is None:
        raise MindSigmaError("--few-blocks: a network of few blocks, or a batch that is too small or too large for it")
    return line, [max(int((gib * 1024 * SHARE - line[0]) // line[1]), 0) for gib in gibs]


def number_in(line, room):
    """The largest number of at least 1 that a line (base, each) has room for."""
    base, each = line
    return max(int((room - base) // each), 1)


SURE = 0.1  # of what a number more takes: what a line must exceed the room by, to be believed


def largest_that_fits(size, known, room, tries=5, expected=None):
    """The largest whole number whose size fits a room, of a size that grows nearly evenly.

    Each try extends the line through the two known numbers whose sizes are next to the room, until a number that fits
    and the next one, which does not, are known, or the tries are used up. Where a size is infinite, it halves instead.

    Args:
        size: function from a number of at least 1.
        known: numbers whose sizes are cheap: two, or one that does not fit.
        expected: line (base, each) on which sizes are thought to lie, or None. If sizes do grow as it says, the next
            number is taken to be refused without being asked for.

    Returns:
        (largest number that fits, or 0; smallest that does not, or None).
    """
    sizes = {number: size(number) for number in known}
    while True:
        good = max((number for number, found in sizes.items() if found <= room), default=0)
        refused = min((number for number, found in sizes.items() if found > room and number > good), default=None)
        near = sorted((number for number in sizes if sizes[number] < math.inf), key=lambda one: abs(sizes[one] - room))
        if len(near) > 1:
            low, high = sorted(near[:2])
            each = max((sizes[high] - sizes[low]) / (high - low), 1e-9)
            wanted = int(low + (room - sizes[low]) / each)
            as_expected = expected is not None and abs(each / expected[1] - 1) < SURE / 2
            if as_expected and good and sizes[good] + each > room + SURE * each:
                refused = good + 1
        elif expected is not None:
            wanted = number_in(expected, room)
        else:
            wanted = (good + refused) // 2
        if refused == good + 1 or len(sizes) == len(known) + tries:
            return good, refused
        wanted = max(wanted, good + 1)  # which may be refused: that is to be known, too
        number = wanted if refused is None else min(wanted, refused - 1)
        sizes[number] = size(number)

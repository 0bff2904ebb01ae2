"""What changed between a stored report and a new one."""

import json
from pathlib import Path

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.report import FORMAT, compact
from mindsigma.weights.locate import read_json


def differences(stored, report):
    """Lines that tell the differences of two compact reports, and how many nodes were added, kind by kind.

    A kind with more nodes than before counts as added even where others became fewer. Launches are compared, and count,
    where both reports tell them.
    """
    lines, added = [], 0
    for kind, old, new in _changed(stored["nodes"], report["nodes"]):
        lines.append(f"nodes  {kind}: {old} -> {new} ({new - old:+})")
        added += max(new - old, 0)
    old, new = _total(stored["nodes"]), _total(report["nodes"])
    if old != new:
        lines.append(f"nodes  in total: {old} -> {new} ({new - old:+})")
    for name in dict.fromkeys([*stored["blocks"], *report["blocks"]]):
        before, after = (one["blocks"].get(name) for one in (stored, report))
        if before is None or after is None:
            lines.append(f"block  {name}: {'new' if before is None else 'gone'}")
            continue
        for what in ("nodes", "moving_activations"):
            for kind, old, new in _changed(before[what], after[what]):
                note = " on activations" if what == "moving_activations" else ""
                lines.append(f"block  {name}: {kind}{note} {old} -> {new} ({new - old:+})")
    if "launches" in stored and "launches" in report:
        more, launched = _launches(stored, report)
        lines += more
        added += launched
    for name, path in (
        ("operations", ("flops", "total")),
        ("bytes moved", ("bytes",)),
        ("parameters' bytes", ("parameters", "bytes")),
        ("constants' bytes", ("constants", "bytes")),
        ("peak of activations in bytes", ("activations", "peak_bytes")),
    ):
        old, new = (_at(one, path) for one in (stored, report))
        if old != new:
            lines.append(
                f"total  {name}: {old} -> {new} ({(new - old) / old:+.2%})" if old else f"total  {name}: {new}"
            )
    for text in sorted(set(report["violations"]) - set(stored["violations"])):
        lines.append(f"illegal, new: {text}")
    return lines, added


def _launches(stored, report):
    """What `differences` returns, of the launches and of the lines that make them."""
    lines, added = [], 0
    for name in dict.fromkeys([*stored["launches"], *report["launches"]]):
        for kind, old, new in _changed(stored["launches"].get(name, {}), report["launches"].get(name, {})):
            lines.append(f"launch {name}: {kind} {old} -> {new} ({new - old:+})")
            added += max(new - old, 0) if name != "view" else 0
    for name in dict.fromkeys([*stored["lines"], *report["lines"]]):
        for kind, old, new in _changed(stored["lines"].get(name, {}), report["lines"].get(name, {})):
            lines.append(f"line   {name}: {kind} {old} -> {new} ({new - old:+})")
    return lines, added


def read_report(file):
    """A compact report from a JSON file, full or compact."""
    report = read_json(Path(file))
    if report.get("format") != FORMAT or "blocks" not in report:
        raise MindSigmaError(f"{file}: not a graph report of format {FORMAT}; write one with tools/export.py --json")
    return compact(report) if "plumbing" in report else report


def as_json(report):
    """A compact report as the text that is stored: one line a block or line, so that a review shows what changed."""
    lines = []
    for key, value in report.items():
        if isinstance(value, dict) and key in ("blocks", "launches", "lines"):
            rows = [f"  {json.dumps(name)}: {json.dumps(block)}" for name, block in value.items()]
            lines.append(f"{json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n}")
        elif isinstance(value, list) and value:
            lines.append(f"{json.dumps(key)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n]")
        else:
            lines.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _changed(old, new):
    for kind in sorted({*old, *new}):
        if old.get(kind, 0) != new.get(kind, 0):
            yield kind, old.get(kind, 0), new.get(kind, 0)


def _total(counts):
    return sum(counts.values())


def _at(report, path):
    for key in path:
        report = report[key]
    return report

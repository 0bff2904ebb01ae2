"""Which line of this project makes each kernel that MindSpore's Ascend backend launches: from graphs that it saves."""

import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

import mindsigma

UNKNOWN = "MindSpore"  # instead of a line, for what its own passes insert
NAME = re.compile(r"# Fullname with scope: \((.*)\)")
FRAME = re.compile(r"# In file (\S+):(\d+)")
ROOT = Path(mindsigma.__file__).resolve().parents[1]
# Frames that say how an operator is called, not what for.
HELPERS = ("mindsigma/ops/", "mindsigma/models/linear.py", "mindsigma/inspect/")


def saving_graphs(folder):
    """dict of environment variables that make MindSpore save its graphs into a folder, for `launch_lines`."""
    return {"MS_DEV_SAVE_GRAPHS": "2", "MS_DEV_SAVE_GRAPHS_PATH": str(folder)}


def launch_lines(folder, kinds):
    """dict "file:line" -> dict kind -> number, of the graph that was run last, in the order of the source.

    A node of the backward pass has the line of the forward pass that it differentiates.

    Args:
        folder: Path of the saved graphs.
        kinds: set of the kinds that launch something; others are left out.
    """
    lines = {}
    for file in sorted(folder.glob("*validate*.ir")):
        lines.update(_lines_of_nodes(file))
    orders = sorted(folder.glob("execute_order/*.csv"), key=lambda file: file.stat().st_mtime)
    names = set()
    if orders:
        with open(orders[-1], newline="", encoding="utf-8", errors="replace") as file:
            names = {row["node_name"] for row in csv.DictReader(file)}
    counts = defaultdict(Counter)
    for name in names:
        kind = re.sub(r"-op\d+$", "", name.rsplit("/", 1)[-1])
        if kind in kinds:
            counts[lines.get(name, UNKNOWN)][kind] += 1
    return {line: by_number(counts[line]) for line in sorted(counts, key=_place)}


def quoted(lines):
    """`launch_lines` by what the lines say, "file: text", which stays when a file grows above them.

    Lines of one file that say the same become one.
    """
    counts = defaultdict(Counter)
    for place, kinds in lines.items():
        file, _, number = place.partition(":")
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip() if number else ""
        counts[f"{file}: {text}" if text else file].update(kinds)
    return {line: by_number(kinds) for line, kinds in counts.items()}


def by_number(kinds):
    """A dict kind -> number, the largest number first, those of one number by name."""
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))


def _lines_of_nodes(file):
    """dict full name of a node -> "file:line", the innermost that is not a helper's, of a saved graph."""
    found, name = {}, None
    with open(file, encoding="utf-8", errors="replace") as text:
        for row in text:
            row = row.strip()
            if not row.startswith("#"):
                name = None
                continue
            named, frame = NAME.match(row), FRAME.match(row)
            if named:
                name = named.group(1)
            elif frame and name is not None:
                path = Path(frame.group(1))
                place = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else UNKNOWN
                if place != UNKNOWN and not place.startswith(HELPERS):
                    found[name] = f"{place}:{frame.group(2)}"
                else:
                    found.setdefault(name, UNKNOWN)
    return found


def _place(line):
    file, _, number = line.partition(":")
    return file, int(number or 0)

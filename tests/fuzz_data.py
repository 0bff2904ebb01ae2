"""Hostile data sets, features, runs, options and adapters against what reads them, for as long as one likes.

    python tests/fuzz_data.py --minutes 10 --seed 1
    python tests/fuzz_data.py --case "shards/tar: pipe/1"

The rules are those of fuzz_convert.py: exit 0, or exit 2 and one line that names the file; nothing is run, nothing is
written outside or left behind, nothing takes more than its memory and time. Bad rows of data are listed, and no word of
theirs reaches the terminal raw. A run is only resumed from a checkpoint that is as it was written.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ.setdefault("GLOG_v", "3")

import numpy as np  # noqa: E402
from fuzz_convert import GIVEN, Driver, broken_rules, main, snapshot  # noqa: E402
from hostile import Case  # noqa: E402
from hostile.data_changes import changes_of, names  # noqa: E402
from hostile.data_sources import DATA_SOURCES, build_data  # noqa: E402

SLOW = ("bomb", "00000", "gigabyte")
QUIET = ("decode:", "image headers:", "index:", "warning: ", "write:", "verify:")


def cases(seed):
    """List of every mutation of every source, once; their order is drawn."""
    found = [Case(source, mutation, seed) for source, mutation in names()]
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order]


def selection(seed, count):
    """`count` cases of each source, drawn, but for those that take seconds to make."""
    everything = [case for case in cases(seed) if not any(word in case.mutation for word in SLOW)]
    return {source: [case for case in everything if case.source == source][:count] for source in DATA_SOURCES}


class DataDriver(Driver):
    """Driver of the readers of data."""

    def build(self):
        build_data(self.pristine)

    def judge(self, case):
        """Run one case; returns the list of broken rules, of which there should be none."""
        place, source = self.empty_place(), DATA_SOURCES[case.source]
        given = place / GIVEN
        shutil.copytree(self.pristine / case.source, given)
        if case.mutation:
            changes_of(case.source)[case.mutation](case.rng(), given)
        before = snapshot(place)
        arguments = [str(Path(GIVEN) / source.entry), *source.arguments]
        answer = self.ask({"tool": source.tool, "cwd": str(place), "arguments": arguments, "compare": None})
        self.codes[answer["code"]] += 1
        answer["stderr"] = "\n".join(
            line for line in answer["stderr"].replace("\r", "\n").split("\n") if not line.startswith(QUIET)
        )
        problems = broken_rules(answer)
        after = snapshot(place)
        if answer["code"] == 0:
            before, after = ({k: v for k, v in s.items() if not k.startswith("hostile_out")} for s in (before, after))
            if source.tool == "resume":
                problems += self._resumed(given)
        if before != after:
            changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
            problems.append(f"changed files: {', '.join(map(ascii, changed[:5]))}")
        return problems

    def _resumed(self, given):
        """A run that was resumed must have been so from a checkpoint that is whole."""
        steps = sorted(path for path in (given / "checkpoints").glob("step_*") if (path / "state.json").is_file())
        steps = [path for path in steps if re.fullmatch("step_[0-9]{8}", path.name)]  # others are none of a run's
        last = steps[-1] if steps else None
        if last is None or _content(last) == _content(self.pristine / "run" / "checkpoints" / last.name):
            return []
        return [f"resumed from {last.name}, which is not as it was written"]


def _content(checkpoint):
    """The files of a checkpoint; of its state what it says, however it is spaced."""
    files = snapshot(checkpoint)
    files["state.json"] = json.loads((checkpoint / "state.json").read_bytes())
    return files


if __name__ == "__main__":
    sys.exit(main(DataDriver, cases, "fuzz_data.py"))

"""Hostile checkpoints against tools/convert.py, for as long as one likes.

    python tests/fuzz_convert.py --minutes 10 --seed 1
    python tests/fuzz_convert.py --case "official/torch: checksum/1"

Every run must end in one of two ways. Exit 0: the result reads back as the source does. Exit 2: one line on stderr,
which begins with `error:` and names the file, and everything in the folder is as it was before. No run may start a
program, write anywhere else, take more than MEMORY or SECONDS. Prints what broke these rules with the command that
shows it again, and keeps the files in --keep; exits 1 if anything did.
"""

import argparse
import hashlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
os.environ.setdefault("GLOG_v", "3")

from hostile import Case, cases, make  # noqa: E402
from hostile.sources import SOURCES, build_all  # noqa: E402

from mindsigma.weights.formats.exchange import ASIDE  # noqa: E402
from mindsigma.weights.formats.folder_writer import STAGING  # noqa: E402

MEMORY = 700 * 2**20  # growth of resident memory during one run, bytes
SECONDS = 20  # CPU time of one run
HANGS = 60  # CPU seconds of the worker after which a run is given up, whatever else keeps the machine busy
IDLE = 20  # seconds without any CPU time after which it waits for something, as a pipe
WORKER = Path(__file__).parent / "hostile" / "worker.py"
GIVEN, RESULT = "hostile_in", "hostile_out"  # names that no message holds by chance
BARS = ("write:", "verify:")


class Driver:
    """Builds the sources, keeps a worker alive, judges what it did. Use as a context manager.

    Args:
        folder: empty Path for everything.
    """

    def __init__(self, folder):
        self.folder = folder
        self.pristine = folder / "pristine"
        self.build()
        self.codes = Counter()
        self.memory, self.seconds = 0, 0.0  # the most that a run took
        self.worker = None

    def build(self):
        """Write the sound sources below `pristine`."""
        build_all(self.pristine)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._stop()

    def judge(self, case):
        """Run one case; returns the list of broken rules, of which there should be none."""
        place = self.empty_place()
        path = place / GIVEN / SOURCES[case.source].entry
        if case.mutation:
            make(case, self.pristine, place / GIVEN)
        else:
            shutil.copytree(self.pristine / case.source, place / GIVEN)
        arguments, compare = self._command(case, place, path)
        before = snapshot(place)
        answer = self.ask({"tool": "convert", "cwd": str(place), "arguments": arguments, "compare": compare})
        self.codes[answer["code"]] += 1
        problems = broken_rules(answer)
        after = snapshot(place)
        result = arguments[1]
        if answer["code"] == 0:
            before, after = ({k: v for k, v in s.items() if k.split("/")[0] != result} for s in (before, after))
            if any(
                ".part" in name or name.endswith((".converting", ".staged", STAGING, ASIDE)) for name in snapshot(place)
            ):
                problems.append("leftovers beside the result")
        if before != after:
            changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
            problems.append(f"changed files: {', '.join(changed[:5])}")
        return problems

    def empty_place(self):
        """An empty folder for a case."""
        place = self.folder / "case"
        shutil.rmtree(place, ignore_errors=True)
        for file in self.folder.glob("case*"):  # what a mutation put beside it
            file.unlink()
        place.mkdir()
        return place

    def _command(self, case, place, path):
        """Arguments of the tool, drawn, and how to compare the result."""
        rng, source = Case(case.source, f"{case.mutation} command", case.seed).rng(), SOURCES[case.source]
        to, name = source.targets[int(rng.integers(len(source.targets)))]
        result = RESULT + Path(name).suffix
        arguments = [str(path.relative_to(place)), result, "--to", to, *source.flags]
        if to == "diffusers" and not case.mutation:
            arguments.append("--drop-unsupported")
        if rng.random() < 0.5:
            arguments.append("--verify")
        if rng.random() < 0.3:
            arguments.append("--shard-size=0.0001")
        if rng.random() < 0.3:
            arguments.append("--overwrite")
            if Path(name).suffix:
                (place / result).write_bytes(b"old and good")
            else:
                good = {"mindspore": "ours", "diffusers": "shards"}[to] if "t5" not in case.source else "t5"
                if "pipeline" in case.source:
                    good = {"mindspore": "pipeline", "diffusers": "diffusers pipeline"}[to]
                shutil.copytree(self.pristine / good, place / result)
        config = dict(flag[2:].replace("-", "_").split("=") for flag in source.flags if "=" in flag)
        compare = {
            "source": arguments[0],
            "target": result,
            "ema": "--ema" in source.flags,
            "without": "y_embedding" if to == "diffusers" else "",
            **{name: int(value) for name, value in config.items()},
        }
        return arguments, compare

    def ask(self, task):
        """What the worker answers to a task (hostile/worker.py); `code` says so where it hangs or dies."""
        if self.worker is None:
            command = [sys.executable, str(WORKER)]
            log = open(self.folder / "worker.log", "wb")
            self.worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
            log.close()
        task.update(log=str(self.folder / "stderr"), out=str(self.folder / "stdout"))
        self.worker.stdin.write(json.dumps(task) + "\n")
        self.worker.stdin.flush()
        taken, since = cpu_seconds(self.worker.pid), time.monotonic()
        end = taken + HANGS
        while not select.select([self.worker.stdout], [], [], 1)[0] and taken < end:
            now = cpu_seconds(self.worker.pid)
            if now > taken:
                taken, since = now, time.monotonic()
            elif time.monotonic() - since > IDLE:
                break
        if select.select([self.worker.stdout], [], [], 0)[0]:
            line = self.worker.stdout.readline()
            if line:
                answer = json.loads(line)
                self.memory = max(self.memory, answer["memory"])
                self.seconds = max(self.seconds, answer["seconds"])
                return answer
        died = self.worker.poll()
        self._stop()
        fault = "hangs" if died is None else f"the process died ({died})"
        return {
            "code": fault,
            "stderr": "",
            "stdout": "",
            "traceback": "",
            "seconds": 0,
            "memory": 0,
            "forbidden": [],
            "difference": "",
        }

    def _stop(self):
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()
            self.worker.stdin.close()
            self.worker.stdout.close()
            self.worker = None


def cpu_seconds(pid):
    """User and system time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def error_lines(answer):
    """What stderr held beside progress bars."""
    return [line for line in answer["stderr"].replace("\r", "\n").split("\n") if line and not line.startswith(BARS)]


def broken_rules(answer):
    """What an answer of the worker shows to be wrong."""
    problems = [f"forbidden: {what}" for what in answer["forbidden"][:3]]
    lines = error_lines(answer)
    if answer["code"] == 2:
        named = len(lines) == 1 and (GIVEN in lines[0] or RESULT in lines[0])
        if not named or not lines[0].startswith("error: ") or not lines[0].isprintable() or len(lines[0]) > 1500:
            problems.append(f"stderr is not one error line naming the file: {lines[:3]!r:.600}")
    elif answer["code"] == 0:
        if lines:
            problems.append(f"success with words on stderr: {lines[:3]!r:.400}")
        if answer["difference"]:
            problems.append(f"the result differs: {answer['difference'][-600:]}")
    else:
        problems.append(f"exit {answer['code']}: {answer['traceback'][-900:]}")
    raw = [line for line in answer["stdout"].split("\n") if not line.isprintable() or len(line) > 5100]
    if raw:
        problems.append(f"stdout holds what no terminal should get: {raw[0]!r:.300}")
    if "error: unexpected" in answer["stderr"]:
        problems.append(f"an error that nobody expected: {lines[:1]!r:.600}")
    if answer["memory"] > MEMORY:
        problems.append(f"{answer['memory'] / 2**20:.0f} MB")
    if answer["seconds"] > SECONDS:
        problems.append(f"{answer['seconds']:.1f} seconds")
    return problems


def snapshot(folder):
    """dict relative path -> kind and content of everything below a folder."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(root) / name
            status = path.lstat()
            what = [status.st_mode, os.readlink(path) if path.is_symlink() else None]
            if path.is_file() and not path.is_symlink():
                small = status.st_size < 10**9
                what += [status.st_size, hashlib.sha1(path.read_bytes()).digest() if small else status.st_mtime_ns]
            found[str(path.relative_to(folder))] = what
    return found


def parse_case(text):
    """A Case from how it is printed."""
    source, _, rest = text.partition("/")
    mutation, _, seed = rest.rpartition("/")
    return Case(source, mutation, int(seed))


def main(make_driver=Driver, rounds=cases, script="fuzz_convert.py"):
    """Run until the time is over; returns the exit code.

    Args:
        make_driver: Driver of a folder.
        rounds: function from a seed to the cases of a round.
        script: that runs this.
    """
    parser = argparse.ArgumentParser(description="Hostile files, until the time is over.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first round; each further round takes the next")
    parser.add_argument("--case", type=parse_case, help="this one alone")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder for what broke a rule")
    args = parser.parse_args()
    end, count, failed, seed = time.monotonic() + 60 * args.minutes, 0, 0, args.seed
    with tempfile.TemporaryDirectory() as folder, make_driver(Path(folder)) as driver:
        while args.case or time.monotonic() < end:
            for case in [args.case] if args.case else rounds(seed):
                problems = driver.judge(case)
                count += 1
                if count % 500 == 0:
                    print(f"{count} cases, {failed} broke a rule", flush=True)
                if problems:
                    failed += 1
                    kept = args.keep / f"{failed:04d}"
                    shutil.rmtree(kept, ignore_errors=True)
                    shutil.copytree(Path(folder) / "case", kept, symlinks=True, ignore=_special)
                    print(f"{case}: {'; '.join(problems)}\n  python tests/{script} --case {str(case)!r}  ({kept})")
                    sys.stdout.flush()
                if not args.case and time.monotonic() >= end:
                    break
            if args.case:
                break
            seed += 1
    codes = ", ".join(f"{number} x exit {code}" for code, number in sorted(driver.codes.items(), key=str))
    most = f"at most {driver.memory / 2**20:.0f} MB and {driver.seconds:.1f} s of CPU a run"
    print(f"{count} cases, seeds {args.seed} to {seed}: {codes}; {most}; {failed} broke a rule")
    return 1 if failed else 0


def _special(folder, names):
    """Pipes and terabytes, which are not copied."""
    paths = [Path(folder) / name for name in names]
    return [p.name for p in paths if p.is_fifo() or (p.is_file() and p.stat().st_size > 10**9)]


if __name__ == "__main__":
    sys.exit(main())

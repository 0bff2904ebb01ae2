"""Contestants that run the same case in turn, A B A B, so that a machine that slows down slows all of them."""

import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mindsigma.errors import MindSigmaError

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent():
    """In a child: be killed when the process that made it ends, however it ends; a stopped one would stay for good."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def with_tools(environment):
    """An environment (None: this process's) in which a worker finds the modules of tools/."""
    environment = dict(os.environ if environment is None else environment)
    places = [str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))}


class Worker:
    """A process of worker.py. It is stopped by a signal whenever it is not its turn: idle threads do not spin then.

    Args:
        python: interpreter.
        script: file that calls `serve`.
        case: name of the case.
        options: dict for its preparation.
        environment: dict, or None for this process's.
    """

    def __init__(self, python, script, case, options, environment=None):
        self.name = f"{Path(script).name} {case}"
        self._errors = tempfile.TemporaryFile()
        try:
            self._process = subprocess.Popen(
                [str(python), str(script), case, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=with_tools(environment),
                text=True,
                preexec_fn=end_with_parent,
            )
        except OSError as error:
            self._errors.close()
            raise MindSigmaError(f"{python}: cannot be run ({error.strerror})") from None
        self.prepared = self._reply()
        self._process.send_signal(signal.SIGSTOP)

    def _reply(self):
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["it ended without a word"]
            raise MindSigmaError(f"{self.name} failed: {lines[-1]}")
        return json.loads(line)

    def _ask(self, text):
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _reply tells why
        reply = self._reply()
        self._process.send_signal(signal.SIGSTOP)
        return reply

    def run(self):
        """Dict of seconds, cpu_seconds and peak_bytes of one run."""
        return self._ask("run")

    def save(self, path):
        """Write what the last run returned as a .npy file."""
        self._ask(f"save {path}")

    def close(self):
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


class Command:
    """A contestant each of whose runs is a process of its own: a function () -> dict as `run_command` returns."""

    prepared = {}

    def __init__(self, function):
        self.run = function

    def close(self):
        """Nothing is left to end."""


def run_command(command, name, environment=None):
    """Dict of seconds, cpu_seconds and peak_bytes of a process, from start to end; raises with its last line."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        except OSError as error:
            raise MindSigmaError(f"{command[0]}: cannot be run ({error.strerror})") from None
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status != 0:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or [f"it ended with {status}"]
            raise MindSigmaError(f"{name} failed: {lines[-1]}")
    # ru_maxrss of a child begins at the size of the process that made it, which is small here.
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024}


def in_turn(contestants, repeats, warm_up=True):
    """Measure contestants, one run each at a time.

    Args:
        contestants: dict name -> Worker or Command.
        repeats: counted rounds; with 0 the first one counts.
        warm_up: whether a round that compiles comes first and is told apart.

    Returns:
        dict name -> dict of lists seconds and cpu_seconds, median_seconds, first_seconds, peak_bytes.
    """
    rounds = repeats + 1 if warm_up else max(repeats, 1)
    runs = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            runs[name].append(contestant.run())
    results = {}
    for name, all_runs in runs.items():
        counted = all_runs[1:] or all_runs if warm_up else all_runs
        seconds = [run["seconds"] for run in counted]
        results[name] = {
            "seconds": seconds,
            "cpu_seconds": [run["cpu_seconds"] for run in counted],
            "median_seconds": statistics.median(seconds),
            "first_seconds": all_runs[0]["seconds"],
            "peak_bytes": max(run["peak_bytes"] for run in all_runs),
            **({"source_bytes": all_runs[0]["source_bytes"]} if "source_bytes" in all_runs[0] else {}),
        }
    return results

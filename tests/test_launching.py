"""The launcher of several processes ends at once what fails, starts again what may be mended, hands signals on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from training_runs import free_port

TOOL = ROOT / "tests" / "launched_tool.py"


def start(folder, *arguments, processes=2, tool=TOOL, nodes=(), **options):
    """The launcher of a tool as a process; options of the launcher by name."""
    flags = [f"--{name}={value}" for name, value in {"port": free_port(), "logs": folder / "logs", **options}.items()]
    command = [sys.executable, "-m", "mindsigma.commands.launch", f"--processes={processes}", *flags, *nodes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        list(map(str, [*command, "--", tool, folder, *arguments])),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def run(folder, *arguments, **options):
    """(exit code, standard output, standard error) of the launcher."""
    process = start(folder, *arguments, **options)
    out, error = process.communicate(timeout=300)
    return process.returncode, out, error


def attempts(folder, rank=0):
    """What each attempt of a process was started with: number of processes, further options."""
    return (folder / f"started-{rank}").read_text().splitlines()


def test_all_finish(tmp_path):
    """One of them crashes when all is done, as MindSpore's exit hooks may."""
    code, out, error = run(tmp_path, "finish,crash")
    assert (code, error) == (0, "") and out == "attempt 0, process 0: finish\n"
    assert (tmp_path / "logs" / "worker_1.log").read_text() == "attempt 0, process 1: crash\n"


DIES = ("die", "process 1 was killed by signal 9 after step 7 (in a step)")
FAILS = ("fail", "process 1 ended with code 3 after step 7 (in a step)")
HANGS = ("hang", "no process took a step within 1 s (process 1: step 7, in a step)")


@pytest.mark.parametrize(
    ("what", "said"), [DIES, *(pytest.param(*each, marks=pytest.mark.slow) for each in (FAILS, HANGS))]
)
def test_restart(tmp_path, what, said):
    """Process 0 waits for the other, and is ended with it."""
    code, out, error = run(tmp_path, f"stop,{what}", "finish,finish", restarts=2, hang=1 if what == "hang" else 60)
    assert code == 0 and len(attempts(tmp_path)) == 2
    assert error.startswith("error: ") and said.split(" (")[0] in error
    assert "restart 1 of 2 from the last checkpoint, with 2 processes" in out


@pytest.mark.slow
def test_restarts_are_bounded(tmp_path):
    code, _, error = run(tmp_path, *["stop,die"] * 3, restarts=2)
    assert code == 1 and error.count("was killed by signal 9") == 3 and len(attempts(tmp_path)) == 3


def test_what_a_user_must_mend_is_not_tried_again(tmp_path):
    code, _, error = run(tmp_path, "stop,refuse", "finish,finish", restarts=2)
    assert code == 2 and "process 1: no such data" in error and len(attempts(tmp_path)) == 1


@pytest.mark.slow
def test_a_process_that_never_began_is_not_tried_again(tmp_path):
    code, _, error = run(tmp_path, tool=tmp_path / "absent.py", restarts=2)
    assert code == 2 and "process 0 ended with code 2; see worker_0.log" in error


@pytest.mark.slow
def test_fewer_processes_with_more_micro_batches(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "options.json").write_text(json.dumps({"accumulation": 3}))
    plan = ["stop,die", "die,", "finish,"]
    code, _, _ = run(tmp_path, *plan, "--output", tmp_path / "run", restarts=2, then="1")
    output = f"--output {tmp_path / 'run'}"
    assert code == 0
    assert attempts(tmp_path) == [f"2 {output}", *[f"1 {output} --accumulation 6"] * 2]


@pytest.mark.slow
def test_sigterm_is_handed_on(tmp_path):
    process = start(tmp_path, "stop,stop", restarts=2)
    while not (tmp_path / "started-1").exists():
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (0, "") and len(attempts(tmp_path)) == 1


@pytest.mark.slow
def test_two_launchers_of_two_nodes(tmp_path):
    """A fault of one node ends the processes of the other at once, and both start again."""
    port, launchers = free_port(), []
    for node in range(2):
        nodes = ["--nodes=2", f"--node-rank={node}"]
        plan = "stop,die", "finish,finish"
        launchers.append(start(tmp_path, *plan, processes=1, port=port, restarts=1, nodes=nodes))
    told = [launcher.communicate(timeout=300) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], told
    assert "another node: process 1 was killed by signal 9" in told[0][1]
    assert [len(attempts(tmp_path, rank)) for rank in range(2)] == [2, 2]


@pytest.mark.slow
def test_many_ends_of_mindspore(tmp_path):
    """Processes that join, sum and end; MindSpore's exit hooks crashed in 2 of 80 such runs."""
    for i in range(20):
        code, out, error = run(tmp_path / str(i), tool=ROOT / "tests" / "joined_tool.py")
        assert (code, out) == (0, "[3.0]\n"), error

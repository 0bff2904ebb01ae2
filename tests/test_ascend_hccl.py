"""HCCL of the Ascend host: processes of this machine on its library, each collective held to NumPy (ascend_rank.py)."""

import ctypes
import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ascend_rank
import pytest
from ascend_kernels import library
from training_runs import Run

from mindsigma.ascend_host.build import build
from mindsigma.ascend_host.environment import host_environment

WORKER = Path(__file__).with_name("ascend_rank.py")
MINDSPORE = Path(__file__).with_name("ascend_parallel.py")


def root_info():
    info = ctypes.create_string_buffer(4108)
    assert library().HcclGetRootInfo(info) == 0
    return info.value.decode()


def start(count, what, info=None, ranks=None, **environment):
    """Processes of `count` ranks, or of some of them."""
    info = info or root_info()
    core = build() / "lib64" / "libascend_host.so"
    return [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(core), info, str(count), str(rank), what],
            env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (range(count) if ranks is None else ranks)
    ]  # fmt: skip


def finish(processes, seconds=60):
    """(exit code, stdout, stderr) of each."""
    ended = []
    try:
        for process in processes:
            ended.append((*process.communicate(timeout=seconds), process.returncode))
    finally:
        for process in processes:
            process.kill()
    return [(code, out, error) for out, error, code in ended]


@pytest.fixture(scope="module", params=[2, 3])
def together(request):
    """What each rank said of each collective."""
    said = []
    for code, out, error in finish(start(request.param, "all")):
        assert code == 0, error
        said.append(json.loads(out))
    return said


@pytest.mark.parametrize("name", [function.__name__ for function in ascend_rank.TOGETHER])
def test_collective(together, name):
    assert [said[name] for said in together] == [None] * len(together)


@pytest.mark.parametrize(
    "name", ["disagreeing", "different_collectives", "unequal_parts", "unequal_messages", "both_send"]
)
def test_ranks_that_differ(name):
    for code, _, error in finish(start(2, name)):
        assert code == 0, error


@pytest.mark.parametrize("name", ["killed", "killed_sender"])
def test_a_killed_rank(name):
    ended = finish(start(3, name))
    victim = 2 if name == "killed" else 1
    for rank, (code, _, error) in enumerate(ended):
        assert code == (-signal.SIGKILL if rank == victim else 0), error


def test_a_rank_that_does_not_come():
    for code, _, error in finish(start(2, "slow", HCCL_EXEC_TIMEOUT="1")):
        assert code == 0, error


def test_one_rank():
    [(code, out, error)] = finish(start(1, "barrier"))
    assert code == 0, error


def test_a_rank_table(tmp_path):
    devices = [{"device_id": str(rank), "rank_id": str(rank)} for rank in range(2)]
    table = {"version": "1.0", "server_list": [{"server_id": "127.0.0.1", "device": devices}], "status": "completed"}
    path = tmp_path / "ranks.json"
    path.write_text(json.dumps(table))
    for code, _, error in finish(start(2, "barrier", str(path))):
        assert code == 0, error
    table["server_list"].append({"server_id": "127.0.0.2", "device": []})
    path.write_text(json.dumps(table))
    [(code, _, error)] = finish(start(2, "barrier", str(path), ranks=[0]))
    assert "names 2 servers; this host is one" in error


def test_a_root_info_of_another_kind():
    [(code, _, error)] = finish(start(2, "barrier", "something", ranks=[0]))
    assert code == 1 and "a root info that HcclGetRootInfo did not give" in error


def test_nothing_is_left_behind():
    """By processes that were killed while they waited for others, and there is no name that could be left."""
    before = set(glob.glob("/dev/shm/*"))
    processes = start(3, "barrier", ranks=[0, 1])
    time.sleep(0.5)
    for process in processes:
        assert process.poll() is None
        process.kill()
    finish(processes)
    assert "mindsigma-hccl" not in Path("/proc/net/unix").read_text()
    assert not [path for path in set(glob.glob("/dev/shm/*")) - before if "hccl" in path]


@pytest.mark.slow
def test_collectives_of_mindspore(tmp_path):
    """Whole graphs and single operators, over all processes and over a group of two."""
    run = Run([], tmp_path, 3, MINDSPORE, host_environment())
    assert run.wait(120) == 0, run.text() + run.text(1)
    for rank in range(3):
        assert "graph: same\nPyNative: same\n" in run.text(rank)


def test_collectives_of_mindspore_and_a_killed_process(tmp_path):
    """The other ends by itself, soon, and says why; msrun would end it too."""
    run = Run(["killed"], tmp_path, 2, MINDSPORE, host_environment())
    try:
        run.workers[1].wait(120)
        for rank in range(2):
            assert "graph: same\nPyNative: same\n" in run.text(rank), run.text(rank)
        assert run.workers[0].wait(10) != 0
    finally:
        run.kill()
    assert "error: HcclAllReduce: rank 1 ended while rank 0 waited for it in HcclAllReduce" in run.text()

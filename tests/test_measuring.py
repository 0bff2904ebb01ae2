"""The measuring tools' own arithmetic and processes, with contestants that take no time."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool

from mindsigma import MindSigmaError

TOOLS = Path(__file__).parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from measure import peers, tables, turns  # noqa: E402

HERE = Path(__file__).parent
WORKER = HERE / "measure_worker.py"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_killed_tool_leaves_no_worker():
    command = [sys.executable, HERE / "measure_tool.py"]
    tool = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = int(tool.stdout.readline())
    tool.kill()
    tool.communicate()
    end = time.monotonic() + 10
    while Path(f"/proc/{worker}/stat").exists() and " Z " not in Path(f"/proc/{worker}/stat").read_text():
        assert time.monotonic() < end, "the worker outlives the tool"
        time.sleep(0.05)


def test_workers_take_turns_and_keep_their_results(tmp_path):
    workers = {
        name: turns.Worker(sys.executable, WORKER, "case", {"value": value, "most": 3})
        for name, value in (("a", 1.0), ("b", 10.0))
    }
    order = []
    for name, worker in workers.items():
        worker.run = lambda run=worker.run, name=name: order.append(name) or run()
    try:
        results = turns.in_turn(workers, 2)
        for name, worker in workers.items():
            worker.save(tmp_path / f"{name}.npy")
        with pytest.raises(MindSigmaError, match="too many runs"):
            workers["a"].run()
    finally:
        for worker in workers.values():
            worker.close()
    assert order == ["a", "b"] * 3 + ["a"]
    assert (np.load(tmp_path / "a.npy") == 3).all() and (np.load(tmp_path / "b.npy") == 30).all()
    assert all(len(result["seconds"]) == 2 and result["peak_bytes"] > 1e6 for result in results.values())
    assert workers["a"].prepared["versions"]["numpy"] == np.__version__


def test_a_worker_that_cannot_begin_is_told():
    with pytest.raises(MindSigmaError, match="KeyError: 'most'|KeyError: 'other'"):
        turns.Worker(sys.executable, WORKER, "other", {})
    with pytest.raises(MindSigmaError, match="no-such-python: cannot be run"):
        turns.Worker("no-such-python", WORKER, "case", {})


def numbered(values):
    """A contestant whose runs take the given seconds."""
    runs = iter(values)
    return turns.Command(lambda: {"seconds": next(runs), "cpu_seconds": 1.0, "peak_bytes": 10})


def test_medians_leave_the_first_run_out():
    result = turns.in_turn({"a": numbered([9, 1, 2, 6])}, 3)["a"]
    assert (result["median_seconds"], result["first_seconds"], result["seconds"]) == (2, 9, [1, 2, 6])
    assert turns.in_turn({"a": numbered([9])}, 0)["a"]["median_seconds"] == 9
    assert turns.in_turn({"a": numbered([9, 1, 2])}, 3, warm_up=False)["a"]["median_seconds"] == 2


def test_difference_of_results():
    a = np.full((1, 2, 2, 3), 100, np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 103
    apart = peers.difference(b, a)
    assert apart["largest_difference"] == 3
    assert apart["psnr_db"] == pytest.approx(10 * np.log10(255**2 * 12 / 9))
    assert peers.difference(a, a)["psnr_db"] is None
    assert peers.difference(np.array([3.0, 4.5]), np.array([3.0, 4.0]))["relative_error"] == pytest.approx(0.1)
    with pytest.raises(MindSigmaError, match="not the same work"):
        peers.difference(a, a[:, :1])


def test_tables_of_a_comparison():
    ours = turns.in_turn({"a": numbered([9, 1, 2, 6])}, 3)["a"]
    apart = {"largest_difference": 3, "psnr_db": 61.2}
    theirs = {**ours, "median_seconds": 5.0, "peak_bytes": 2_000_000_000, "ratio": 2.5, "here": ours}
    cells = tables.peer_cells("xl-256", {**theirs, "difference": apart})
    assert cells == [
        tables.TITLES["xl-256"], "2.00", "5.00", "**2.50**", "0.0 GB", "2.0 GB", "3", "61 dB, at most 3 of 255",
    ]  # fmt: skip
    assert tables.peer_cells("xl-256", theirs)[-1] == ""  # nothing was compared
    assert tables.own_cells("xl-256", ours) == [tables.TITLES["xl-256"], "2.00", "9.00", "0.0 GB"]
    report = {
        "machine": {"cores": 2, "diffusers": "0.42.1"},
        "cases": {"xl-256": {**ours, "peers": {"diffusers": theirs}}, "vae-512": ours},
    }
    first, second, machine = tables.markdown(report).strip().split("\n\n")
    for table, cells in ((first, 8), (second, 4)):
        assert [line.count("|") - 1 for line in table.splitlines()] == [cells] * 3  # head, rule, one row
    assert "0.42.1" in machine


def test_benchmark_refuses_what_it_cannot_do(monkeypatch):
    benchmark = load_tool("benchmark")
    for options, words in (
        (["--peer", "diffusers"], "--peer-python"),
        (["--peer", "diffusers", "--peer-python", "/no/python"], "no such program"),
        (["--cases", "train-mini"], "--peer diffusers"),
        (["--repeats", "-1"], "--repeats"),
    ):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *options])
        with pytest.raises(MindSigmaError, match=words):
            benchmark.main()
    assert set(benchmark.DEFAULT_CASES) | set(benchmark.DEFAULT_PEER_CASES) <= set(benchmark.CASES)


@pytest.fixture
def scaling(monkeypatch):
    """tools/scaling.py whose points cost what they are told to, and a list of those measured."""
    tool, measured = load_tool("scaling"), []

    def measure(kind, what, pixels):
        measured.append((kind, what, pixels))
        seconds = {"plain": 2.0, "kv": 1.0}.get(what, 3.0) * pixels
        return {
            "median_seconds": seconds, "first_seconds": seconds, "cpu_seconds": [2 * seconds],
            "peak_bytes": pixels * 10**6,
        }  # fmt: skip

    monkeypatch.setattr(tool, "measure", measure)
    return tool, measured


def test_scaling_goes_on_where_it_was_stopped(scaling, tmp_path, monkeypatch, capsys):
    tool, measured = scaling
    out = tmp_path / "scaling.json"
    for points in (["step:plain:256"], ["step:plain:256", "step:kv:256", "block:plain:2048", "block:kv:2048"], []):
        monkeypatch.setattr("sys.argv", ["scaling.py", "--out", str(out), "--points", *(points or ["tiled:mini:512"])])
        assert tool.main() == 0
    assert len(measured) == 5 and measured.count(("step", "plain", 256)) == 1
    points = json.loads(out.read_text())["points"]
    assert tool.step_seconds(points, "plain") == {256: (512.0, True), 2048: (28 * 4096.0, False)}
    assert tool.step_seconds(points, "kv") == {256: (256.0, True), 2048: (14 * (4096.0 + 2048.0), False)}
    rows = {row[0]: row[1:] for row in tool.step_rows(points)}
    assert rows["2048"] == ["16384", "114688 (by block)", "86016 (by block)", "25%", "34%", ""]
    assert rows["256"][1:] == ["512.0", "256.0", "50%", "", "0.3 GB"]
    assert "114688 (by block)" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["scaling.py", "--out", str(out), "--points", "step:plain:256", "--processor"])
    assert tool.main() == 0 and "229376 (by block)" in capsys.readouterr().out
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def test_scaling_refuses_other_points_and_files(scaling, tmp_path, monkeypatch):
    tool, measured = scaling
    other = tmp_path / "other.json"
    other.write_text("{}")
    for options, words in (
        (["--points", "step:mini:256"], "step:mini:256"),
        (["--points", "step:plain:300"], "step:plain:300"),
        (["--out", str(other)], "is not a report"),
    ):
        monkeypatch.setattr("sys.argv", ["scaling.py", *options])
        with pytest.raises(MindSigmaError, match=words):
            tool.main()
    assert not measured

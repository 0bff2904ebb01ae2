"""Training on two processes: the weights of one process with the doubled batch, with and without divided states."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from training_runs import (
    OF_KEYS,
    ROOT,
    assert_same,
    checkpoint,
    free_port,
    largest_difference,
    log_lines,
    options,
    square_features,
    stored,
    train,
    write_features,
    write_network,
)

from mindsigma import distributed
from mindsigma.data.aspect_ratio import training_bins
from mindsigma.data.resolution import Resolution
from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.training.distributed import owners
from mindsigma.training.run_options import build_parser, check
from mindsigma.training.shares import Shares
from mindsigma.training.step import StepConfig

STEPS = 20
# AdamW with an eps above rounding errors: the gradient of the keys' biases is zero but for these, and an optimiser that
# divides by their size makes steps of them. CAME is compared without them.
ADAMW = {"optimizer": "adamw", "eps": 1e-3, "steps": STEPS, "save_every": 10}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network"), square_features(folder / "features")


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders of the same training on one process, on two, and on two with divided states."""
    folder = tmp_path_factory.mktemp("runs")
    train(options(*data, folder / "one", batch_size=4, **ADAMW), folder / "one" / "logs")
    for name, zero in (("two", 0), ("divided", 1)):
        arguments = options(*data, folder / name, batch_size=2, zero=zero, **ADAMW)
        train(arguments, folder / name / "logs", ranks=2)
    return folder


def test_first_gradients(runs):
    """Norm of the gradient of the first step, and loss, over both processes."""
    first = {name: log_lines(runs / name)[0] for name in ("one", "two", "divided")}
    assert first["two"] == first["divided"]
    for key in ("loss", "mse", "bound", "grad_norm"):
        assert first["two"][key] == pytest.approx(first["one"][key], rel=2e-6), key


def test_two_processes_are_one_with_the_doubled_batch(runs):
    assert largest_difference(checkpoint(runs / "two", STEPS), checkpoint(runs / "one", STEPS)) < 1e-5


def test_divided_states_change_no_bit(runs):
    for step in (10, STEPS):
        assert_same(checkpoint(runs / "divided", step), checkpoint(runs / "two", step))


def test_each_process_stores_what_it_owns(runs):
    sizes = {}
    for name in ("two", "divided"):
        files = sorted(checkpoint(runs / name, STEPS).glob("states-*.safetensors"))
        sizes[name] = [file.stat().st_size for file in files]
    assert len(sizes["two"]) == 1 and len(sizes["divided"]) == 2
    assert max(sizes["divided"]) < 0.6 * sizes["two"][0]


@pytest.mark.slow
def test_resume_with_other_processes(runs, data, tmp_path):
    """What two processes with divided states began one ends, with the very options but for batch and ZeRO."""
    shutil.copytree(runs / "divided", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", STEPS))
    run = train(options(*data, tmp_path / "run", batch_size=4, **ADAMW), tmp_path / "logs")
    assert "resumed from" in run.text()
    assert largest_difference(checkpoint(tmp_path / "run", STEPS), checkpoint(runs / "one", STEPS)) < 1e-5
    assert [line["step"] for line in log_lines(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_resume_with_another_division(runs, data, tmp_path):
    """From divided to whole states and back, bit for bit."""
    for name, zero in (("two", 1), ("divided", 0)):
        shutil.copytree(runs / name, tmp_path / name)
        shutil.rmtree(checkpoint(tmp_path / name, STEPS))
        arguments = options(*data, tmp_path / name, batch_size=2, zero=zero, **ADAMW)
        train(arguments, tmp_path / "logs" / name, ranks=2)
        assert_same(checkpoint(tmp_path / name, STEPS), checkpoint(runs / name, STEPS))


@pytest.mark.slow
def test_divided_states_of_came(data, tmp_path):
    """CAME's factored states, whose means cross the shares and so round in another order, with accumulation."""
    for zero in (0, 1, 2):
        arguments = options(*data, tmp_path / str(zero), batch_size=2, accumulation=2, zero=zero)
        train(arguments, tmp_path / "logs", ranks=2)
    for step, most in ((2, 1e-5), (6, 1e-4)):  # CAME makes more of what has been rounded with each step
        whole = checkpoint(tmp_path / "0", step)
        for zero in (1, 2):
            assert largest_difference(checkpoint(tmp_path / str(zero), step), whole, but=OF_KEYS) < most


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1])
def test_one_graph_on_each_of_two(runs, data, tmp_path, zero):
    """A step as one graph with the collectives in it, as on an NPU, gives the weights of the chain of graphs."""
    arguments = options(*data, tmp_path / "run", batch_size=2, zero=zero, **ADAMW)
    train(arguments, tmp_path / "logs", ranks=2, script=Path(__file__).with_name("training_graph.py"))
    chain = runs / ("divided" if zero else "two")
    assert largest_difference(checkpoint(tmp_path / "run", STEPS), checkpoint(chain, STEPS)) < 1e-5


def multi_aspect(folder, data, buckets, steps, **changes):
    """Train on two processes over `buckets` aspect ratios; returns the lines of the log."""
    sizes = list(training_bins(256).values())
    sizes = [tuple(map(int, sizes[i])) for i in np.linspace(0, len(sizes) - 1, buckets).astype(int)]
    features = write_features(folder / "features", sizes * 5, Resolution(256, True))
    changes = {"batch_size": 2, "resolution": 256, "multi_scale": True, "steps": steps, "save_every": 100, **changes}
    arguments = options(data[0], features, folder / "run", **changes)
    train(arguments, folder / "run" / "logs", ranks=2, seconds=3600)  # a stall would last
    lines = log_lines(folder / "run")
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert len({(line["height"], line["width"]) for line in lines}) == buckets
    assert all(np.isfinite(line["loss"]) and line["skipped"] == 0 for line in lines)
    return lines


@pytest.mark.slow
def test_multi_aspect(data, tmp_path):
    multi_aspect(tmp_path, data, buckets=2, steps=5, optimizer="adamw")


@pytest.mark.slow
def test_200_steps_of_multi_aspect(data, tmp_path):
    lines = multi_aspect(tmp_path, data, buckets=6, steps=200, zero=1)
    assert len(lines) == 200


def test_what_is_divided():
    """Matrices whose rows the processes can share equally; the shares are all rows, each once."""
    array = np.arange(24.0, dtype=np.float32).reshape(6, 4)
    shares = [Shares(1, Collectives(Ranks(rank, 3))) for rank in range(3)]
    assert np.array_equal(np.concatenate([each.own_of(array) for each in shares]), array)
    own = [each.own(Tensor(np.stack([array, -array]))).asnumpy() for each in shares]
    assert np.array_equal(np.concatenate(own, 1), [array, -array])
    assert shares[0].divides((6, 4)) and shares[0].shape((6, 4)) == (2, 4)
    assert not any(shares[0].divides(shape) for shape in ((4, 6), (6,), (6, 1, 2, 2)))
    assert Shares(3, Collectives(Ranks())).stage == 0


@pytest.mark.parametrize("count, size", [(8, 4), (8, 2), (8, 8)])
def test_groups_of_neighbours(monkeypatch, count, size):
    """Each group has all rows; a process's place in its group is that of the processes which it sums its rows with."""
    made = {}
    monkeypatch.setattr(distributed, "_make_group", lambda name, ranks: made.setdefault(name, ranks))
    monkeypatch.setattr(distributed, "fused", lambda: True)
    array = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    shares = [Shares(2, Collectives(Ranks(rank, count)), size) for rank in range(count)]
    for first in range(0, count, size):
        rows = [each.own_of(array) for each in shares[first : first + size]]
        assert np.array_equal(np.concatenate(rows), array)
    ranks = [list(range(count))[first : first + size] for first in range(0, count, size)]
    assert sorted(made.values()) == sorted(map(tuple, [*ranks, *zip(*ranks)])) if size < count else not made
    # Numbers of 4 bytes: gradients scattered in a group, their rows summed over the groups, weights gathered in it.
    expected = 8e6 * (size - 1) / size + 8e6 / size * (count // size - 1) / (count // size)
    for each in shares:
        assert each.sent_bytes(10**6, True, ms.float32, StepConfig(zero=2)) == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("size, said", [(3, "do not fall into groups of 3"), (1, "at least 2"), (2, "are for Ascend")])
def test_groups_that_cannot_be(size, said):
    with pytest.raises(MindSigmaError, match=said):
        Shares(2, Collectives(Ranks(0, 4)), size)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give --recompute"),
        (["--recompute", "--lora-rank", "4"], "an adapter has few: use --zero 2"),
        (["--recompute", "--evaluate", "words.yaml"], "use --zero 2"),
        (["--recompute", "--method", "controlnet", "--condition", "canny"], "stay as they are here: use --zero 2"),
    ],
)
def test_what_stage_3_is_not_for(flags, said):
    """Told before anything is opened."""
    args = build_parser().parse_args(["--data", "data", "--output", "run", "--zero", "3", *flags])
    with pytest.raises(MindSigmaError, match=said):
        check(args)


def test_owners_share_equally():
    sizes = [4096] * 28 + [1152] * 56 + [32] * 9
    owner = owners(sizes, 8)
    loads = [sum(size for size, rank in zip(sizes, owner) if rank == i) for i in range(8)]
    assert max(loads) - min(loads) <= 1152
    assert owners([5, 3], 4)[:2] == [0, 1]


@pytest.mark.slow
def test_launcher_and_a_process_that_refuses(data, tmp_path):
    """The launcher's way, on two processes; one that ends with an error ends the other, at once."""
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PROCESSES": "2"}
    environment["MASTER_PORT"] = str(free_port())
    launcher = [str(ROOT / "tools" / "launch" / "train_cpu.sh")]
    arguments = options(*data, tmp_path / "run", batch_size=2, optimizer="adamw")
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stored(checkpoint(tmp_path / "run", 6))
    assert (tmp_path / "run" / "logs" / "worker_1.log").is_file()
    assert json.loads((checkpoint(tmp_path / "run", 6) / "state.json").read_text())["ranks"] == 2

    arguments = options(*data, tmp_path / "run", batch_size=2, optimizer="adamw", seed=44)
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "error:" in done.stdout and "--seed 43, not 44" in done.stdout and "--seed 43, not 44" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("then", ["", "1"])
def test_launcher_starts_again(data, tmp_path, then):
    """A process is killed after a save: the launcher goes on, on fewer processes if told, to the same weights."""
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "PROCESSES": "2"}
    launcher = [str(ROOT / "tools" / "launch" / "train_cpu.sh")]
    changes = {"batch_size": 2, "zero": 1, "optimizer": "adamw", "eps": 1e-3, "steps": 12, "save_every": 3}
    for name in ("unkilled", "killed"):
        environment.update(MASTER_PORT=str(free_port()), RESTARTS="1", THEN=then)
        arguments = options(*data, tmp_path / name, save_in_background=name == "killed", **changes)
        process = subprocess.Popen([*launcher, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
        if name == "killed":
            while not checkpoint(tmp_path / name, 3).exists():
                time.sleep(0.02)
            (victim,) = [
                int(path.parent.name)
                for path in Path("/proc").glob("[0-9]*/environ")
                if is_worker(path, tmp_path / name, 1)
            ]
            os.kill(victim, signal.SIGKILL)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
    assert "restart 1 of 1" in said
    if then:
        assert largest_difference(checkpoint(tmp_path / "killed", 12), checkpoint(tmp_path / "unkilled", 12)) < 1e-5
    else:
        assert_same(checkpoint(tmp_path / "killed", 12), checkpoint(tmp_path / "unkilled", 12))
        assert log_lines(tmp_path / "killed") == log_lines(tmp_path / "unkilled")


def is_worker(environment, output, rank):
    """Whether /proc/N/environ (Path) is that of a process of a run, of this rank."""
    try:
        variables = environment.read_bytes().split(b"\0")
        command = environment.with_name("cmdline").read_bytes()
    except OSError:
        return False
    wanted = {b"MS_ROLE=MS_WORKER", f"RANK_ID={rank}".encode()}
    return wanted <= set(variables) and str(output).encode() in command

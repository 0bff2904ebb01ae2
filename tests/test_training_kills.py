"""Killed at any instant, a run goes on to the very bits of the run that was not killed; ended on request, it saves."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import (
    TRAIN,
    Run,
    assert_same,
    checkpoint,
    log_lines,
    options,
    square_features,
    train,
    write_network,
)

STEPS = 8
CHANGES = {"optimizer": "adamw", "steps": STEPS, "save_every": 1, "keep": 2, "caption_dropout": 0.3}

HERE = Path(__file__).parent
PASSED = 7  # exit code of training_killed.py where the saves have fewer events


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network"), square_features(folder / "features")


@pytest.fixture(scope="module")
def unkilled(data, tmp_path_factory):
    """Folder of the run that nobody killed."""
    output = tmp_path_factory.mktemp("unkilled") / "run"
    train(options(*data, output, **CHANGES), output / "logs")
    return output


def steps(output):
    """Steps of the checkpoints that are there."""
    return [int(path.name[5:]) for path in sorted((output / "checkpoints").glob("step_*"))]


def assert_resumed(output, unkilled):
    """All that a run leaves is that of the run that was not killed."""
    assert steps(output) == steps(unkilled)
    for step in steps(unkilled):
        assert_same(checkpoint(output, step), checkpoint(unkilled, step))
    assert log_lines(output) == log_lines(unkilled)
    assert not [path.name for path in output.rglob("*") if path.suffix in (".part", ".gone", ".old")]


def kill_chain(arguments, output, unkilled, ranks, seed, kills, script=TRAIN):
    """Start the run, kill it within a second after a random number of new steps, start it again, until `kills` hit.

    A run that ends before it is hit has to be that which was not killed; another one then begins.
    """
    draw, starts = random.Random(seed), 0
    while kills:
        before = steps(output)
        wanted = (before[-1] if before else 0) + draw.choice((0, 0, 1, 1, 2))
        run = Run(arguments, output / f"logs{starts}", ranks, script)
        starts += 1
        # At step 0 of a start, also before the first computation: while it starts, reads, compiles.
        run.until(lambda wanted=wanted: any(step >= wanted for step in steps(output)) or wanted == 0)
        time.sleep(draw.uniform(0.0, 0.4 if wanted else 4.0))
        victim = run.workers[draw.randrange(ranks)]
        if ranks > 1:  # one of the processes, as a fault would; msrun then kills the others
            victim.kill()
            time.sleep(draw.uniform(0.0, 0.3))
        run.kill()
        if victim.returncode == -signal.SIGKILL:
            kills -= 1
        else:
            assert victim.returncode == 0, run.text()
            assert_resumed(output, unkilled)
            shutil.rmtree(output)


def test_killed_at_random_instants(data, unkilled, tmp_path):
    output = tmp_path / "run"
    arguments = options(*data, output, **CHANGES)
    kill_chain(arguments, output, unkilled, ranks=1, seed=1, kills=9)
    train(arguments, output / "logs")
    assert_resumed(output, unkilled)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 4])
def test_one_of_two_killed_at_random_instants(data, tmp_path, kills):
    changes = {**CHANGES, "steps": 8, "batch_size": 2, "zero": 1}
    train(options(*data, tmp_path / "unkilled", **changes), tmp_path / "logs", ranks=2)
    output = tmp_path / "run"
    arguments = options(*data, output, **changes)
    kill_chain(arguments, output, tmp_path / "unkilled", ranks=2, seed=2, kills=kills)
    train(arguments, output / "logs", ranks=2)
    assert_resumed(output, tmp_path / "unkilled")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
def test_killed_again_and_again(data, unkilled, tmp_path, seed):
    output = tmp_path / "run"
    arguments = options(*data, output, **CHANGES)
    kill_chain(arguments, output, unkilled, ranks=1, seed=seed, kills=12)
    train(arguments, output / "logs")
    assert_resumed(output, unkilled)


def killed_in_save(data, unkilled, tmp_path, events):
    """Kill at each of these events of the saves of steps 2 to 4, then resume once; returns whether all were reached."""
    for event in events:
        output = tmp_path / f"run{event}"
        arguments = options(*data, output, **CHANGES)
        run = Run([str(event), *arguments], output / "logs", script=HERE / "training_killed.py")
        code = run.wait()
        if code == PASSED:
            return False
        assert code == -signal.SIGKILL, run.text()
        complete = steps(output)
        assert complete and complete[-1] in (1, 2, 3, 4)
        for step in complete:
            if step >= STEPS - 1:
                assert_same(checkpoint(output, step), checkpoint(unkilled, step))
        train(arguments, output / "logs")
        assert_resumed(output, unkilled)
    return True


@pytest.mark.slow
def test_killed_within_a_save(data, unkilled, tmp_path):
    assert killed_in_save(data, unkilled, tmp_path, [0, 9, 18, 27])


@pytest.mark.slow
def test_killed_at_every_event_of_a_save(data, unkilled, tmp_path):
    """More than a hundred runs."""
    assert not killed_in_save(data, unkilled, tmp_path, range(1000)), "the last save was passed at last"


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_signals(data, unkilled, tmp_path, number, code):
    """SIGTERM and Ctrl-C save and end, and the run goes on to the same bits."""
    output = tmp_path / "run"
    arguments = options(*data, output, **{**CHANGES, "save_every": 100})
    run = Run(arguments, output / "logs")
    log = output / "log.jsonl"
    assert run.until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 3)
    run.kill(number)
    assert run.wait() == code, run.text()
    assert "Traceback" not in run.text()
    stopped = steps(output)[-1]
    assert 3 <= stopped < STEPS and f"stopped after step {stopped}, saved" in run.text()
    assert number == signal.SIGTERM or "Ctrl-C again ends at once" in run.text()
    train(arguments, output / "logs")
    assert_same(checkpoint(output, STEPS), checkpoint(unkilled, STEPS))
    assert log_lines(output) == log_lines(unkilled)


def test_a_second_interrupt_ends_at_once(data, tmp_path):
    """Nothing half is left; the earlier checkpoint is good."""
    output = tmp_path / "run"
    run = Run(options(*data, output, **{**CHANGES, "steps": 1000, "save_every": 2}), output / "logs")
    assert run.until(lambda: steps(output))
    for _ in range(2):
        run.workers[0].send_signal(signal.SIGINT)
        time.sleep(0.002)
    assert run.wait(30) == 130, run.text()
    assert "Traceback" not in run.text()
    assert run.text().endswith("interrupted\n") or "saved" in run.text()  # the save was faster than the second
    assert not [path for path in (output / "checkpoints").glob("step_*") if not (path / "state.json").is_file()]


@pytest.mark.slow
def test_sigterm_of_one_of_two(data, tmp_path):
    """The process that is asked tells the other: both save the same step."""
    output = tmp_path / "run"
    run = Run(options(*data, output, **{**CHANGES, "steps": 1000, "batch_size": 2}), output / "logs", ranks=2)
    log = output / "log.jsonl"
    assert run.until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 2)
    run.workers[1].send_signal(signal.SIGTERM)
    assert run.wait() == 0, run.text()
    assert f"stopped after step {steps(output)[-1]}, saved" in run.text()


def test_full_disk(data, tmp_path):
    """A save that finds no space ends the run with one line; the checkpoint before is good, nothing half is left."""
    output = tmp_path / "run"
    arguments = options(*data, output, **CHANGES)
    run = train(arguments, output / "logs", expect=2, script=HERE / "training_full_disk.py")
    errors = [line for line in run.text().splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "cannot be written" in errors[0] and "free some space" in errors[0], run.text()
    assert "Traceback" not in run.text()
    assert steps(output) == [1]
    assert [path.name for path in (output / "checkpoints").iterdir() if path.name != ".lock"] == ["step_00000001"]


def test_two_runs_in_one_folder(data, unkilled):
    """The second is told so."""
    import fcntl

    with open(unkilled / "checkpoints" / ".lock", "wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        arguments = options(*data, unkilled, **CHANGES)
        done = subprocess.run([sys.executable, TRAIN, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "another process is training there" in done.stderr

"""Several processes of the project's tools on the Ascend host, started as on a box of NPUs, give what one gives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_error
from PIL import Image
from training_runs import (
    OF_KEYS,
    ROOT,
    Run,
    assert_same,
    checkpoint,
    free_port,
    largest_difference,
    log_lines,
    options,
    square_features,
    train,
    write_features,
    write_network,
)

from mindsigma.ascend_host.environment import host_environment
from mindsigma.data.resolution import Resolution

STEPS = 3
# As in test_training_distributed.py: an eps above rounding errors, since some gradients are nothing else.
ADAMW = {"optimizer": "adamw", "eps": 1e-3, "steps": STEPS, "save_every": STEPS, "device": "Ascend", "dtype": "fp32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network", depth=1), square_features(folder / "features")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A function that trains on some processes, once, and gives the folder of the run."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def run(ranks, zero=0, group=None, again=""):
        name = f"{ranks}-{zero}-{group}{again}"
        if name not in known:
            known[name] = folder / name
            changes = {**ADAMW, "zero": zero, "zero_group": group}
            arguments = options(*data, folder / name, batch_size=4 // ranks, **changes)
            train(arguments, folder / name / "logs", ranks, environment=host_environment())
        return known[name]

    return run


def same_training(found, expected, most, but=()):
    """First losses and gradients, and the last weights and states, of two runs."""
    first, other = log_lines(found)[0], log_lines(expected)[0]
    for key in ("loss", "mse", "bound", "grad_norm"):
        assert first[key] == pytest.approx(other[key], rel=2e-6), key
    assert largest_difference(checkpoint(found, STEPS), checkpoint(expected, STEPS), but=but) < most


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_that_divide_train_as_one(trained, zero):
    same_training(trained(2, zero=zero), trained(1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero"), [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_ranks_train_as_one(trained, ranks, zero):
    same_training(trained(ranks, zero), trained(1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_groups_that_divide_train_as_one(trained, zero):
    """Two groups of two ranks: each divides among themselves, both hold the same."""
    same_training(trained(4, zero, group=2), trained(1), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_divided_training(trained, zero):
    same_training(trained(2, zero=zero), trained(2), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "dtype", "ranks", "group", "others"),
    [
        (2, "fp32", 2, None, [(4, 2, None), (4, 0, None), (1, 0, None)]),
        (3, "fp32", 2, None, [(4, 3, None), (4, 0, None), (1, 0, None)]),
        (3, "bf16", 2, None, [(4, 3, None), (4, 0, None), (1, 0, None)]),
        (2, "fp32", 4, 2, [(4, 3, 2), (2, 2, None)]),
    ],
)
def test_killed_and_continued_on_other_cards(data, tmp_path, zero, dtype, ranks, group, others):
    """Ranks are killed after a save; they go on to their own bits, others, divided in other ways, to the same weights.

    `others`: (ranks, stage, group) each.
    """

    def run(output, count, stage, size):
        changes = {**ADAMW, "dtype": dtype, "steps": 4, "save_every": 2, "zero": stage, "zero_group": size}
        arguments = options(*data, output, batch_size=4 // count, **changes)
        return Run(arguments, output / "logs", count, environment=host_environment())

    assert run(tmp_path / "unbroken", ranks, zero, group).wait() == 0
    killed = run(tmp_path / "killed", ranks, zero, group)
    assert killed.until(checkpoint(tmp_path / "killed", 2).exists, 600)
    killed.kill()
    shutil.rmtree(checkpoint(tmp_path / "killed", 4), ignore_errors=True)
    for count, stage, size in [(ranks, zero, group), *others]:
        output = tmp_path / f"{count}-{stage}-{size}"
        shutil.copytree(tmp_path / "killed", output)
        continued = run(output, count, stage, size)
        assert continued.wait() == 0, continued.text()
        assert "resumed from" in continued.text()
        if (count, stage, size) == (ranks, zero, group):
            assert_same(checkpoint(output, 4), checkpoint(tmp_path / "unbroken", 4))
        else:
            most = 1e-5 if dtype == "fp32" else 1e-2
            assert largest_difference(checkpoint(output, 4), checkpoint(tmp_path / "unbroken", 4)) < most


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "ranks", "group"), [(1, 2, None), (2, 2, None), (3, 2, None), (2, 4, 2), (3, 4, 2)])
def test_divided_came(data, tmp_path, zero, ranks, group):
    """Factored states, whose means cross the shares; two micro-batches, and images of prompts, which stage 3 draws."""
    changes = {**ADAMW, "optimizer": "came", "eps": None, "accumulation": 2}
    drawing = {"prompts": "a", "sample_every": 2, "sample_steps": 1}
    for name, count, more in (("one", 1, {}), ("many", ranks, {**drawing, "zero": zero, "zero_group": group})):
        arguments = options(*data, tmp_path / name, batch_size=4 // count, **changes, **more)
        train(arguments, tmp_path / name / "logs", count, environment=host_environment())
    same_training(tmp_path / "many", tmp_path / "one", 1e-4, OF_KEYS)
    drawn = sorted(path.name for path in (tmp_path / "many" / "samples").iterdir())
    assert drawn == [f"step_{step:08d}_0.png" for step in (0, 2, STEPS)]


@pytest.mark.slow
def test_a_run_twice_is_the_same_bits(trained):
    assert_same(checkpoint(trained(2), STEPS), checkpoint(trained(2, again="-again"), STEPS))


def launched(script, npus, folder, *arguments):
    """Run a launcher of tools/launch on the Ascend host."""
    environment = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    environment.update(NPUS=str(npus), MASTER_PORT=str(free_port()), LOG_DIR=str(folder / "logs"))
    command = [sys.executable, ROOT / "tools" / "ascend_host.py", "--", ROOT / "tools" / "launch" / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "zero"), [(2, 0), (2, 1), (4, 1), (4, 3)])
def test_launcher_trains_sigma_mini(tmp_path, ranks, zero):
    """With divided states the processes' graphs differ, and must still call the same collectives in one order."""
    features = write_features(tmp_path / "features", [(256, 256)] * 8, Resolution(256))
    changes = {"resolution": 256, **ADAMW}
    one = options("sigma-mini", features, tmp_path / "one", batch_size=4, **changes)
    train(one, tmp_path / "one" / "logs", environment=host_environment())
    arguments = options("sigma-mini", features, tmp_path / "run", batch_size=4 // ranks, zero=zero, **changes)
    place = arguments.index("--device")  # which the launcher gives
    launched("train_ascend.sh", ranks, tmp_path, *arguments[:place], *arguments[place + 2 :])
    same_training(tmp_path / "run", tmp_path / "one", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "npus"), [("sequence", 2), ("cfg", 2), ("both", 4)])
def test_launcher_draws_the_picture_of_one_process(tmp_path, mode, npus):
    flags = ["a red apple", "--steps", "4", "--seed", "3", "--dtype", "fp32"]
    command = [
        sys.executable,
        ROOT / "tools" / "generate.py",
        *flags,
        "--device",
        "Ascend",
        "--out",
        tmp_path / "one.png",
    ]
    subprocess.run(command, env={**os.environ, **host_environment()}, check=True, timeout=600)
    said = launched(
        "generate_ascend.sh", npus, tmp_path, *flags, "--parallel", mode, "--verbose", "--out", tmp_path / "many.png"
    )
    assert f"parallel {mode}: {npus} processes" in said
    one, many = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("one.png", "many.png"))
    assert np.abs(one - many).max() <= 1


@pytest.mark.slow
def test_bands_of_halves(tmp_path):
    """In fp16 a band rounds elsewhere than the whole does, and is no farther from fp32."""
    run = Run([str(tmp_path)], tmp_path / "logs", 2, Path(__file__).with_name("ascend_bands.py"), host_environment())
    assert run.wait(600) == 0, run.text() + run.text(1)
    drawn = [np.load(tmp_path / f"rank_{rank}.npz") for rank in range(2)]
    reference = drawn[0]["alone-fp32"]
    assert relative_error(drawn[0]["bands-fp32"], reference) < 1e-6
    assert relative_error(drawn[0]["alone-fp16"], reference) < 5e-3
    assert relative_error(drawn[0]["bands-fp16"], reference) < 1.2 * relative_error(drawn[0]["alone-fp16"], reference)
    for name in drawn[0].files:
        assert np.array_equal(drawn[0][name], drawn[1][name]), name

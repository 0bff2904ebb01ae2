"""Runs that train an adapter: two processes, killed, in half precision."""

import numpy as np
import pytest
from test_training_kills import kill_chain
from training_runs import (
    assert_same,
    checkpoint,
    largest_difference,
    log_lines,
    options,
    square_features,
    stored,
    train,
    write_network,
)

from mindsigma.training.run_options import build_parser
from mindsigma.training.trainer import Trainer

STEPS = 6
ADAPTER = ("adapter", "adapter_ema")
KINDS = {"dora": {"lora_rank": 2, "lora_alpha": 3, "dora": True}, "lora": {"lora_rank": 2}}
# AdamW's eps above rounding errors, as in test_training_distributed.py.
CHANGES = {"optimizer": "adamw", "eps": 1e-3, "learning_rate": 1e-2, "steps": STEPS, "save_every": 1, "keep": 2}
SLOW_DORA = ["lora", pytest.param("dora", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network"), square_features(folder / "features")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """A function that trains a kind of adapter in this process; returns the folder, the same at a second call."""
    folder, done = tmp_path_factory.mktemp("one"), {}

    def run(kind, **changes):
        key = kind, *changes.items()
        if key not in done:
            done[key] = folder / str(len(done))
            arguments = options(*data, done[key], **CHANGES, **KINDS[kind], **changes)
            Trainer(build_parser().parse_args(arguments)).run()
        return done[key]

    return run


@pytest.mark.parametrize("kind", SLOW_DORA)
def test_two_processes_are_one_with_the_doubled_batch(one, data, tmp_path, kind):
    """With states divided among them, clipped by the global norm."""
    arguments = options(*data, tmp_path / "run", **CHANGES, **KINDS[kind], batch_size=2, zero=1)
    train(arguments, tmp_path / "logs", ranks=2)
    last = checkpoint(tmp_path / "run", STEPS)
    assert largest_difference(last, checkpoint(one(kind), STEPS), (*ADAPTER, "states")) < 1e-5
    assert not (last / "dit").exists() and len(list(last.glob("states-*.safetensors"))) == 2
    values = stored(last)
    assert all(values[name].any() for name in values if name.startswith("adapter/") and name.endswith("lora_B"))


@pytest.mark.parametrize("kind", SLOW_DORA)
def test_killed_runs_go_on(one, data, tmp_path, kind):
    """Two kills at random instants, and the bits of the run in one go."""
    output = tmp_path / "run"
    arguments = options(*data, output, **CHANGES, **KINDS[kind])
    kill_chain(arguments, output, one(kind), ranks=1, seed=3, kills=2)
    train(arguments, output / "logs")
    assert_same(checkpoint(output, STEPS), checkpoint(one(kind), STEPS))
    assert log_lines(output) == log_lines(one(kind))


@pytest.mark.slow
def test_one_of_two_killed(data, tmp_path):
    """Divided states, in half precision with its loss scale."""
    changes = {**CHANGES, **KINDS["dora"], "batch_size": 2, "zero": 1, "dtype": "fp16"}
    train(options(*data, tmp_path / "unkilled", **changes), tmp_path / "logs", ranks=2)
    arguments = options(*data, tmp_path / "run", **changes)
    kill_chain(arguments, tmp_path / "run", tmp_path / "unkilled", ranks=2, seed=4, kills=2)
    train(arguments, tmp_path / "run" / "logs", ranks=2)
    assert_same(checkpoint(tmp_path / "run", STEPS), checkpoint(tmp_path / "unkilled", STEPS))


@pytest.mark.parametrize("kind", SLOW_DORA)
def test_half_precision_follows_fp32(one, kind):
    """Weights and activations in fp16, the adapter and its average in fp32, beside the run in fp32."""
    full, half = one(kind), one(kind, dtype="fp16")
    lines = log_lines(half)
    assert all(line["skipped"] == 0 and line["loss_scale"] == 65536 for line in lines)
    for key in ("loss", "grad_norm"):
        found, wanted = ([line[key] for line in run] for run in (lines, log_lines(full)))
        np.testing.assert_allclose(found, wanted, rtol=0.02)
    values, wanted = (stored(checkpoint(run, STEPS)) for run in (half, full))
    names = [name for name in wanted if name.split("/")[0] in ADAPTER]
    assert len(names) > 40 and all(values[name].dtype == np.float32 for name in names)
    changed = np.concatenate([values[name].ravel() for name in names if name.endswith("lora_B")])
    expected = np.concatenate([wanted[name].ravel() for name in names if name.endswith("lora_B")])
    assert np.linalg.norm(changed - expected) < 0.1 * np.linalg.norm(expected)

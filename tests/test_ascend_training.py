"""Training through MindSpore's Ascend backend on the Ascend host, beside the same on the CPU."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from ascend_training import FIRST_SCALE
from conftest import ROOT, relative_error


def with_root():
    """The environment with this tree's mindsigma."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def run(folder, device, optimizer, settings):
    """What ascend_training.py writes."""
    host = [] if device == "CPU" else [sys.executable, ROOT / "tools" / "ascend_host.py", "--"]
    out = folder / f"{device}.npz"
    command = [*host, sys.executable, ROOT / "tests" / "ascend_training.py", device, out, optimizer, settings]
    done = subprocess.run(list(map(str, command)), env=with_root(), capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(out))


@pytest.mark.parametrize(
    "optimizer, settings", [("came", "full"), pytest.param("adamw", "plain", marks=pytest.mark.slow)]
)
def test_steps_are_those_of_the_cpu(optimizer, settings, tmp_path):
    """Five steps, one of which overflows and leaves only counts; full: of two micro-batches, with averages and scale.

    A write that nothing waits for is left out by MindSpore's Ascend backend: without averages nothing reads the new
    weights in the graph, and still they must be there.
    """
    found = {device: run(tmp_path, device, optimizer, settings) for device in ("CPU", "Ascend")}
    cpu, ascend = found["CPU"], found["Ascend"]
    np.testing.assert_array_equal(cpu["controls"], ascend["controls"])
    np.testing.assert_allclose(ascend["results"], cpu["results"], rtol=2e-6)
    assert np.isnan(cpu["results"][2, 0]) and cpu["results"][2, 3] == 0
    errors = {name: relative_error(ascend[name], value) for name, value in cpu.items() if value.any()}
    errors.pop("results")  # one of them is not a number
    assert max(errors.values()) < 4e-6, max(errors, key=errors.get)
    assert any(name.endswith(":ema") for name in errors) == (settings == "full") and len(errors) > 100


@pytest.mark.slow
def test_masters_are_as_wide_weights_cast_at_every_use(tmp_path):
    """Three steps in bf16; heads of 8 become 16 wide, in the graph or, with masters, once an update."""
    found = run(tmp_path, "Ascend", "came", "masters")
    errors = {
        name: relative_error(value, found[f"False {name[5:]}"])
        for name, value in found.items()
        if name.startswith("True ") and value.any()
    }
    assert max(errors.values()) < 1e-6 and len(errors) > 100, max(errors, key=errors.get)


@pytest.mark.slow
def test_a_controlnet_learns_as_on_the_cpu(tmp_path):
    """Beside a frozen network: three steps in fp32 are the CPU's, those in half precision follow them."""
    cpu = run(tmp_path, "CPU", "adamw", "fp32")
    moved = [name for name in cpu if f"start {name}" in cpu and not np.array_equal(cpu[name], cpu[f"start {name}"])]
    assert len(moved) > 60
    for dtype, (of_results, of_weights) in {"fp32": (2e-6, 4e-6), "fp16": (5e-3, 8e-3), "bf16": (4e-2, 6e-2)}.items():
        found = run(tmp_path, "Ascend", "adamw", dtype)
        assert found.keys() == cpu.keys() and found["results"][:, -1].all()
        errors = {name: relative_error(found[name], cpu[name]) for name in moved}
        print(f"{dtype}: results {np.abs(found['results'] / cpu['results'] - 1).max():.1e}, {max(errors.values()):.1e}")
        np.testing.assert_allclose(found["results"], cpu["results"], rtol=of_results, err_msg=dtype)
        assert max(errors.values()) < of_weights, (dtype, max(errors, key=errors.get))


@pytest.mark.slow
def test_in_fp16_steps_that_overflow_are_left_out(tmp_path):
    """The scale halves until the gradients fit; the four steps that then count are those of the CPU in fp32."""
    cpu, ascend = (run(tmp_path, device, "adamw", "overflow") for device in ("CPU", "Ascend"))
    finite = ascend["overflow results"][:, -1] == 1
    assert ascend["skipped"] == np.sum(~finite) > 10 and finite[-4:].all()
    assert ascend["scale"] == FIRST_SCALE / 2 ** ascend["skipped"]
    losses(ascend["overflow results"][finite], cpu["overflow results"], 5e-3)


@pytest.mark.slow
def test_recomputed_blocks_change_no_bit(tmp_path):
    found = run(tmp_path, "Ascend", "came", "recompute")
    names = [name[6:] for name in found if name.startswith("plain ")]
    assert len(names) > 100
    for name in names:
        np.testing.assert_array_equal(found[f"recompute {name}"], found[f"plain {name}"])


@pytest.mark.slow
def test_an_adapter_learns_what_it_learns_on_the_cpu(tmp_path):
    """Four steps of a LoRA, whose weights are fp32, beside a network in bf16."""
    cpu, ascend = (run(tmp_path, device, "adamw", "lora") for device in ("CPU", "Ascend"))
    losses(ascend["lora results"], cpu["lora results"], 4e-2)
    for name, value in cpu.items():
        if name.endswith("lora_B"):  # zero before the first step
            assert np.any(value) and relative_error(ascend[name], value) < 0.2, name


STEPS = 20
TWENTY = ("--config", "configs/train/sigma-mini.yaml", "--batch-size", 2, "--steps", STEPS, "--log-every", 1,
          "--seed", 5)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Features of 96 scenes, by the tools."""
    folder = tmp_path_factory.mktemp("scenes")
    commands = (
        ("tools/make_scenes.py", folder / "scenes", "--count", 96, "--seed", 11),
        ("tools/extract_features.py", folder / "scenes", folder / "features", "--model", "sigma-mini",
         "--max-length", 40),
    )  # fmt: skip
    for command in commands:
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=with_root(), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "features"


def twenty_steps(scenes, folder, device, *options, without=()):
    """Losses and norms of gradients of twenty steps of sigma-mini, (20,) each, and numbers of steps that were left out.

    `without`: numbers of steps that are to be left out, on a CPU.
    """
    host = [] if device == "CPU" else [sys.executable, ROOT / "tools" / "ascend_host.py", "--"]
    tool = [ROOT / "tools" / "train.py"]
    if without:
        tool = [ROOT / "tests" / "ascend_skipped.py", ",".join(map(str, without))]
    command = [*host, sys.executable, *tool, *TWENTY, "--data", scenes, "--output", folder, "--device", device]
    command = [str(part) for part in (*command, *options)]
    done = subprocess.run(command, cwd=ROOT, env=with_root(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    told = np.array([0, *(row["skipped"] for row in rows)])
    loss, norm = (np.array([row[name] for row in rows]) for name in ("loss", "grad_norm"))
    return loss, norm, [int(step) for step in 1 + np.flatnonzero(np.diff(told))]


def apart(found, expected, without=()):
    """Print and return how far losses and norms of `twenty_steps` are apart at most, where no step was left out."""
    counted = [step - 1 for step in range(1, STEPS + 1) if step not in without]
    errors = [np.abs(one[counted] / other[counted] - 1).max() for one, other in zip(found[:2], expected[:2])]
    print(f"losses apart by {errors[0]:.1e}, norms by {errors[1]:.1e}; left out: {list(without)}")
    return errors


@pytest.mark.slow
def test_twenty_steps_of_sigma_mini_in_fp16(scenes, tmp_path):
    """Beside the CPU's fp32: with a scale for which the first steps overflow, which the CPU leaves out, too; and
    with blocks that are computed again, which changes no bit of what is saved."""
    found = twenty_steps(scenes, tmp_path / "over", "Ascend", "--dtype", "fp16", "--loss-scale", 2**30)
    assert 3 <= len(found[2]) <= 12 and found[2][0] == 1
    expected = twenty_steps(scenes, tmp_path / "cpu", "CPU", without=found[2])
    assert expected[2] == found[2]
    of_losses, of_norms = apart(found, expected, found[2])
    assert of_losses < 0.1 and of_norms < 0.12
    kept, again = tmp_path / "kept", tmp_path / "again"
    found = twenty_steps(scenes, kept, "Ascend", "--dtype", "fp16")
    assert found[2] == []
    twenty_steps(scenes, again, "Ascend", "--dtype", "fp16", "--recompute")
    saved = f"checkpoints/step_{STEPS:08d}"
    files = [file.relative_to(kept) for file in (kept / saved).rglob("*.safetensors")]
    assert len(files) == 3
    for file in files:
        assert (again / file).read_bytes() == (kept / file).read_bytes(), file


@pytest.mark.slow
def test_twenty_steps_of_an_adapter_of_sigma_mini(scenes, tmp_path):
    options = "--lora-rank", 8, "--learning-rate", 1e-3
    expected = twenty_steps(scenes, tmp_path / "cpu", "CPU", *options)
    found = twenty_steps(scenes, tmp_path / "host", "Ascend", "--dtype", "fp16", *options)
    of_losses, of_norms = apart(found, expected)
    assert found[2] == [] and of_losses < 0.01 and of_norms < 0.01


def losses(found, expected, limit):
    """Hold the losses of steps to others, and print how far they are apart."""
    apart = np.abs(found[:, 0] / expected[:, 0] - 1).max()
    print(f"losses apart by {apart:.1e}, limit {limit:.1e}")
    assert apart < limit

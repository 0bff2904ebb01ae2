"""What tools/train.py says of wrong options and damaged runs: one line that names them; what a run leaves to read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_runs import (
    TRAIN,
    assert_same,
    checkpoint,
    log_lines,
    options,
    run_here,
    square_features,
    stored,
    tiny_dit,
    write_features,
    write_network,
)

from mindsigma.data.resolution import Resolution
from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.training import checkpoints
from mindsigma.training.checkpoints import read_state
from mindsigma.training.manifest import sealed
from mindsigma.training.run_log import Report, read_log, smoothed
from mindsigma.training.run_options import build_parser
from mindsigma.weights.formats.safetensors_file import read_safetensors
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of a tiny network and of features."""
    folder = tmp_path_factory.mktemp("data")
    return write_network(folder / "network"), square_features(folder / "features", 6)


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """Folder of a finished run of three steps."""
    output = tmp_path_factory.mktemp("done") / "run"
    run(data, output)
    return output


def run(folders, output, stop=lambda: False, **changes):
    """Train in this process; the Trainer afterwards."""
    changes = {"optimizer": "adamw", "steps": 3, "save_every": 1, **changes}
    return run_here(build_parser().parse_args, folders, output, stop, **changes)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"keep": 0}, "--keep must be at least 1"),
        ({"validation_batches": 0}, "--validation-batches must be at least 1"),
        ({"max_norm": "nan"}, "--max-norm must be a number of at least 0"),
        ({"learning_rate": -1}, "--learning-rate must be a number of at least 0"),
        ({"learning_rate": "inf"}, "--learning-rate must be a number of at least 0"),
        ({"max_bad_images": -1}, "--max-bad-images must be a number of at least 0"),
        ({"seed": -1}, "--seed must be a number of at least 0"),
        ({"loss_scale": -2}, "--loss-scale must be a number of at least 0"),
        ({"warmup": 6, "steps": 6, "lr_schedule": "cosine"}, "more steps"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\)"),
        ({"betas": 0.9}, "betas of adamw are 2 numbers"),
        ({"caption_dropout": 1.5}, "caption_dropout must lie in 0 ... 1"),
        ({"snr_gamma": 0, "loss_weighting": "min-snr"}, "gamma of min-snr"),
        ({"snr_loss": True, "loss_weighting": "min-snr"}, "choose one of the two"),
        ({"data": "nowhere"}, "nowhere"),
        ({"model": "nowhere"}, "nowhere"),
        ({"components": "nowhere"}, "nowhere"),
        ({"fresh": True, "grow_to": 128}, "--fresh"),
        ({"resolution": 128}, "features are of"),
        ({"resolution": 100}, "multiple of 16"),
        ({"max_length": 9}, "extract again with --max-length 9"),
        ({"batch_size": 7, "incomplete": "drop"}, "smaller batch"),
        ({"flip": 0.5}, "cannot be mirrored"),
        ({"validation_data": "nowhere"}, "nowhere"),
        ({"model": "sigma-mini", "dtype": "bf16"}, "no bf16"),
        ({"kv_compression": "conv:2"}, "SAMPLING:FACTOR:LAYERS"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_options(data, tmp_path, changes, said):
    with pytest.raises(MindSigmaError, match=said) as caught:
        run(data, tmp_path / "run", **changes)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("state.json"))


def test_captions_of_another_width(data, tmp_path):
    network = write_network(tmp_path / "network", caption_channels=64)
    with pytest.raises(MindSigmaError, match="takes captions of 64 channels, T5's states have 256"):
        run((network, data[1]), tmp_path / "run")


def test_output_is_a_file(data, tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(MindSigmaError, match="run"):
        run(data, tmp_path / "run")


def test_one_line_and_exit_code(data, tmp_path):
    """Of the program, for a known error, an unknown option and a wrong key of a config."""
    config = tmp_path / "config.yaml"
    config.write_text("batch-sise: 3\n")
    for arguments, said in (
        (options(data[0], "nowhere", tmp_path / "run"), "error: nowhere"),
        (options(*data, tmp_path / "run", config=config), "unknown key 'batch-sise'"),
    ):
        result = subprocess.run([sys.executable, TRAIN, *arguments], capture_output=True, text=True, timeout=120)
        lines = result.stderr.splitlines()
        assert result.returncode == 2 and len(lines) == 1 and said in lines[0], result.stderr


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"optimizer": "lion"}, "--optimizer 'adamw', not 'lion'"),
        ({"optimizer": "lion"}, "the optimiser's states and averages in the checkpoint belong to it"),
        ({"batch_size": 2}, "a batch .* of 4, not 2"),
        ({"seed": 1}, "--seed 43, not 1; batches and noise follow from it"),
        ({"ema_decay": 0.0}, "--ema-decay 0.9, not 0.0"),
        ({"caption_dropout": 0.2}, "--caption-dropout 0.1, not 0.2"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_resuming_otherwise(data, done, changes, said):
    before = {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}
    with pytest.raises(MindSigmaError, match=said) as caught:
        run(data, done, **changes)
    assert "--overwrite" in str(caught.value)
    assert before == {path: path.read_bytes() for path in done.rglob("*") if path.is_file()}


def test_resuming_with_other_data(data, done, tmp_path):
    other = square_features(tmp_path / "features", 7)
    with pytest.raises(MindSigmaError, match="data .* of the fingerprint"):
        run((data[0], other), done)


def test_what_may_change_is_recorded(data, done, tmp_path, capsys):
    """Learning rate, its schedule, the steps, the save interval: used from there on, told, and in the checkpoints."""
    output = tmp_path / "run"
    shutil.copytree(done, output)
    changes = {"learning_rate": 5e-4, "lr_schedule": "linear", "steps": 5, "save_every": 2}
    run(data, output, **changes)
    assert "changed after step 3: learning-rate from 0.001 to 0.0005" in capsys.readouterr().out
    rates = [line["lr"] for line in log_lines(output)]
    assert rates == [1e-3] * 3 + [pytest.approx(5e-4 / 5), 0.0]
    assert [path.name for path in sorted((output / "checkpoints").glob("step_*"))] == [
        f"step_{step:08d}" for step in (2, 3, 4, 5)
    ][-3:]
    state = read_state(checkpoint(output, 5))
    assert state["identity"]["learning_rate"] == 5e-4 and state["plan"] == {"steps": 5, "save_every": 2}
    assert [(one["step"], one["option"], one["from"], one["to"]) for one in state["changes"]] == [
        (3, "learning_rate", 1e-3, 5e-4),
        (3, "lr_schedule", "constant", "linear"),
        (3, "steps", 3, 5),
        (3, "save_every", 1, 2),
    ]
    run(data, output, **{**changes, "steps": 6})  # earlier changes stay on record
    assert [one["option"] for one in read_state(checkpoint(output, 6))["changes"]][-1] == "steps"
    assert len(read_state(checkpoint(output, 6))["changes"]) == 5
    card = (checkpoint(output, 6) / "README.md").read_text()
    assert "| steps | 6 of 6 |" in card and "learning_rate: 0.001 to 0.0005" in card and "network" in card
    assert "tools/generate.py" in card and card.startswith("---\nlibrary_name:")


def test_added_data(data, done, tmp_path, capsys):
    """New records are refused with the flag that accepts them; with it the run goes on with all, and again."""
    more = square_features(tmp_path / "features", 9)
    output = tmp_path / "run"
    shutil.copytree(done, output)
    with pytest.raises(MindSigmaError, match="3 records are new, e.g. 6.png: remove them, or give --accept-new-data"):
        run((data[0], more), output, steps=4)
    trainer = run((data[0], more), output, steps=4, accept_new_data=True)
    assert trainer.step == 4 and len(trainer.records.sizes) == 9
    assert "3 records are new; the batches from here on are drawn from all" in capsys.readouterr().out
    assert [one["option"] for one in read_state(checkpoint(output, 4))["changes"]] == ["data", "steps"]
    assert run((data[0], more), output, steps=5).step == 5  # they belong to the run now
    with pytest.raises(MindSigmaError, match="3 of 9 records|records are gone|data .* of the fingerprint"):
        shutil.rmtree(output / "checkpoints" / "step_00000005")
        shutil.rmtree(output / "checkpoints" / "step_00000004")
        run((data[0], more), output, steps=4)


def test_same_batch_from_other_micro_batches(data, done, tmp_path):
    """A finished run is left as it is; one with more steps goes on, with the batch divided in another way."""
    shutil.copytree(done, tmp_path / "run")
    trainer = run(data, tmp_path / "run", batch_size=2, accumulation=2)
    assert trainer.step == 3
    assert_same(checkpoint(tmp_path / "run", 3), checkpoint(done, 3))
    run(data, tmp_path / "run", batch_size=2, accumulation=2, steps=4)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "run" / "options.json").read_text())["steps"] == 4


@pytest.mark.parametrize(
    "name", ["state.json", "states-0.safetensors", "dit/model.safetensors", "ema/model.safetensors"]
)
def test_damaged_checkpoint(data, done, tmp_path, name):
    """The file is named, and that the checkpoint before can be used; it can."""
    output = tmp_path / "run"
    shutil.copytree(done, output)
    file = checkpoint(output, 3) / name
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(MindSigmaError, match="go on from step_00000002") as caught:
        run(data, output)
    assert str(file) in str(caught.value) and f"remove {checkpoint(output, 3)}" in str(caught.value)
    assert "\n" not in str(caught.value)
    shutil.rmtree(checkpoint(output, 3))
    run(data, output)
    assert_same(checkpoint(output, 3), checkpoint(done, 3))


def change_state(folder, seal=True, **changes):
    """Write other values into a checkpoint's state.json, None to take one away; with a seal that fits, or without."""
    state = {**read_state(folder), **changes}
    del state["sha256"]
    state = {name: value for name, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(sealed(state) if seal else state))


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def rewritten(file, name, value):
    """The safetensors file with another first value of a tensor."""
    arrays = {key: np.array(array) for key, array in read_safetensors(file)[0].items()}
    arrays[name].reshape(-1)[0] = value
    specs = [TensorSpec(key, array.dtype, array.shape) for key, array in arrays.items()]
    write_safetensors(file, specs, arrays.__getitem__)


def linked(file, target):
    """A link in the place of a file."""
    file.unlink()
    file.symlink_to(target)


DAMAGE = {
    "a bit of a state": (lambda one: flip(one / "states-0.safetensors", -9), "states-0.safetensors: is damaged"),
    "a bit of a weight": (lambda one: flip(one / "dit/model.safetensors", -5), "dit/model.safetensors: is damaged"),
    "a bit of an average": (lambda one: flip(one / "ema/model.safetensors", -5), "ema/model.safetensors: is damaged"),
    "a bit of a header": (lambda one: flip(one / "dit/model.safetensors", 300), "dit/model.safetensors: is damaged"),
    "a link to nowhere": (lambda one: linked(one / "ema/config.json", "absent"), "ema/config.json: cannot be read"),
    "a loop": (lambda one: linked(one / "ema/config.json", "config.json"), "ema/config.json: cannot be read"),
    "a space of a config": (lambda one: flip(one / "dit/config.json", 2), "dit/config.json: is damaged"),
    "NaN weights": (
        lambda one: rewritten(one / "dit/model.safetensors", "blocks.0.mlp.fc1.bias", np.nan),
        "dit/model.safetensors: ",
    ),
    "a digit of the state": (
        lambda one: (one / "state.json").write_text((one / "state.json").read_text().replace("64", "65", 1)),
        "state.json: is damaged",
    ),
    "a file of another step": (
        lambda one: shutil.copy(one.with_name("step_00000002") / "states-0.safetensors", one),
        "states-0.safetensors: is damaged, or of another checkpoint",
    ),
    "the state of another step": (
        lambda one: shutil.copy(one.with_name("step_00000002") / "state.json", one),
        "state.json: is of step 2",
    ),
    "a further state": (
        lambda one: shutil.copy(one / "states-0.safetensors", one / "states-1.safetensors"),
        "states-1.safetensors: is no part of this checkpoint",
    ),
    "a link to a folder": (lambda one: (one / "dit/more").symlink_to("/etc"), "dit/more: is no part"),
    "a missing file": (lambda one: (one / "dit/config.json").unlink(), "dit/config.json: is missing"),
    "a longer file": (
        lambda one: (one / "dit/config.json").write_text((one / "dit/config.json").read_text() + " "),
        "dit/config.json: has ",
    ),
    "a pipe": (
        lambda one: ((one / "dit/config.json").unlink(), os.mkfifo(one / "dit/config.json")),
        "dit/config.json: not a regular file",
    ),
    "an identity of another type": (lambda one: change_state(one, identity=[1]), "state.json: not the state of a run"),
    "a truth for a step": (lambda one: change_state(one, step=True), "state.json: not the state of a run"),
    "a list of files": (lambda one: change_state(one, files=["dit"]), "state.json: not the state of a run"),
    "files elsewhere": (
        lambda one: change_state(one, files={"../../../x": [1, "0" * 64]}),
        "state.json: not the state of a run",
    ),
    "no object": (lambda one: (one / "state.json").write_text("[3]"), "state.json: the state of a run is not a JSON"),
    "a deep state": (lambda one: (one / "state.json").write_text("[" * 10**5), "state.json: "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_named(done, tmp_path, damage):
    """Whatever it is, before a weight is read, with the earlier checkpoint that is whole: step 2 is not, here."""
    shutil.copytree(done / "checkpoints", tmp_path / "run")
    change, words = DAMAGE[damage]
    change(tmp_path / "run" / "step_00000003")
    flip(tmp_path / "run" / "step_00000002" / "states-0.safetensors", -1)
    kept = checkpoints.RunCheckpoints(tmp_path / "run", 3, Collectives(Ranks()))
    with pytest.raises(MindSigmaError) as caught:
        kept.restore(kept.latest(), None)
    message = str(caught.value)
    assert f"{tmp_path}/run/step_00000003/{words}" in message
    assert message.endswith(
        f"remove {tmp_path}/run/step_00000003 and {tmp_path}/run/step_00000002 to go on from step_00000001, "
        "which is whole"
    )
    assert message.isprintable()


@pytest.mark.parametrize(
    "file,name",
    [("dit/model.safetensors", "blocks.0.mlp.fc1.bias"), ("states-0.safetensors", "m:blocks.0.mlp.fc1.bias")],
)
def test_checkpoint_without_checksums(data, done, tmp_path, file, name):
    """One of an earlier release is read, with a word; what is no number is refused all the same."""
    output = tmp_path / "run"
    shutil.copytree(done, output)
    change_state(checkpoint(output, 3), seal=False, files=None)
    names = list(read_safetensors(checkpoint(output, 3) / file)[0])
    name = next(one for one in names if name.split(":")[-1] in one)
    with pytest.warns(UserWarning, match="written without checksums"):
        trainer = run(data, output)
    assert trainer.step == 3
    rewritten(checkpoint(output, 3) / file, name, np.inf)
    with pytest.warns(UserWarning), pytest.raises(MindSigmaError, match="is not finite") as caught:
        run(data, output)
    assert f"tensor '{name}'" in str(caught.value)
    assert str(checkpoint(output, 3) / file.split("/")[0]) in str(caught.value)


def test_lock_that_is_none(tmp_path):
    """A pipe is not waited for, a link not followed."""
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(MindSigmaError, match=r".lock: not a regular file"):
        checkpoints.RunCheckpoints(tmp_path, 3, Collectives(Ranks()))
    (tmp_path / ".lock").unlink()
    (tmp_path / "precious").write_text("x")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(MindSigmaError, match=r".lock: cannot be written"):
        checkpoints.RunCheckpoints(tmp_path, 3, Collectives(Ranks()))
    assert (tmp_path / "precious").read_text() == "x"


def test_log_of_anything(tmp_path):
    """A log that somebody else wrote is no reason to end a run: what is none of a log's is left out."""
    lines = ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": "low"}', '{"step": true}', '{"step": 2, "loss": 1}']
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, "[" * 10**5, lines[0], ""]))
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0, 1]
    os.truncate(tmp_path / "log.jsonl", 10**12)
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    (tmp_path / "log.jsonl").unlink()
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(MindSigmaError, match="not a regular file"):
        read_log(tmp_path / "log.jsonl")


def test_damaged_old_checkpoint_stops_nobody(data, done, tmp_path):
    """It is neither the best nor in the way of saving."""
    output = tmp_path / "run"
    shutil.copytree(done, output)
    (checkpoint(output, 1) / "state.json").write_text("{")
    run(data, output, steps=4, keep=2)
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == ["step_00000003", "step_00000004"]


def test_every_instant_of_a_save(data, done, tmp_path, monkeypatch):
    """What a kill before any change of the folder would leave: whole checkpoints under their names, and always one."""
    output, seen = tmp_path / "run", []
    own = (checkpoints.RunCheckpoints.save, shutil.copytree, os.replace, os.fsync, os.unlink, os.rmdir, Path.mkdir)
    save, copytree, *functions = own
    saving = []

    def watched(function):
        def wrapped(*arguments, **keywords):
            if saving and saving[0] is not None:
                step, saving[0] = saving[0], None  # copying changes folders, too
                copytree(output / "checkpoints", tmp_path / f"instant{len(seen)}")
                seen.append(step)
                saving[0] = step
            return function(*arguments, **keywords)

        return wrapped

    def saved(self, step, *arguments):
        saving[:] = [step]
        try:
            return save(self, step, *arguments)
        finally:
            saving.clear()

    monkeypatch.setattr(checkpoints.RunCheckpoints, "save", saved)
    for owner, function in zip((os, os, os, os, Path), functions):
        monkeypatch.setattr(owner, function.__name__, watched(function))
    run(data, output, keep=1)
    monkeypatch.undo()
    assert len(seen) > 40 and set(seen) == {1, 2, 3}
    for i, step in enumerate(seen):
        complete = sorted((tmp_path / f"instant{i}").glob("step_*"))
        assert complete or step == 1
        for folder in complete:
            assert_same(folder, done / "checkpoints" / folder.name)


def test_what_has_the_name_of_a_new_checkpoint(data, done, tmp_path, monkeypatch):
    """An incomplete one passed over stays until the new one has its name, also where that fails or a kill comes."""
    output = tmp_path / "run"
    shutil.copytree(done, output)
    old = checkpoint(output, 4)
    shutil.copytree(checkpoint(output, 2), old)
    (old / "state.json").unlink()
    before = {path.name: path.read_bytes() for path in old.rglob("*.safetensors")}
    replace = os.replace

    def failing(source, target):
        if str(source).endswith(f".{old.name}.part"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(MindSigmaError, match="No space left"):
        patch.setattr(os, "replace", failing)
        run(data, output, steps=4)
    assert {path.name: path.read_bytes() for path in old.rglob("*.safetensors")} == before
    old.rename(old.with_name(f".{old.name}.old"))  # as a kill between the two renames leaves it
    checkpoints.RunCheckpoints(output / "checkpoints", 3, Collectives(Ranks()))
    assert {path.name: path.read_bytes() for path in old.rglob("*.safetensors")} == before
    shutil.rmtree(old)
    old.symlink_to(tmp_path)  # of a link only itself goes
    run(data, output, steps=4)
    assert read_state(old)["step"] == 4 and not old.is_symlink() and tmp_path.is_dir()
    assert not [path.name for path in (output / "checkpoints").iterdir() if path.suffix in (".old", ".part", ".gone")]


def test_overwrite_starts_anew(data, done, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(done, output)
    run(data, output, overwrite=True, steps=2)
    assert [line["step"] for line in log_lines(output)] == [1, 2]
    assert_same(checkpoint(output, 2), checkpoint(done, 2))


def test_best_checkpoint_is_kept(data, tmp_path, monkeypatch):
    """The one of the lowest held-out loss, besides the last; the loss at step 0 is not logged twice by a new start."""
    output = tmp_path / "run"
    held_out = {"validation_data": data[1], "validate_every": 1, "validation_points": 1, "validation_batches": 1}
    found = {2: 0.5}
    from mindsigma.training import trainer

    class Fixed(trainer.HeldOutLoss):
        def __call__(self, training):
            super().__call__(training)
            step = int(training.controls.asnumpy()[6])
            return {"validation_loss": found.get(step, 1.0 + step)}

    monkeypatch.setattr(trainer, "HeldOutLoss", Fixed)
    run(data, output, stop=lambda: True, steps=5, keep=1, **held_out)
    shutil.rmtree(checkpoint(output, 1))
    run(data, output, steps=5, keep=1, **held_out)
    assert sorted(path.name for path in (output / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000005"]
    lines = log_lines(output)
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5]


def test_held_out_loss_disturbs_nothing(data, done, tmp_path):
    """A run that measures it has the weights of one that does not."""
    held_out = {"validation_data": data[1], "validate_every": 2, "validation_points": 2}
    run(data, tmp_path / "run", **held_out)
    assert_same(checkpoint(tmp_path / "run", 3), checkpoint(done, 3))
    losses = [line["validation_loss"] for line in log_lines(tmp_path / "run") if "validation_loss" in line]
    assert len(losses) == 3 and np.isfinite(losses).all() and len(set(losses)) == 3


def test_too_many_overflows_end_the_run(data, tmp_path):
    """With one line; the last checkpoint is that of the weights before."""
    network = tmp_path / "network"
    write_network(network)
    features = square_features(tmp_path / "features", 6)
    for file in (features / "samples").rglob("*.safetensors"):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        values = np.full((len(content) - start) // 4, np.nan, np.float32)  # moments and states are fp32
        file.write_bytes(content[:start] + values.tobytes())
    with pytest.raises(MindSigmaError, match="not finite 2 times in a row") as caught:
        run((network, features), tmp_path / "run", max_skipped=2, loss_scale=16.0)
    assert "\n" not in str(caught.value)
    last = stored(checkpoint(tmp_path / "run", 1))
    for parameter in tiny_dit().trainable_params():
        np.testing.assert_array_equal(last[f"dit/{parameter.name}"], parameter.asnumpy())
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])["loss_scale"] == 8


def test_buckets_that_a_batch_does_not_fill(data, tmp_path):
    features = write_features(tmp_path / "features", [(256, 256), (512, 128), (128, 512)], Resolution(256, True))
    wrong = {"resolution": 256, "multi_scale": True, "batch_size": 2, "incomplete": "drop"}
    with pytest.raises(MindSigmaError, match="every bucket has fewer records than a batch of 2"):
        run((data[0], features), tmp_path / "run", **wrong)


def test_options_file(done):
    stored_options = json.loads((done / "options.json").read_text())
    assert stored_options["optimizer"] == "adamw" and stored_options["learning_rate"] == 1e-3
    assert len((done / "options.json").read_text().splitlines()) > 50, "one option a line"


def test_log_that_a_kill_cut_off(tmp_path):
    """The cut line, lines beyond the checkpoint and lines of no step are forgotten; a start from 0 begins anew."""
    lines = [{"step": 1, "loss": 1.0}, {"loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 1.25}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    with Report(tmp_path, 5, start=2, tensorboard=False):
        pass
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2]
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    with Report(tmp_path, 5, tensorboard=False):
        pass
    assert read_log(tmp_path / "log.jsonl") == []


def test_smoothing():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert smoothed([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])

"""Checkpoints that a thread writes: of the moment of the save, complete or absent, whatever is killed when."""

import shutil
import threading

import numpy as np
import pytest
from killing import killed_everywhere

from mindsigma.distributed import Collectives, Ranks
from mindsigma.errors import MindSigmaError
from mindsigma.training.checkpoints import Contents, Copied, RunCheckpoints, read_state
from mindsigma.training.manifest import check_files
from mindsigma.weights.formats.safetensors_file import read_safetensors


class Learner:
    """Writes one array; may wait before, or fail."""

    average = "ema"

    def __init__(self, array, go=None, fault=None):
        self.named, self.go, self.fault = {"weight": Copied(array)}, go, fault

    def write(self, path, values=None):
        if self.go:
            assert self.go.wait(30)
        if self.fault:
            raise MindSigmaError(self.fault)
        np.save(path / "weight.npy", (values or self.named)["weight"].asnumpy())


def contents_of(weight, state, **options):
    return Contents({"dit": (Learner(weight, **options), None)}, {"m": Copied(state)})


def whole(folder):
    """Steps of the checkpoints of which every file is as it was written."""
    checkpoints = RunCheckpoints(folder, 3, Collectives(Ranks()))
    for step in checkpoints.steps():
        path = folder / f"step_{step:08d}"
        check_files(path, read_state(path)["files"], "state.json")
    return checkpoints.steps()


def test_training_goes_on_while_a_save_is_written(tmp_path):
    """The next steps change the weights; the checkpoint holds those of its step, and is absent until it is whole."""
    weight, state, go = np.full(5, 1.0, np.float32), np.full(3, 2.0, np.float32), threading.Event()
    checkpoints = RunCheckpoints(tmp_path, 3, Collectives(Ranks()))
    path = checkpoints.save(4, contents_of(weight, state, go=go), {}, background=True)
    weight += 7
    state += 7
    assert checkpoints.steps() == [] and not path.exists()
    go.set()
    checkpoints.finish()
    assert checkpoints.steps() == [4]
    assert np.load(path / "dit" / "weight.npy").tolist() == [1.0] * 5
    assert read_safetensors(path / "states-0.safetensors")[0]["m"].tolist() == [2.0] * 3
    checkpoints.save(5, contents_of(weight, state), {}, background=True)
    checkpoints.save(6, contents_of(weight, state), {}, background=True)  # waits for the one before
    checkpoints.finish()
    assert checkpoints.steps() == [4, 5, 6]


def test_what_went_wrong_is_told(tmp_path):
    checkpoints = RunCheckpoints(tmp_path, 3, Collectives(Ranks()))
    checkpoints.save(
        1, contents_of(np.ones(2, np.float32), np.ones(2, np.float32), fault="no space"), {}, background=True
    )
    with pytest.raises(MindSigmaError, match="no space"):
        checkpoints.finish()
    checkpoints.finish()
    assert checkpoints.steps() == [] and not list(tmp_path.glob(".*.part"))


def test_killed_at_every_change_of_the_files(tmp_path):
    folder = tmp_path / "run"
    RunCheckpoints(folder, 3, Collectives(Ranks())).save(
        1, contents_of(np.ones(2, np.float32), np.ones(2, np.float32)), {}
    )
    start = tmp_path / "start"
    shutil.copytree(folder, start)

    def save():
        checkpoints = RunCheckpoints(folder, 3, Collectives(Ranks()))
        checkpoints.save(2, contents_of(np.ones(4, np.float32), np.ones(4, np.float32)), {}, background=True)
        checkpoints.finish()

    found = []
    for _ in killed_everywhere(save):
        found.append(whole(folder))
        shutil.rmtree(folder)
        shutil.copytree(start, folder)
    assert found[0] == [1] and found[-1] == [1, 2] and all(steps in ([1], [1, 2]) for steps in found)
    assert whole(folder) == [1, 2]

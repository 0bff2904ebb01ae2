"""Checkpoints of a run: complete or absent, whatever is killed when; the last ones and the best are kept.

checkpoints/step_00000200/      renamed to this name when all is written
    dit/ or adapter.safetensors     what the run makes, ready for tools/generate.py
    ema/ or adapter_ema.safetensors its moving average, if kept
    states-0.safetensors, ...       optimiser and controls; with ZeRO each process writes what it owns
    state.json                      step, options, what the data were; written last
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.checkpoints import open_checkpoint
from mindsigma.checkpoints.atomic import naming, write_json
from mindsigma.checkpoints.safetensors_writer import write_safetensors
from mindsigma.checkpoints.tensor_stream import TensorSpec
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json

NAME = re.compile(r"step_(\d{8,})")
UNFINISHED = re.compile(r"\.step_(\d{8,})\.(part|gone)")
STATE = "state.json"
LOCK = ".lock"
FP32 = np.dtype(np.float32)


def folder_name(step):
    """Name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


class RunCheckpoints:
    """The checkpoints folder of a run.

    Args:
        folder: Path; made if absent.
        keep: number of latest checkpoints that are kept, besides the best.
        collectives: Collectives of the run.
    """

    def __init__(self, folder, keep, collectives):
        if keep < 1:
            raise MindSigmaError(f"keep must be at least 1, not {keep}")
        self.folder, self.keep, self.collectives = Path(folder), keep, collectives
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if collectives.ranks.first:
            self._lock()

    def _lock(self):
        """Keep other runs out of the folder until this process ends, however it ends."""
        with naming(self.folder):
            self._held = open(self.folder / LOCK, "wb")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise MindSigmaError(
                f"{self.folder.parent}: another process is training there; wait for it, or choose another --output"
            ) from None
        except OSError:  # a file system without locks
            pass

    def steps(self):
        """Steps of the complete checkpoints, ascending."""
        found = [NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if (entry / STATE).is_file()]
        return sorted(int(match[1]) for match in found if match)

    def clear(self):
        """Remove all checkpoints."""
        self.collectives.barrier()
        if self.collectives.ranks.first:
            # The latest last: a kill in between must not leave a run that seems to have ended early.
            for step in self.steps():
                self._remove(step)
        self.collectives.barrier()

    def latest(self):
        """Path of the latest complete checkpoint, the same for every process, or None.

        Raises MindSigmaError on every process if they do not see the same folder.
        """
        self.collectives.barrier()
        mine = max(self.steps(), default=-1)
        if not self.collectives.alone:
            first = int(self.collectives.from_rank(0, [Tensor([mine], ms.int32)])[0].asnumpy()[0])
            if self.collectives.total([mine != first])[0]:
                raise MindSigmaError(
                    f"{self.folder}: the processes see different checkpoints there; --output must be a folder that "
                    "all nodes share"
                )
        return self.folder / folder_name(mine) if mine >= 0 else None

    def save(self, step, learner, training, state):
        """Write a checkpoint; every process calls it. Returns its path.

        Args:
            step: number of steps done.
            learner: WholeLearner or AdapterLearner.
            training: TrainingStep.
            state: dict for state.json; `validation_loss` in it decides which is the best.
        """
        first = self.collectives.ranks.first
        final = self.folder / folder_name(step)
        part = self.folder / f".{folder_name(step)}.part"
        try:
            with naming(part):
                self._write(part, step, learner, training, state)
                self.collectives.barrier()
                if first:
                    _sync(part)
                    self._remove(step)  # left where an unreadable checkpoint was passed over
                    os.replace(part, final)
                    _sync(self.folder)
                    self._tidy()
        except BaseException:
            if first:
                shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
            raise
        self.collectives.barrier()
        return final

    def _write(self, part, step, learner, training, state):
        ranks = self.collectives.ranks
        if ranks.first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        self.collectives.barrier()
        if ranks.first or training.config.zero:
            states = training.own_states()
            write_safetensors(
                part / f"states-{ranks.rank}.safetensors",
                [TensorSpec(name, FP32, tuple(value.shape)) for name, value in states.items()],
                lambda name: states[name].asnumpy(),
                {"rank": str(ranks.rank), "ranks": str(ranks.count)},
            )
        if ranks.first:
            self._write_product(part / learner.product, learner, None)
            if training.ema:
                self._write_product(part / learner.average, learner, training.averages())
            write_json(part / STATE, {"step": step, **state})

    @staticmethod
    def _write_product(path, learner, values):
        if path.suffix == "":
            path.mkdir()
        learner.write(path, values)

    def restore(self, path, learner, training):
        """Set all variables of a run from a checkpoint, written by any number of processes; returns state.json."""
        with self.readable(path):
            return self._restore(path, learner, training)

    @contextlib.contextmanager
    def readable(self, path):
        """Let errors about the files of the checkpoint `path` tell how to go on without it."""
        try:
            yield
        except MindSigmaError as error:
            earlier = [step for step in self.steps() if step < int(NAME.fullmatch(path.name)[1])]
            other = f"go on from {folder_name(earlier[-1])}" if earlier else "start anew"
            raise MindSigmaError(f"{error}; or remove {path} to {other}") from None

    def _restore(self, path, learner, training):
        state = read_state(path)
        learner.read(path / learner.product)
        if training.ema:
            average = path / learner.average
            if not average.exists():
                raise MindSigmaError(f"{path}: has no moving average; resume with --ema-decay 0")
            learner.read(average, training.averages())
        wanted = dict(training.own_states())
        for file in sorted(path.glob("states-*.safetensors")):
            source = open_checkpoint(file)
            for name in [name for name in source.names() if name in wanted]:
                parameter = wanted.pop(name)
                if source.shape(name) != tuple(parameter.shape):
                    raise MindSigmaError(
                        f"{file}: tensor '{name}' has shape {source.shape(name)}, the run needs "
                        f"{tuple(parameter.shape)}; resume with the options that the run was started with"
                    )
                parameter.set_data(Tensor(np.array(source.read(name), np.float32)))
        if wanted:
            raise MindSigmaError(
                f"{path}: has no state '{min(wanted)}'; resume with the optimizer that the run was started with"
            )
        return state

    def _tidy(self):
        """Remove old checkpoints and what killed processes left unfinished."""
        steps = self.steps()
        best = self.best()
        for step in steps[: -self.keep]:
            if step != best:
                self._remove(step)
        for entry in self.folder.iterdir():
            if UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)

    def _remove(self, step):
        """Remove a checkpoint, if it is there: first out of sight, as a kill must not leave half of one."""
        path = self.folder / folder_name(step)
        gone = self.folder / f".{path.name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        if path.exists():
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def best(self):
        """Step of the checkpoint with the lowest validation loss, or None where none was measured."""
        losses = []
        for step in self.steps():
            with contextlib.suppress(MindSigmaError):  # a damaged one is not the best
                loss = read_state(self.folder / folder_name(step)).get("validation_loss")
                if isinstance(loss, float) and np.isfinite(loss):
                    losses.append((loss, step))
        return min(losses)[1] if losses else None


def read_state(path):
    """state.json of a checkpoint folder, a dict."""
    file = Path(path) / STATE
    try:
        state = load_json(file, file.read_bytes(), "the state of a run")
    except OSError as error:
        raise MindSigmaError(f"{file}: cannot be read ({error.strerror}); this is no checkpoint of a run") from None
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise MindSigmaError(f"{file}: not the state of a run")
    return json.loads(json.dumps(state))


def _sync(folder):
    """Bring a folder's entries to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Checkpoints of a run: complete or absent, whatever is killed when; the last ones and the best are kept.

checkpoints/step_00000200/      renamed to this name when all is written
    dit/ or adapter.safetensors     what the run makes, ready for tools/generate.py
    ema/ or adapter_ema.safetensors its moving average, if kept
    fake/ or fake.safetensors       of --method dmd: the score of what the network draws
    README.md                       its model card
    states-0.safetensors, ...       optimiser and controls; with ZeRO each process writes a part
    state.json                      step, options, what the data were, size and SHA-256 of every file; written last
"""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes
from mindsigma.training.distributed import owners
from mindsigma.training.manifest import check_files, check_seal, is_manifest, manifest_of, sealed
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.atomic import naming, sync_entries, write_json
from mindsigma.weights.formats.finite import finite
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec

NAME = re.compile("step_([0-9]{8,9})")
UNFINISHED = re.compile(r"\.step_[0-9]{8,9}\.(part|gone|old)")
OLD = re.compile(r"\.(step_[0-9]{8,9})\.old")
STATE = "state.json"
CARD = "README.md"
LOCK = ".lock"
FP32 = np.dtype(np.float32)
SECONDS = 1800  # that the first process waits at most for what the others write


@dataclass
class Contents:
    """What a checkpoint holds besides state.json.

    Attributes:
        products: name of a file or folder -> (learner that writes and reads it, and dict name -> Parameter or step.Row
            that it is to hold instead of the learner's own Parameters, or None).
        states: name -> Parameter or step.Row of what this process keeps between steps.
        divided: whether the processes keep different states (ZeRO), and maybe products.
        restored: called when the products have been read, or None.
    """

    products: Dict[str, Tuple[Any, Any]]
    states: Dict[str, Any]
    divided: bool = False
    restored: Any = None

    def copy(self, ranks):
        """What this process writes, in memory of its own: the first the products, and each a part of divided states.

        Every process calls it, as they gather what they divide.
        """
        products = {}
        for name, (learner, values) in self.products.items() if ranks.first or self.divided else ():
            arrays = {key: value.asnumpy() for key, value in (values or learner.named).items()}
            if ranks.first:
                products[name] = learner, {key: Copied(array.copy()) for key, array in arrays.items()}
        sizes = [int(np.prod(value.shape)) for value in self.states.values()]
        writers = owners(sizes, ranks.count) if self.divided else [0] * len(sizes)
        states = {}
        for (name, value), writer in zip(self.states.items(), writers):
            if self.divided or ranks.first:
                array = value.asnumpy()
                if writer == ranks.rank:
                    states[name] = Copied(array.copy())
        return Contents(products, states, self.divided)


class Copied:
    """An array that is read as a Parameter is."""

    def __init__(self, array):
        self._array, self.shape = array, array.shape

    def asnumpy(self):
        """The array."""
        return self._array


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
        self._writer = None
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        if collectives.ranks.first:
            self._lock()
            self._put_back()

    def _lock(self):
        """Keep other runs out of the folder until this process ends, however it ends."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with naming(self.folder / LOCK):
            self._held = open(os.open(self.folder / LOCK, flags, 0o666), "r+b", buffering=0)
        if not stat.S_ISREG(os.fstat(self._held.fileno()).st_mode):
            raise MindSigmaError(f"{self.folder / LOCK}: not a regular file; remove it")
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
        found = []
        for entry in self.folder.iterdir():
            match = NAME.fullmatch(entry.name)
            if match and folder_name(int(match[1])) == entry.name and (entry / STATE).is_file():
                found.append(int(match[1]))
        return sorted(found)

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

    def save(self, step, contents, state, card="", background=False):
        """Write a checkpoint; every process calls it. Returns its path.

        Args:
            step: number of steps done.
            contents: Contents.
            state: dict for state.json; `validation_loss` in it decides which is the best.
            card: text of the model card that lies beside the weights; "" for none.
            background: return when everything is copied, and let a thread write the copies. `finish` waits for it.
        """
        self.finish()
        first = self.collectives.ranks.first
        final = self.folder / folder_name(step)
        part = self.folder / f".{folder_name(step)}.part"
        with naming(part):
            if first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir()
        self.collectives.barrier()
        if background or contents.divided:
            contents = contents.copy(self.collectives.ranks)
        if background:
            self._writer = Writer(lambda: self._write(part, final, contents, {"step": step, **state}, card))
        else:
            self._write(part, final, contents, {"step": step, **state}, card)
            self.collectives.barrier()
        return final

    def finish(self):
        """Wait until what is written in the background has been written; raises what went wrong with it."""
        writer, self._writer = self._writer, None
        if writer:
            writer.result()

    def _write(self, part, final, contents, state, card):
        """Write this process's part of a checkpoint; the first one waits for the others' and gives it its name.

        The processes meet by their files alone, as the collectives may be in use.
        """
        first = self.collectives.ranks.first
        try:
            with naming(part):
                self._write_own(part, contents)
                if first and card:
                    (part / CARD).write_text(card, encoding="utf-8")
                if first:
                    self._wait_for_others(part, contents)
                    # Read back, as the processes of other nodes wrote some of the files.
                    write_json(part / STATE, sealed({**state, "files": manifest_of(part)}))
                    for folder in [part, *(entry for entry in part.iterdir() if entry.is_dir())]:
                        sync_entries(folder)
                    self._put(part, final)
                    self._tidy()
        except BaseException:
            if first:
                shutil.rmtree(part, ignore_errors=True)  # a full disk needs the space
            raise

    def _write_own(self, part, contents):
        ranks = self.collectives.ranks
        if ranks.first or contents.divided:
            states = contents.states
            write_safetensors(
                part / f"states-{ranks.rank}.safetensors",
                [TensorSpec(name, FP32, tuple(value.shape)) for name, value in states.items()],
                lambda name: states[name].asnumpy(),
                {"rank": str(ranks.rank), "ranks": str(ranks.count)},
            )
        if ranks.first:
            for name, (learner, values) in contents.products.items():
                path = part / name
                if path.suffix == "":
                    path.mkdir()
                learner.write(path, values)

    def _wait_for_others(self, part, contents):
        """Until every process has written its states."""
        end = time.monotonic() + SECONDS
        count = self.collectives.ranks.count if contents.divided else 1
        wanted = [part / f"states-{rank}.safetensors" for rank in range(count)]
        while missing := [path for path in wanted if not path.is_file()]:
            if time.monotonic() > end:
                raise MindSigmaError(f"{missing[0]}: was not written within {SECONDS} s by its process")
            time.sleep(0.02)

    def restore(self, path, contents):
        """Set all variables of a run from a checkpoint, written by any number of processes; returns state.json."""
        with self.readable(path):
            return self._restore(path, contents)

    @contextlib.contextmanager
    def readable(self, path):
        """Let errors about the files of the checkpoint `path` tell how to go on without it."""
        try:
            yield
        except MindSigmaError as error:
            earlier = [
                self.folder / folder_name(step) for step in self.steps() if step < int(NAME.fullmatch(path.name)[1])
            ]
            whole = next((one for one in reversed(earlier) if _is_whole(one)), None)
            bad = [path, *earlier[earlier.index(whole) + 1 :]] if whole else [path, *earlier]
            remedy = f"go on from {whole.name}, which is whole" if whole else "start anew"
            names = " and ".join(map(str, bad[:4])) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
            raise MindSigmaError(f"{error}; or remove {names} to {remedy}") from None

    def _restore(self, path, contents):
        state = read_state(path)
        if "files" in state:
            check_files(path, state["files"], STATE)
        elif self.collectives.ranks.first:
            warnings.warn(f"{path}: was written without checksums, so that damage may go unseen", stacklevel=2)
        for name, (learner, values) in contents.products.items():
            if name == learner.average and not (path / name).exists():
                raise MindSigmaError(f"{path}: has no moving average; resume with --ema-decay 0")
            learner.read(path / name, values)
        if contents.restored:
            contents.restored()
        states = contents.states
        wanted = dict(states)
        for file in sorted(path.glob("states-*.safetensors")):
            source = open_checkpoint(file)
            for name in source.names():
                if name not in states:
                    raise MindSigmaError(
                        f"{file}: holds a state '{one_line(name)}' that this run does not have; resume with the "
                        "options that the run was started with"
                    )
                parameter = wanted.pop(name, None)
                if parameter is None:  # each process wrote what they share
                    continue
                if source.shape(name) != tuple(parameter.shape):
                    raise MindSigmaError(
                        f"{file}: tensor '{name}' has shape {source.shape(name)}, the run needs "
                        f"{tuple(parameter.shape)}; resume with the options that the run was started with"
                    )
                parameter.set_data(Tensor(np.array(finite(file, name, source.read(name)), np.float32)))
        if wanted:
            raise MindSigmaError(
                f"{path}: has no state '{min(wanted)}'; resume with the optimizer that the run was started with"
            )
        return state

    def _put(self, part, final):
        """Give a whole checkpoint its name; what has that name, as an unreadable one passed over, goes when it has."""
        old = self.folder / f".{final.name}.old"
        _discard(old)
        if os.path.lexists(final):
            os.replace(final, old)
        try:
            os.replace(part, final)
        except OSError:
            if os.path.lexists(old):
                os.replace(old, final)
            raise
        sync_entries(self.folder)
        _discard(old)

    def _put_back(self):
        """Undo what a kill left of `_put` between its two renames."""
        for entry in self.folder.iterdir():
            match = OLD.fullmatch(entry.name)
            if match and not os.path.lexists(self.folder / match[1]):
                with naming(entry):
                    os.replace(entry, self.folder / match[1])

    def _tidy(self):
        """Remove old checkpoints and what killed processes left unfinished."""
        steps = self.steps()
        best = self.best()
        for step in steps[: -self.keep]:
            if step != best:
                self._remove(step)
        for entry in self.folder.iterdir():
            if UNFINISHED.fullmatch(entry.name):
                _discard(entry)

    def _remove(self, step):
        """Remove a checkpoint, if it is there: first out of sight, as a kill must not leave half of one."""
        path = self.folder / folder_name(step)
        gone = self.folder / f".{path.name}.gone"
        _discard(gone)
        if os.path.lexists(path):
            os.replace(path, gone)
            _discard(gone)

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
    """state.json of a checkpoint folder (Path): a dict with `step`, `identity` (a dict) and, but in old ones, `files`.

    Raises MindSigmaError: it is damaged, or of another step than the folder's name tells.
    """
    file = Path(path) / STATE
    state = load_json(file, read_bytes(file), "the state of a run")
    check_seal(file, state)
    step, identity = state.get("step"), state.setdefault("identity", {})
    if type(step) is not int or not isinstance(identity, dict) or not is_manifest(state.get("files", {})):
        raise MindSigmaError(f"{file}: not the state of a run")
    if folder_name(step) != Path(path).name:
        raise MindSigmaError(f"{file}: is of step {step}, not of {Path(path).name}")
    return state


class Writer(threading.Thread):
    """A thread that writes, and keeps what went wrong for who waits for it."""

    def __init__(self, write):
        super().__init__(name="checkpoint")
        self._call, self._error = write, None
        self.start()

    def run(self):
        try:
            self._call()
        except BaseException as error:
            self._error = error

    def result(self):
        """Wait, and raise what was raised."""
        self.join()
        if self._error:
            raise self._error


def _is_whole(path):
    """Whether all files of a checkpoint are as they were written; of an old one, whether its state can be read."""
    try:
        state = read_state(path)
        if "files" in state:
            check_files(path, state["files"], STATE)
    except (MindSigmaError, OSError):
        return False
    return True


def _discard(path):
    """Remove a folder with all below it, a file or a link, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()

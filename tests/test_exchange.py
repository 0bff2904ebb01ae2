"""Folders that are replaced: after any error the old files stand there, after any kill the next run mends it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindsigma.errors import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats import atomic, exchange
from mindsigma.weights.formats.atomic import replacing, write_json
from mindsigma.weights.formats.exchange import ASIDE, PLAN, alone_in, recover
from mindsigma.weights.formats.folder_writer import STAGING, is_empty, replacing_files
from mindsigma.weights.formats.safetensors_shards import write_sharded_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec

NAMES = ("a", "b")


def put(folder, number, shard_bytes=8):
    """Two networks of small shards, whose every number is `number`, and a config beside each."""
    arrays = {name: np.full(2, number, np.float32) for name in NAMES}
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in arrays.items()]
    for part in ("dit", "vae"):
        write_sharded_safetensors(folder / part, "model", specs, arrays.__getitem__, {"of": str(number)}, shard_bytes)
        write_json(folder / part / "config.json", {"number": number})
    write_json(folder / "model_index.json", {"number": number})


def state(folder):
    """dict path -> bytes, None of a folder, of all there is in it."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def numbers(folder):
    """The numbers that are read from a network: one, unless it is a mixture. Raises MindSigmaError if unreadable."""
    source = open_checkpoint(folder)
    if set(source.names()) != set(NAMES):
        raise MindSigmaError("some tensors are absent")
    return {float(value) for name in NAMES for value in source.read(name)}


class Killed(BaseException):
    pass


def undone_unless_killed(*arguments, undo=exchange._undo):
    """Of a killed process nothing is left to play the plan backwards."""
    if sys.exc_info()[0] is not Killed:
        undo(*arguments)


class Steps:
    """Counts what changes the disk, and ends the one that is asked for."""

    def __init__(self, monkeypatch):
        self.count, self.fatal, self.error = 0, None, None
        for name in ("replace", "unlink", "mkdir"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self.counted(lambda descriptor: None))  # which takes long

    def counted(self, function):
        def step(*arguments, **options):
            if self.fatal is not None:
                self.count += 1
                if self.count == self.fatal:
                    raise self.error
            return function(*arguments, **options)

        return step

    def end(self, number, error):
        self.count, self.fatal, self.error = 0, number, error


def replace(root, number):
    """What a tool does: all files anew, three shards a network instead of one file."""
    with replacing_files(root, f"run {number}") as place:
        put(place, number)


@pytest.fixture
def target(tmp_path):
    """A folder with old networks, in one file each, and something of the user's."""
    put(tmp_path / "target", 1, shard_bytes=10**6)
    (tmp_path / "target" / "vae" / "notes.txt").write_text("mine")
    return tmp_path / "target"


def test_files_take_their_places_together(target):
    replace(target, 2)
    assert numbers(target / "dit") == numbers(target / "vae") == {2}
    assert not any(path.name.startswith(".") for path in target.rglob("*"))
    assert not (target / "dit" / "model.safetensors").exists()  # else it would stand beside the shards
    assert (target / "vae" / "notes.txt").read_text() == "mine"
    with replacing_files(target, "back") as place:
        put(place, 3, 10**6)
    assert sorted(os.listdir(target / "dit")) == ["config.json", "model.safetensors"]
    assert numbers(target / "dit") == {3}


def test_an_error_at_any_step_leaves_the_old(target, monkeypatch):
    before, steps = state(target), Steps(monkeypatch)
    kept = target.parent / "kept"
    shutil.copytree(target, kept)
    number = refused = 0
    while steps.count >= number:  # as many as there are steps
        number += 1
        steps.end(number, OSError(5, "Input/output error"))
        done = False
        try:
            replace(target, 2)
            done = True  # the step was one of tidying up
        except MindSigmaError as error:
            assert "Input/output error" in str(error) and str(target) in str(error)
            refused += 1
        steps.fatal = None
        if done:
            assert numbers(target / "dit") == numbers(target / "vae") == {2}, number
            shutil.rmtree(target)
            shutil.copytree(kept, target)
        assert state(target) == before, number
    assert refused > 40


def test_a_kill_at_any_step_is_repaired(target, monkeypatch):
    kept = target.parent / "kept"
    shutil.copytree(target, kept)
    steps, seen, number = Steps(monkeypatch), set(), 0
    ended = False
    while not ended:
        number += 1
        shutil.rmtree(target)
        shutil.copytree(kept, target)
        steps.end(number, Killed())
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "_undo", undone_unless_killed)
            patch.setattr(atomic, "_running", lambda pid: False)
            try:
                replace(target, 2)
                ended = True
            except Killed:
                pass
        steps.fatal = None
        read = []
        for part in ("dit", "vae"):
            try:
                read.append(numbers(target / part))
            except MindSigmaError as error:
                assert "run it again" in str(error)
                read.append({0})
        assert read in ([{1}, {1}], [{2}, {2}], [{0}, {0}]), number
        seen.add(min(read[0]))
        replace(target, 3 if number % 2 else 2)  # another, or the same again
        assert numbers(target / "dit") == numbers(target / "vae") == {3 if number % 2 else 2}, number
        assert not [path for path in target.rglob("*") if path.name.startswith(".")], number
    assert seen == {0, 1, 2} and number > 40


def test_a_killed_first_write_counts_as_nothing(tmp_path, monkeypatch):
    steps, number, target = Steps(monkeypatch), 0, tmp_path / "target"
    while steps.count >= number:
        number += 1
        steps.end(number, Killed())
        with monkeypatch.context() as patch:
            patch.setattr(exchange, "_undo", undone_unless_killed)
            with contextlib.suppress(Killed):
                replace(target, 2)
        steps.fatal = None
        if (target / "model_index.json").exists() and not (target / ASIDE / PLAN).exists():
            assert numbers(target / "dit") == numbers(target / "vae") == {2}
            shutil.rmtree(target)
        assert not target.exists() or is_empty(target), number
    assert number > 40


def test_old_files_that_cannot_be_put_back_are_not_lost(target, monkeypatch):
    real, calls = os.replace, []

    def fails(source, place):
        calls.append(source)
        if STAGING in str(source) and "config" in str(source):
            calls.append("broken")
        if "broken" in calls:
            raise OSError(5, "Input/output error")
        real(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(MindSigmaError, match=f"{ASIDE}: mend the cause"), replacing_files(target) as new:
            (new / "config.json").write_text("{}")
            (new / "dit").mkdir()
            (new / "dit" / "config.json").write_text("{}")
    recover(target)
    assert numbers(target / "dit") == {1}
    assert json.loads((target / "dit" / "config.json").read_text()) == {"number": 1}


def test_no_plan_leads_out_of_its_folder(target):
    outside = target.parent / "outside"
    outside.write_text("good")
    (target / "way").symlink_to(target.parent)
    for move in (["x", "../outside"], ["x", str(outside)], ["dit/x", "way/outside"], ["x"], [1, 2]):
        (target / ASIDE).mkdir()
        write_json(target / ASIDE / PLAN, {"made": [], "moves": [[move[-1], move[0]], move]})
        with pytest.raises(MindSigmaError, match="plan.json: not what"):
            recover(target)
        assert outside.read_text() == "good"
        shutil.rmtree(target / ASIDE)
    (target / ASIDE).symlink_to(target.parent)
    with pytest.raises(MindSigmaError, match="no folder of a conversion"):
        replace(target, 2)
    assert outside.exists() and numbers(target / "dit") == {1}


def test_staging_that_is_a_link_is_not_followed(target):
    (target.parent / "elsewhere").mkdir()
    (target.parent / "elsewhere" / "good").write_text("good")
    (target / STAGING).symlink_to(target.parent / "elsewhere")
    with pytest.raises(MindSigmaError, match="no folder of a conversion"):
        replace(target, 2)
    assert os.listdir(target.parent / "elsewhere") == ["good"]


def test_an_interrupt_keeps_what_can_be_gone_on_with(target):
    before = state(target)
    for identity in (None, "the same"):
        with pytest.raises(KeyboardInterrupt), replacing_files(target, identity) as place:
            put(place, 2)
            raise KeyboardInterrupt
        assert (target / STAGING / "dit").is_dir() == (identity is not None)
        assert {path: data for path, data in state(target).items() if not path.startswith(STAGING)} == before


def test_two_processes_are_kept_apart(target):
    with alone_in(target), pytest.raises(MindSigmaError, match="another process is writing there"):
        replace(target, 2)
    assert numbers(target / "dit") == {1}


def test_a_partial_file_in_use_stays(tmp_path, monkeypatch):
    """Not the process's number but the lock tells: another machine may write the same target."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead = tmp_path / f".w.{ended.pid}.part"
    with replacing(tmp_path / "w") as file:
        os.rename(file.name, dead)
        atomic.remove_leftovers(tmp_path, "w")
        assert dead.exists()
        os.rename(dead, file.name)
    dead.write_bytes(b"young")
    with replacing(tmp_path / "w"):
        assert not dead.exists()
    with monkeypatch.context() as patch:
        patch.setattr(atomic.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
        dead.write_bytes(b"young")
        atomic.remove_leftovers(tmp_path, "w")
        assert dead.exists()
        os.utime(dead, (time.time() - 7200,) * 2)
        atomic.remove_leftovers(tmp_path, "w")
        assert not dead.exists()


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "link"):
        with pytest.raises(MindSigmaError, match="no regular file"):
            write_json(tmp_path / name, {})
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link"] and (tmp_path / "link").is_symlink()


def test_is_empty(tmp_path):
    assert is_empty(tmp_path)
    (tmp_path / STAGING).mkdir()
    (tmp_path / ".converting").write_text("half a no")
    (tmp_path / ".config.json.123.part").write_text("{")
    assert is_empty(tmp_path)
    (tmp_path / "dit").mkdir()
    assert not is_empty(tmp_path)
    assert Path(tmp_path / "dit").is_dir()

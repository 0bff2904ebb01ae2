"""How the library of the CPU's kernels is built, kept, and done without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from training_runs import tiny_dit

from mindsigma.backends.cpu import accelerate, is_accelerated, library


def fake_compiler(folder, script):
    path = folder / "compiler"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder; what `library` found before is forgotten."""
    monkeypatch.setenv(library.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    library.library.cache_clear()
    yield tmp_path
    library.library.cache_clear()


def test_without_a_compiler_there_is_a_note_and_the_plain_network(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", str(fresh / "absent"))
    dit = tiny_dit()
    assert accelerate(accelerate(dit)) is dit and not is_accelerated(dit)
    assert capsys.readouterr().err.count("note: no native kernels") == 1


def test_a_failing_compiler_leaves_nothing_behind(fresh, monkeypatch, capsys):
    script = 'test "$1" = --version && exit 0\necho "x.cpp:1: error: unknown flag" >&2\nexit 1\n'
    monkeypatch.setenv("CXX", fake_compiler(fresh, script))
    assert library.library() is None
    assert "unknown flag" in capsys.readouterr().err
    assert [path.name for path in (fresh / "cache").iterdir()] == [".native.lock"]


def test_an_unwritable_cache_is_named(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, "exit 0\n"))
    (fresh / "cache").write_text("a file")
    assert library.library() is None
    assert library.CACHE in capsys.readouterr().err


def test_the_switch_needs_no_words(fresh, monkeypatch, capsys):
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.library() is None
    assert capsys.readouterr().err == ""


def test_two_processes_compile_once(fresh, monkeypatch):
    """The stand-in of a compiler notes each call and takes its time."""
    script = f"""
test "$1" = --version && exit 0
echo >> {fresh}/calls
sleep 1
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""
    compiler = fake_compiler(fresh, script)
    command = [sys.executable, "-c", "from mindsigma.backends.cpu.library import build; print(build())"]
    environment = {**os.environ, "CXX": compiler, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "library\n"
    assert (fresh / "calls").read_text() == "\n"


STAND_IN = """
test "$1" = --version && exit 0
echo >> "{calls}"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def rebuilt(fresh, monkeypatch, change):
    """Whether `change(path, checksum file)` of a library in the cache makes the next process compile it again."""
    calls = fresh / "calls"
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=calls)))
    path = library.build()
    assert (path.read_text(), calls.read_text()) == ("library\n", "\n")
    assert library.build() == path and calls.read_text() == "\n"
    change(path, path.with_name(f"{path.name}.sha256"))
    assert library.build() == path
    assert path.read_text() == "library\n" and path.lstat().st_mode & 0o777 == 0o755
    assert sorted(p.name for p in path.parent.iterdir()) == [".native.lock", path.name, f"{path.name}.sha256"]
    count = calls.read_text()
    assert library.build() == path and calls.read_text() == count
    return count == "\n\n"


SPOILT = {
    "truncated": lambda path, checksum: os.truncate(path, 3),
    "empty": lambda path, checksum: os.truncate(path, 0),
    "of somebody else's": lambda path, checksum: path.write_text("another"),
    "without a checksum": lambda path, checksum: checksum.unlink(),
    "another's checksum": lambda path, checksum: checksum.write_text("0" * 64),
    "a checksum of a gigabyte": lambda path, checksum: os.truncate(checksum, 2**30),
    "a library of a terabyte": lambda path, checksum: os.truncate(path, 2**40),
    "a link": lambda path, checksum: (
        path.rename(path.parents[1] / "x"),
        path.symlink_to(path.parents[1] / "x"),
    ),
    "a pipe": lambda path, checksum: (path.unlink(), os.mkfifo(path)),
    "checksum a pipe": lambda path, checksum: (checksum.unlink(), os.mkfifo(checksum)),
    "writable by a group": lambda path, checksum: path.chmod(0o775),
    "checksum writable by all": lambda path, checksum: checksum.chmod(0o666),
    "leftovers of a kill": lambda path, checksum: (
        path.unlink(),
        (path.parent / ".native-x.so.1.part").write_text("x"),
    ),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_library_is_compiled_again(fresh, monkeypatch, fault):
    assert rebuilt(fresh, monkeypatch, SPOILT[fault])


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")
@pytest.mark.parametrize("which", [0, 1])
def test_another_users_library_is_not_trusted(fresh, monkeypatch, which):
    assert rebuilt(fresh, monkeypatch, lambda *files: os.chown(files[which], 65534, 65534))


def test_a_folder_that_others_can_write_to(fresh, monkeypatch, capsys):
    """The library is compiled for this process alone, with a note; not where a sticky bit protects it."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    cache = fresh / "cache"
    for mode, words in ((0o777, f"other users can write to {cache}"), (0o775, "other users can write"), (0o1777, "")):
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        cache.chmod(mode)
        path = library.build()
        note = capsys.readouterr().err
        assert (path.parent == cache) == (not words)
        assert words in note and (words != "") == ("for this process alone" in note)
        assert path.parent.stat().st_mode & 0o777 in (0o700, 0o777)
    (fresh / "open").mkdir()
    (fresh / "open").chmod(0o777)  # somebody could put another folder in the place of ours
    monkeypatch.setenv(library.CACHE, str(fresh / "open" / "cache"))
    assert library.build().parent not in (fresh / "open" / "cache", cache)
    assert f"other users can write to {fresh / 'open'}" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
def test_another_users_folder_is_not_trusted(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    (fresh / "cache").mkdir()
    os.chown(fresh / "cache", 65534, 65534)
    assert library.build().parent != fresh / "cache"
    assert "belongs to another user" in capsys.readouterr().err
    assert list((fresh / "cache").iterdir()) == []


def test_our_own_folder_is_closed(fresh, monkeypatch):
    """~/.cache/mindsigma that a lax umask left open to the group is mended; a new one is this user's alone."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    monkeypatch.delenv(library.CACHE)
    monkeypatch.setenv("HOME", str(fresh))
    folder = fresh / ".cache" / "mindsigma"
    assert library.build().parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o775)
    assert library.build().parent == folder
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("what", ["link", "pipe"])
def test_a_lock_that_is_none(fresh, monkeypatch, capsys, what):
    """A link is not followed, a pipe not waited for."""
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    (fresh / "cache").mkdir(mode=0o700)
    (fresh / "precious").write_text("x")
    lock = fresh / "cache" / ".native.lock"
    lock.symlink_to(fresh / "precious") if what == "link" else os.mkfifo(lock)
    assert library.library() is None  # what the compiler's stand-in writes is no library, either
    assert capsys.readouterr().err.count("\n") <= 2
    assert (fresh / "precious").read_text() == "x"


def test_what_cannot_be_loaded_is_a_note(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", fake_compiler(fresh, STAND_IN.format(calls=fresh / "calls")))
    assert library.library() is None
    assert "note: no native kernels" in capsys.readouterr().err


def test_another_compiler_makes_another_library(fresh, monkeypatch):
    made = set()
    for version in ("1", "2"):
        script = f'test "$1" = --version && echo {version} && exit 0\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n'
        monkeypatch.setenv("CXX", fake_compiler(fresh, script))
        made.add(library.build())
    assert len(made) == 2
    os.chmod(next(iter(made)), 0o777)  # anyone could have written it: made again
    assert all(library.build() in made for _ in range(2))

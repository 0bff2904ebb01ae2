"""What every tool says when something goes wrong: one printable, bounded line and an exit code, whatever raised it."""

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from mindsigma import command_line, foreign
from mindsigma.errors import LONGEST_MESSAGE, MindSigmaError, bounded, say

ROOT = Path(__file__).parents[1]
NASTY = "a\nerror: b\r\x1b[31m\x07\u202e\ud800\udcff\x85\u2028"
TOOLS = ("convert", "extract_features", "generate", "prepare_data", "train", "web")


@pytest.fixture
def ends(capsys, monkeypatch):
    """ends(main): exit code and lines of stderr of a tool."""
    kept = argparse.ArgumentParser.error, warnings.formatwarning
    monkeypatch.setattr(foreign, "_last", None)

    def run(main):
        with pytest.raises(SystemExit) as caught:
            command_line.run(main)
        return caught.value.code, capsys.readouterr().err.split("\n")

    yield run
    argparse.ArgumentParser.error, warnings.formatwarning = kept


def one_line(code, lines):
    assert code == 2
    assert len(lines) == 2 and lines[1] == ""
    assert lines[0].startswith("error: ") and lines[0].isprintable()
    assert len(lines[0]) < LONGEST_MESSAGE + 100
    return lines[0]


@pytest.mark.parametrize(
    "error",
    [
        MindSigmaError(f"file {NASTY}: wrong"), ValueError(NASTY), KeyError("x" * 10**6), RecursionError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError(5, "Input/output error"), MemoryError(),
        RuntimeError("-" * 50 + "\nMindSpore speaks\n" + "of C++ " * 10**5), AssertionError(), StopIteration(),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_every_error_is_one_line(ends, error):
    def main():
        raise error

    line = one_line(*ends(main))
    assert isinstance(error, MindSigmaError) or f"unexpected {type(error).__name__}" in line


def test_the_last_file_is_named(ends, tmp_path, monkeypatch):
    """Where nobody gave an error the name of a file; and the traceback comes when it is asked for."""
    (tmp_path / "x").write_bytes(b"y")

    def main():
        foreign.read_bytes(tmp_path / "x")
        return {}["absent"]

    assert f"unexpected KeyError: 'absent'; the last file read was {tmp_path}/x; MINDSIGMA_TRACEBACK=1" in one_line(
        *ends(main)
    )
    monkeypatch.setenv("MINDSIGMA_TRACEBACK", "1")
    code, lines = ends(main)
    assert code == 2 and lines[0].startswith("Traceback") and lines[-2].startswith("error: unexpected KeyError")


@pytest.mark.parametrize(
    "flags", [["--steps", NASTY], [f"--{NASTY}"], ["--steps", "9" * 10**6], ["--kind", NASTY * 10**4], ["x" * 10**6]]
)
def test_what_argparse_quotes(ends, flags, monkeypatch):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kind", choices=("a", "b"))
    monkeypatch.setattr(sys, "argv", ["tool", *flags])
    assert "--help lists the options" in one_line(*ends(parser.parse_args))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stpes", "3"], "unrecognized arguments: --stpes; did you mean --steps?"),
        (["x", "--guidance-scal3=4"], "did you mean --guidance-scale?"),
        (["--sampler", "eular"], "; did you mean euler?"),
        (["--zzz"], "unrecognized arguments: --zzz; --help"),
        (["--seed", "many"], "argument --seed: invalid int value: 'many'; --help"),
    ],
)
def test_what_was_meant(ends, flags, words, monkeypatch):
    parser = command_line.parser("Draw.")
    parser.add_argument("prompt", nargs="*")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--sampler", choices=("dpm", "euler"))
    monkeypatch.setattr(sys, "argv", ["tool", *flags])
    assert words in one_line(*ends(parser.parse_args))


MISTAKES = {
    "ascend_host": (["--cards", "0", "--", "ls"], "--rank 0 of --cards 0"),
    "benchmark": (["--cases", "mini-wrm"], "did you mean mini-warm?"),
    "benchmark_training": (["--processes", "x"], "invalid int value"),
    "compare_runs": (["a", "--titel", "b"], "did you mean --title?"),
    "compare_controls": (["--controlnet", "x", "--data", "y", "--cuont", "3"], "did you mean --count?"),
    "compare_guidance": (["--figrue", "x"], "did you mean --figure?"),
    "compare_samplers": (["--sied", "9"], "did you mean --side?"),
    "compare_shortcuts": (["--steps", "x"], "invalid int value"),
    "compare_students": (["--student", "x", "--steps", "3"], "--steps must be at least 4"),
    "compare_training": (["--stpes", "3"], "did you mean --steps?"),
    "convert": (["a", "b", "--to", "mindspoor"], "did you mean mindspore?"),
    "distill": (["--method", "lmc", "--data", "x", "--output", "y"], "did you mean lcm?"),
    "evaluate": (["textatls"], "did you mean textatlas?"),
    "export": (["--sampler", "dmp"], "did you mean dpm?"),
    "extract_features": (["a", "b", "--model", "sigma-mini", "--rank", "3", "--ranks", "2"], "--rank 3 of --ranks 2"),
    "generate": (["a cat", "--steps", "0"], "--steps must be at least 1, not 0"),
    "make_condition": (["a.png", "b.png", "--condition", "cany"], "--condition must be one of canny"),
    "make_scenes": (["x", "--held-outt", "1"], "did you mean --held-out?"),
    "make_pairs": (["x", "y", "--model", "z", "--samplr", "dpm"], "did you mean --sampler?"),
    "plan": (["--cards", "0"], "--cards must be at least 1"),
    "prepare_data": (["x", "--threads", "0"], "--threads must be at least 1"),
    "profile_npu": (["--dtype", "fp61"], "did you mean fp16?"),
    "roofline": (["--knids", "3"], "did you mean --kinds?"),
    "scaling": (["--agian"], "did you mean --again?"),
    "train": (["--data", "x", "--output", "y", "--lora-alpha", "3"], "--lora-alpha belongs to an adapter"),
    "web": (["--port", "99999"], "--port must be 0 ... 65535"),
}


def test_every_tool_is_tried_below():
    assert set(MISTAKES) == {path.stem for path in (ROOT / "tools").glob("*.py")}


@pytest.mark.parametrize("tool", MISTAKES)
def test_a_mistake_is_answered_at_once(tool):
    """In one line, after a few modules: MindSpore alone imports 1,900, which takes seconds."""
    flags, words = MISTAKES[tool]
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / f"{tool}.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2 and len(lines) == 1 and words in lines[0], done.stderr[-2000:]
    assert not re.search(r"\| +(mindspore|gradio)\b", done.stderr)
    assert done.stderr.count("import time:") < 450


@pytest.mark.parametrize("tool", ["generate", "train", "convert", "prepare_data", "extract_features", "web"])
def test_help_has_groups_defaults_and_an_example(tool, capsys, monkeypatch):
    """And the version, and a script of completion that knows the options."""
    module = importlib.import_module(f"mindsigma.{'training.run_options' if tool == 'train' else f'commands.{tool}'}")
    if tool == "generate":
        module = importlib.import_module("mindsigma.commands.generate_options")
    parser = module.build_parser()
    text = parser.format_help()
    assert f"example:\n  python tools/{tool}.py " in text
    assert "(default: " in text and "(default: None)" not in text and "(default: False)" not in text
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--version"])
    assert caught.value.code == 0 and "mindsigma 0.2.0 (Python 3." in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--print-completion", "bash"])
    script = capsys.readouterr().out
    option = max((option for action in parser._actions for option in action.option_strings), key=len)
    assert caught.value.code == 0 and option in script and "compgen" in script


def test_what_warnings_quote(ends):
    assert ends(lambda: 0) == (0, [""])
    text = warnings.formatwarning(NASTY + "x" * 10**6, UserWarning, "file", 1)
    assert text.startswith("warning: a\\nerror: b\\r\\x1b[31m") and text[:-1].isprintable() and text[-1] == "\n"
    assert len(text) < 1300


def test_bounded():
    assert bounded("ab", 2) == "ab"
    for text in ("x" * 10**6, "\n" * 10**6, "\ud800" * 2000):
        assert len(bounded(text, 100)) <= 100
        assert bounded(text, 100).isprintable()
    long = bounded("begin" + "x" * 500 + "end", 100)
    assert long.startswith("beginx") and long.endswith("xend") and " ... " in long


def run_saying(case, **environment):
    command = [sys.executable, str(ROOT / "tests" / "saying.py"), case]
    return subprocess.run(command, capture_output=True, env={**os.environ, **environment}, timeout=100)


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "ascii:strict"}],
)
def test_an_encoding_that_lacks_characters(environment):
    done = run_saying("encoding", **environment)
    assert done.returncode == 2
    assert done.stdout == b"caf\\xe9 \\ud800 \\x1b[31m\\n \\u202e\n\\xe9\\udcff\n"
    assert done.stderr == b"error: \\xe9 \\udcff\n"


def test_nobody_reads_what_is_said():
    """As of `tool | head -1`: no traceback, no words; and a full disk is told."""
    done = run_saying("closed")
    assert (done.returncode, done.stderr) == (1, b"")
    done = run_saying("full")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


def test_say_makes_one_line_of_each(capsys):
    say(NASTY, "second", Path("x"))
    assert capsys.readouterr().out.split("\n") == [bounded(NASTY, 1000), "second", "x", ""]


def test_nothing_is_printed_as_it_is():
    """Names are foreign: what is said goes through `say`, or its text through `one_line`, `bounded` or an error."""
    files = [ROOT / "tools" / f"{name}.py" for name in TOOLS] + list((ROOT / "mindsigma").rglob("*.py"))
    assert len(files) > 100
    found = set()
    for file in files:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        found |= {file.name for node in calls if getattr(node.func, "id", "") == "print"}
    assert found == {"command_line.py", "errors.py"}

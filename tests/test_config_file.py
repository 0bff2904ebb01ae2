"""Option files: what they say is checked as strictly as flags are, and flags win."""

import argparse
import os

import pytest

from mindsigma.config_file import parse_with_config
from mindsigma.errors import MindSigmaError


def parser_of_every_kind():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("prompt", nargs="*")
    add("--config")
    add("--steps", type=int, default=20)
    add("--guidance-scale", type=float, default=4.5)
    add("--solver-order", type=int, choices=(1, 2, 3), default=2)
    add("--dtype", choices=("fp32", "fp16"))
    add("--out", default="outputs")
    add("--sizes", type=int, nargs="+")
    add("--grid", action="store_true")
    add("--version", action="version", version="1")
    return parser


@pytest.fixture
def parse(tmp_path):
    """parse(content, *flags): parse with a file of this content, written to tmp_path/options.yaml."""

    def parse(content, *flags, parser=None):
        file = tmp_path / "options.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return parse_with_config(parser or parser_of_every_kind(), ["--config", str(file), *flags])

    return parse


def test_without_a_file_nothing_changes():
    args = parse_with_config(parser_of_every_kind(), ["a cat", "--steps", "3"])
    assert (args.prompt, args.steps, args.guidance_scale, args.config) == (["a cat"], 3, 4.5, None)


def test_every_kind_of_option(parse):
    args = parse(
        """
        steps: 8
        guidance-scale: 3        # a whole number is a float too
        solver_order: 3
        dtype: fp16
        out: "2024"
        sizes: [256, 512]
        grid: true
        """
    )
    assert (args.steps, args.solver_order, args.dtype, args.out, args.sizes) == (8, 3, "fp16", "2024", [256, 512])
    assert isinstance(args.guidance_scale, float)
    assert args.guidance_scale == 3
    assert args.grid is True


@pytest.mark.parametrize("key", ["guidance-scale", "guidance_scale"])
def test_dash_and_underscore_are_one_key(parse, key):
    assert parse(f"{key}: 2.5").guidance_scale == 2.5


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("'2.5'", 2.5), ("7", 7.0)])
def test_floats_as_people_write_them(parse, text, value):
    assert parse(f"guidance-scale: {text}").guidance_scale == value  # YAML takes 1e-4 for a text


@pytest.mark.parametrize("content", ["", "\n\n", "# nothing\n", "---\n", "{}", "null"])
def test_empty_file_changes_nothing(parse, content):
    args = parse(content)
    assert (args.steps, args.prompt, args.dtype) == (20, [], None)


def test_flags_win_over_the_file(parse):
    content = "steps: 8\nguidance-scale: 3.0\ndtype: fp16\nsizes: [1]\nprompt: [a dog, a cow]\n"
    args = parse(content, "--steps", "5", "--dtype=fp32", "--sizes", "2", "3")
    assert (args.steps, args.dtype, args.sizes, args.guidance_scale) == (5, "fp32", [2, 3], 3.0)
    assert parse(content, "--steps", "20").steps == 20  # also where the flag is the option's own default
    assert parse(content, "--guidance-scale", "4.5").guidance_scale == 4.5


def test_prompts_in_the_file(parse):
    assert parse("prompt: [a dog, a cow]").prompt == ["a dog", "a cow"]
    assert parse("prompt: a red apple").prompt == ["a red apple"]  # not its letters
    assert parse("prompt: []").prompt == []
    assert parse("prompt: [a dog, a cow]", "a cat").prompt == ["a cat"]
    assert parse("prompt: a dog", "--steps", "2", "a cat", "a cow").prompt == ["a cat", "a cow"]


@pytest.mark.parametrize("form", ["--config={}", "--conf={}", "--config {}", "--conf {}"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_forms_of_the_flag(tmp_path, form, place):
    file = tmp_path / "options.yaml"
    file.write_text("steps: 8\n")
    flag = form.format(file).split(" ")
    argv = [*flag, "--grid", "a cat"] if place == "before" else ["a cat", "--grid", *flag]
    args = parse_with_config(parser_of_every_kind(), argv)
    assert (args.steps, args.prompt, args.grid) == (8, ["a cat"], True)


def test_a_prompt_may_look_like_the_flag():
    args = parse_with_config(parser_of_every_kind(), ["--steps", "3", "--", "--config=absent.yaml"])
    assert (args.prompt, args.config) == (["--config=absent.yaml"], None)


def test_required_option_may_come_from_the_file(parse, capsys):
    def parser():
        parser = parser_of_every_kind()
        parser.add_argument("--data", required=True)
        return parser

    assert parse("data: folder", parser=parser()).data == "folder"
    assert parse("data: folder", "--data", "other", parser=parser()).data == "other"
    with pytest.raises(SystemExit) as caught:
        parse("steps: 3", parser=parser())
    assert caught.value.code == 2
    assert "required: --data" in capsys.readouterr().err


LAUGHS = "prompt: [" + "&a0 [x], " + ", ".join(f"&a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)) + "]"

REFUSED = {
    "unknown key": ("stepz: 8", "unknown key 'stepz'; known: dtype, grid, guidance-scale, out,"),
    "file in a file": ("config: other.yaml", "unknown key 'config'"),
    "help": ("help: true", "unknown key 'help'"),
    "action without a value": ("version: true", "unknown key 'version'"),
    "key no text": ("8: steps", "unknown key 8"),
    "key a list": ("? [steps]\n: 8", "unknown key ['steps']"),
    "key twice": ("steps: 8\nsteps: 9", "key 'steps' is given twice"),
    "key in both spellings": ("guidance-scale: 8\nguidance_scale: 9", "key 'guidance_scale' is given twice"),
    "bool for int": ("steps: true", "steps has a value of the wrong kind: True"),
    "bool for text": ("out: no", "out has a value of the wrong kind: False"),
    "bool for choice": ("solver-order: true", "solver-order has a value of the wrong kind: True"),
    "float for int": ("steps: 8.0", "steps has a value of the wrong kind: 8.0"),
    "text for int": ("steps: many", "steps has a value of the wrong kind: 'many'"),
    "text for float": ("guidance-scale: strong", "guidance-scale has a value of the wrong kind: 'strong'"),
    "text for bool": ("grid: 'yes'", "grid must be true or false, not 'yes'"),
    "number for bool": ("grid: 1", "grid must be true or false, not 1"),
    "nothing for bool": ("grid:", "grid must be true or false, not None"),
    "number for text": ("out: 1.10", "out has a value of the wrong kind: 1.10; write a text in quotes"),
    "number for a prompt": ("prompt: [a cat, 7]", "prompt has a value of the wrong kind: 7; write a text in quotes"),
    "list for scalar": ("steps: [8]", "steps has a value of the wrong kind: [8]"),
    "list for text": ("out: [a, b]", "out has a value of the wrong kind: ['a', 'b']"),
    "map for scalar": ("steps: {a: 8}", "steps has a value of the wrong kind: {'a': 8}"),
    "list in a list": ("sizes: [[1]]", "sizes has a value of the wrong kind: [1]"),
    "nothing where a value is needed": ("steps:", "steps has no value"),
    "nothing in a list": ("prompt: [a cat, ~]", "prompt has no value"),
    "text choice": ("dtype: int8", "dtype must be one of fp32, fp16, not 'int8'"),
    "number choice": ("solver-order: 4", "solver-order must be one of 1, 2, 3, not 4"),
    "a list": ("- steps: 8", "expected `option: value` lines"),
    "a text": ("steps 8", "expected `option: value` lines"),
    "false": ("false", "expected `option: value` lines"),
    "not YAML": ("steps: [8", "not YAML"),
    "tab": ("steps:\t8\n\tgrid: true", "not YAML"),
    "two documents": ("steps: 8\n---\nsteps: 9", "not YAML"),
    "not UTF-8": (b"out: \xff", "not UTF-8 text (byte 5)"),
    "python object": ("out: !!python/object/apply:os.getcwd []", "not YAML"),
    "no such day": ("out: 2024-13-45", "not YAML"),
    "nested deeply": ("out: " + "[" * 1000, "not YAML"),
    "holds itself": ("prompt: &a [*a]", "line 1: anchors and aliases are not read"),
    "a billion laughs": (LAUGHS, "line 1: anchors and aliases are not read"),
    "an alias": ("steps: *a", "line 1: anchors and aliases are not read"),
    "an anchored key": ("&a steps: 8", "line 1: anchors and aliases are not read"),
    "merged": ("<<: {steps: 8}", "unknown key '<<'"),
    "a tag": ("steps: !!int '8'", "tags are not read"),
    "a tag that does not fit": ("grid: !!bool maybe", "tags are not read"),
    "base 60": ("steps: 1:30", "steps has a value of the wrong kind: 1:30"),
    "base 60, a fraction": ("guidance-scale: 1:30.5", "guidance-scale has a value of the wrong kind: 1:30.5"),
    "base 8": ("steps: 010", "wrong kind: 010, which YAML takes for 8; write a decimal number"),
    "base 16": ("steps: 0x10", "steps has a value of the wrong kind: 0x10"),
    "Norway": ("prompt: [no]", "prompt has a value of the wrong kind: False"),
    "a day": ("out: 2024-01-02", "datetime.date(2024, 1, 2); write a text in quotes"),
    "infinite digits": ("steps: " + "9" * 100_000, "steps has a value of the wrong kind: '999"),
    "a long text": ("steps: " + "x" * 100_000, "steps has a value of the wrong kind: 'xxx"),
    "a long key": ("x" * 1000 + ": 1", "unknown key 'xxx"),  # YAML takes no longer ones
    "line breaks": ('"a\\nerror: b\\e[31m": 1', "unknown key 'a\\nerror: b\\x1b[31m'"),
    "bidirectional": ('dtype: "\u202efp32"', "dtype must be one of fp32, fp16, not '\\u202efp32'"),
    "half a character": ('out: "\\ud800"', "it holds a character that no text has"),
    "NUL": ('out: "a\\0b"', "it holds a character that no text has"),
    "large": ("# " + "x" * 2**18, "more than the 262144 that are read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_is_refused(parse, tmp_path, case):
    content, words = REFUSED[case]
    with pytest.raises(MindSigmaError) as caught:
        parse(content)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "options.yaml"))
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(tmp_path)) + 500


def test_nothing_is_where_the_default_is_nothing(parse):
    assert parse("dtype:").dtype is None


def test_file_must_be_there(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    files = {"absent.yaml": "no such file", ".": "not a regular file", "pipe": "not a regular file"}
    for name, words in files.items():
        with pytest.raises(MindSigmaError, match=words):
            parse_with_config(parser_of_every_kind(), ["--config", str(tmp_path / name)])

"""What the READMEs tell to type: commands of tools parse; those for the released weights run with sigma-mini's."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_tool
from PIL import Image

from mindsigma.config_file import parse_with_config

ROOT = Path(__file__).parents[1]
READMES = [path for path in sorted(ROOT.rglob("README.md")) if ".venv" not in path.parts]


def commands(readme):
    """The lines of a README's blocks of bash, each as a list of words; continued lines are one."""
    result, inside = [], False
    for line in readme.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            inside = line == "```bash"
        elif inside and line.strip():
            result.append(shlex.split(line, comments=True))
    return [words for words in result if words]


def of_tools(readme):
    """The names of tools and their options that a README tells to type."""
    return [words[1:] for words in commands(readme) if words[0] == "python" and words[1].startswith("tools/")]


def parser_of(tool, options):
    """The parser of a tool for options; what names the work of evaluate.py is taken from them."""
    if tool in ("train", "distill"):  # whose options are the library's
        from mindsigma.training import distill_options, run_options

        return (run_options if tool == "train" else distill_options).build_parser()
    if tool == "evaluate":
        from mindsigma.commands import evaluate_options

        return evaluate_options.build_parser(options.pop(0))
    return load_tool(tool).build_parser()


@pytest.mark.parametrize("readme", [path for path in READMES if of_tools(path)], ids=lambda path: path.parent.name)
def test_commands_parse(readme, monkeypatch, capsys):
    """Also the values in the files of options that they name."""
    monkeypatch.chdir(ROOT)
    for tool, *options in of_tools(readme):
        parser = parser_of(Path(tool).stem, options)
        monkeypatch.setattr(sys, "argv", [tool, *options])
        try:
            own = options[: options.index("--")] if "--" in options else options  # another command follows
            parse_with_config(parser) if "--config" in own else parser.parse_args()
        except SystemExit:
            pytest.fail(f"{readme}: {shlex.join([tool, *options])}: {capsys.readouterr().err}")


def first(found, *beginning):
    """The first command that begins with these words."""
    return next(words for words in found if tuple(words[: len(beginning)]) == beginning)


def test_recipe(tmp_path, monkeypatch, capsys):
    found = commands(ROOT / "README.md")
    install = first(found, "pip", "install", "-r")
    assert (ROOT / install[3]).is_file()

    fetch = first(found, "hf", "download")
    done = subprocess.run(
        [sys.executable, "-m", "huggingface_hub.cli.hf", *fetch[1:]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert "LocalEntryNotFoundError" in done.stderr and "usage:" not in done.stderr  # understood, and no network

    monkeypatch.chdir(tmp_path)
    downloaded = fetch[fetch.index("--local-dir") + 1]
    translate = first(found, "python", "tools/convert.py", downloaded)
    stand_in = "models/stand-in"  # the released name is kept for what has the released tensors
    convert, generate = load_tool("convert"), load_tool("generate")
    monkeypatch.setattr(sys, "argv", ["convert.py", "sigma-mini", stand_in, "--to", "diffusers"])
    assert convert.main() == 0
    monkeypatch.setattr(sys, "argv", [translate[1], stand_in, *translate[3:]])
    assert convert.main() == 0 and "verified" in capsys.readouterr().out

    draw = next(words for words in found if words[1:2] == ["tools/generate.py"] and translate[3] in words)
    assert draw[draw.index("--model") + 1] == translate[3]
    at = draw.index("--device")
    assert draw[at + 1] == "Ascend"
    monkeypatch.setattr(sys, "argv", [*draw[1:at], *draw[at + 2 :], "--steps", "2"])
    assert generate.main() == 0
    assert Image.open(capsys.readouterr().out.splitlines()[-1]).size == (256, 256)

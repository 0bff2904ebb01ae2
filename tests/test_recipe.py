"""The README's four commands from the released weights to a picture, run with sigma-mini's in their place."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from conftest import load_tool
from PIL import Image

ROOT = Path(__file__).parents[1]


def commands():
    """The recipe's commands, each as a list of words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"on an Ascend box.*?```bash\n(.*?)```", text, re.DOTALL)[1]
    return [shlex.split(line) for line in block.strip().splitlines()]


def test_recipe(tmp_path, monkeypatch, capsys):
    install, fetch, translate, draw = commands()
    assert install[:3] == ["pip", "install", "-r"] and (ROOT / install[3]).is_file()

    assert fetch[:2] == ["hf", "download"]
    code = "import sys; sys.argv = sys.argv[1:]; from huggingface_hub.cli.hf import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *fetch],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert "LocalEntryNotFoundError" in done.stderr and "usage:" not in done.stderr  # understood, and no network

    monkeypatch.chdir(tmp_path)
    downloaded = fetch[fetch.index("--local-dir") + 1]
    assert translate[:3] == ["python", "tools/convert.py", downloaded]
    stand_in = "models/stand-in"  # the released name is kept for what has the released tensors
    convert, generate = load_tool("convert"), load_tool("generate")
    monkeypatch.setattr(sys, "argv", ["convert.py", "sigma-mini", stand_in, "--to", "diffusers"])
    assert convert.main() == 0
    monkeypatch.setattr(sys, "argv", [translate[1], stand_in, *translate[3:]])
    assert convert.main() == 0 and "verified" in capsys.readouterr().out

    assert draw[:2] == ["python", "tools/generate.py"] and draw[draw.index("--model") + 1] == translate[3]
    at = draw.index("--device")
    assert draw[at + 1] == "Ascend"
    monkeypatch.setattr(sys, "argv", [*draw[1:at], *draw[at + 2 :], "--steps", "2"])
    assert generate.main() == 0
    assert Image.open(capsys.readouterr().out.splitlines()[-1]).size == (256, 256)

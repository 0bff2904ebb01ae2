"""Pictures of many prompts in shards: those that are drawn one by one, read again as a data set, gone on with."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load_tool
from PIL import Image
from training_runs import free_port

from mindsigma.commands import generate_shards
from mindsigma.commands.generate_options import build_parser
from mindsigma.commands.prompt_file import read_prompt_file
from mindsigma.commands.prompt_lines import PromptLines
from mindsigma.commands.rows import columns_of
from mindsigma.data import open_data
from mindsigma.data.shares import claim
from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.features import image_files, read_image
from mindsigma.evaluation.prompts_of_pictures import prompt_of

PROMPTS = ["a red apple", "a cat", "a blue rocket", "a dog --hw 64:96", "a penguin"]
SMALL = ["--steps", "1", "--height", "64", "--width", "64", "--no-resolution-binning", "--guidance-scale", "1"]


def tool(folder, *flags):
    words = ["generate.py", "--prompts-file", str(folder / "prompts.txt"), *SMALL, *map(str, flags)]
    old, sys.argv = sys.argv, words
    try:
        return load_tool("generate").main()
    finally:
        sys.argv = old


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with prompts.txt, shards of them drawn at once, and the pictures drawn the ordinary way."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("# five\n" + "\n".join(PROMPTS))
    tool(folder, "--out", folder / "whole", "--shard-prompts", 2, "--batch-size", 2)
    tool(folder, "--out", folder / "single", "--batch-size", 2, "--name-template", "{number}")
    return folder


def test_shards_are_a_data_set_of_the_pictures(drawn):
    assert sorted(os.listdir(drawn / "whole")) == ["00000.tar", "00001.tar", "00002.tar", "drawing.json"]
    records = open_data(drawn / "whole", progress=False)
    assert [record.prompt for record in records] == ["a red apple", "a cat", "a blue rocket", "a dog", "a penguin"]
    assert [record.key for record in records][2:4] == ["00001.tar/000000002-000.png", "00001.tar/000000003-000.png"]
    assert not records.bad and records.sizes.tolist() == [[64, 64]] * 3 + [[64, 96], [64, 64]]
    for i, record in enumerate(records):
        with Image.open(drawn / "single" / f"{i + 1}.png") as single:
            assert abs(np.asarray(single).astype(int) - np.asarray(records.image(i))).max() <= 1, record.key
    sources = image_files(drawn / "whole")  # as evaluation reads them
    assert [prompt_of(source) for source in sources] == [record.prompt for record in records]
    assert read_image(sources[3]).size == (96, 64)
    with tarfile.open(drawn / "whole" / "00000.tar") as tar:
        name = tar.getnames()[0]
        with Image.open(tar.extractfile(name)) as image:
            assert image.text["prompt"] == "a red apple" and json.loads(image.text["mindsigma"])["options"]


def test_what_was_drawn_is_kept_after_a_kill(drawn, tmp_path, monkeypatch):
    """In the middle of a shard, of a member; a shard that is there is not drawn again."""
    shutil.copy(drawn / "prompts.txt", tmp_path)
    whole = {path.name: path.read_bytes() for path in (drawn / "whole").iterdir()}
    out, drew = tmp_path / "out", []
    draw = generate_shards.draw
    monkeypatch.setattr(generate_shards, "draw", lambda *args, **more: drew.append(len(args[3])) or draw(*args, **more))
    data = whole["00001.tar"]
    with tarfile.open(drawn / "whole" / "00001.tar") as tar:
        second = tar.getmembers()[2].offset_data
    for length, pictures in ((len(data), 0), (second + 9, 1), (10, 2)):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in ("00000.tar", "00002.tar", "drawing.json"):
            (out / name).write_bytes(whole[name])
        (out / "00001.tar.growing").write_bytes(data[:length])
        drew.clear()
        tool(tmp_path, "--out", out, "--shard-prompts", 2)
        assert sum(drew) == pictures
        found = [open_data(folder, progress=False) for folder in (out, drawn / "whole")]
        for i in range(5):
            one, other = (np.asarray(records.image(i)).astype(int) for records in found)
            assert found[0][i][:5] == found[1][i][:5] and abs(one - other).max() <= 1


def test_processes_share_shards(drawn, tmp_path, capsys):
    shutil.copy(drawn / "prompts.txt", tmp_path)
    out = tmp_path / "out"
    flags = ("--out", out, "--shard-prompts", 3)
    with claim(out / ".building", "00000") as mine:
        assert mine and tool(tmp_path, *flags, "--rank", 0, "--ranks", 2) == 0
        assert "1 shards of other processes are not there yet" in capsys.readouterr().out
    assert sorted(path.name for path in out.glob("*.tar")) == ["00001.tar"]
    assert tool(tmp_path, *flags) == 0 and len(open_data(out, progress=False)) == 5
    with pytest.raises(MindSigmaError, match="drawn with steps 1, not 2; use that, or another --out"):
        tool(tmp_path, *flags, "--steps", 2)
    (tmp_path / "prompts.txt").write_text("another")
    with pytest.raises(MindSigmaError, match="drawn with prompts"):
        tool(tmp_path, *flags)


def test_a_process_that_is_killed_leaves_no_half_shard(drawn, tmp_path):
    shutil.copy(drawn / "prompts.txt", tmp_path)
    code = (
        "import os, sys; from mindsigma.commands import generate, generate_shards as shards; count = [0];"
        "real = shards.GrowingTar.add;\n"
        "def add(self, *member):\n"
        "    count[0] += 1\n"
        "    if count[0] == 7: self._file.write(b'half'); self._file.flush(); os.kill(os.getpid(), 9)\n"
        "    return real(self, *member)\n"
        "shards.GrowingTar.add = add; generate.run()"
    )
    flags = ["--prompts-file", "prompts.txt", *SMALL, "--out", "out", "--shard-prompts", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, "-c", code, *flags], cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == -signal.SIGKILL
    names = sorted(os.listdir(tmp_path / "out"))
    assert names == [".building", "00000.tar", "00001.tar.growing", "drawing.json"]
    assert len(open_data(tmp_path / "out", progress=False)) == 2
    tool(tmp_path, "--out", tmp_path / "out", "--shard-prompts", 2)
    assert len(open_data(tmp_path / "out", progress=False)) == 5


def process_of(rank, out):
    """Number of the launcher's process of a rank that draws to a folder, or None."""
    wanted = {str(out).encode(), f"RANK_ID={rank}".encode(), b"MS_ROLE=MS_WORKER"}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= {part for name in ("cmdline", "environ") for part in (entry / name).read_bytes().split(b"\0")}:
                return int(entry.name)
    return None


@pytest.mark.slow
def test_a_killed_process_of_two_is_started_again(tmp_path):
    """By the launcher, as in training; what both had drawn is kept, and the shards are those of one process."""
    prompts, out, one = tmp_path / "prompts.txt", tmp_path / "out", tmp_path / "one"
    prompts.write_text("\n".join(f"apple number {i}" for i in range(24)))
    flags = ["--prompts-file", prompts, *SMALL, "--shard-prompts", 4, "--out"]
    command = [ROOT / "tools" / "launch" / "generate_cpu.sh", *flags, out]
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RESTARTS": "1", "MASTER_PORT": str(free_port())}
    environment["LOG_DIR"] = str(tmp_path / "logs")
    launcher = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "00003.tar.growing").exists():  # of the second process's part
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    os.kill(process_of(1, out), signal.SIGKILL)
    said, error = launcher.communicate(timeout=600)
    assert launcher.returncode == 0, said + error
    assert "process 1 was killed by signal 9 after step" in error and "restart 1 of 1" in said
    assert sorted(path.name for path in out.glob("*.tar*")) == [f"{i:05d}.tar" for i in range(6)]
    tool(tmp_path, "--out", one, "--shard-prompts", 4)
    found = [open_data(folder, progress=False) for folder in (out, one)]
    assert [record[:5] for record in found[0]] == [record[:5] for record in found[1]] and len(found[0]) == 24
    for i in range(24):
        assert np.abs(np.subtract(*(np.asarray(records.image(i)).astype(int) for records in found))).max() <= 1


def test_prompts_are_read_line_by_line(tmp_path):
    columns = columns_of(build_parser())
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes("\ufeffa cat\r\n\n# no\n a dög \n".encode())
    rows = [{"prompt": f"number {i}", "seed": i, "steps": None} for i in range(5)]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    for path, count in ((text, 2), (lines, 5)):
        prompts = PromptLines(path, columns)
        assert len(prompts) == count and prompts.rows(0, 9) == read_prompt_file(path, columns)
        assert prompts.rows(1, 2) == read_prompt_file(path, columns)[1:2]
    assert PromptLines(text, columns).digest != PromptLines(lines, columns).digest
    for name, content, said in (
        ("b.txt", b"fine\n\xff\n", "line 2: not UTF-8"),
        ("b.txt", b"fine\na --ar 3\n", "line 2: the prompt"),
        ("b.txt", b"x" * (1 << 20), "line 1: longer than"),
        ("b.txt", b"# none\n", "holds no prompt"),
        ("b.jsonl", b'{"prompt": "a"}\n{"prompt": "a", "sed": 1}\n', "line 2: unknown column 'sed'"),
        ("b.jsonl", b'{"prompt": "a", "seed": "x"}\n', "line 1: seed"),
        ("b.csv", b"prompt\na\n", r"convert it to \.jsonl"),
        ("absent.txt", None, "no such file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(MindSigmaError, match=rf"--prompts-file .*{name}.*{said}"):
            PromptLines(tmp_path / name, columns)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--shard-prompts", "0"], "at least 1"),
        (["--shard-prompts", "2", "a cat"], "and no others"),
        (["--shard-prompts", "2", "--grid"], "--grid is not for"),
        (["--shard-prompts", "2", "--warm-up", "64x64"], "--warm-up is not for"),
        (["--shard-prompts", "2", "--out", "a.png"], "names its files itself"),
        (["--shard-prompts", "2", "--name-template", "{seed}"], "names its files itself"),
        (["--rank", "0"], "are for --shard-prompts"),
    ],
)
def test_options_that_do_not_fit(drawn, flags, said):
    with pytest.raises(MindSigmaError, match=said):
        tool(drawn, *flags)

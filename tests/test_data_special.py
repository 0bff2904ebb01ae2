"""Readers of data sets wait for nothing and fill no memory: special files, giants, headers that claim gigabytes."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from mindsigma.data import open_records, tables
from mindsigma.data.records import LARGEST_IMAGE
from mindsigma.data.tar_index import members
from mindsigma.errors import MindSigmaError

GIANT = 50 << 30  # bytes of a sparse file


def png():
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, "PNG")
    return file.getvalue()


def fifo(path):
    os.mkfifo(path)


def device(path):
    os.symlink("/dev/zero", path)


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.getcwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(folder)


def giant(path):
    with open(path, "wb") as file:
        file.truncate(GIANT)


def dangling(path):
    os.symlink("nowhere", path)


NAMES = ["0.png", "0.txt", "metadata.csv", "metadata.jsonl", "metadata.json", "s.tar", ".prepare.json", "0.json"]
NAMES += ["InternData/data_info.json", "x.tar.gz"]


@pytest.mark.parametrize("make", [fifo, device, unix_socket, giant, dangling])
def test_special_files_in_every_place(tmp_path, make):
    """In the place of each file of a data set, and as the data set itself: one line, no waiting, no memory."""
    tracemalloc.start()
    try:
        for name in NAMES:
            folder = tmp_path / name.replace("/", "-")
            (folder / name).parent.mkdir(parents=True)
            if name != "0.png":
                (folder / "0.png").write_bytes(png())
            make(folder / name)
            if name == "0.png":
                (folder / "0.txt").write_text("a")
            for path in (folder, folder / name):
                with pytest.raises(MindSigmaError) as caught:
                    open_records(path, progress=False)
                assert len(str(caught.value)) < 1300
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_an_image_of_too_many_bytes_is_a_bad_row(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png())
        (tmp_path / f"{i}.txt").write_text("a")
    os.truncate(tmp_path / "1.png", LARGEST_IMAGE + 1)
    records = open_records(tmp_path, progress=False)
    assert len(records) == 1 and records.bad[0].detail.startswith(f"{LARGEST_IMAGE + 1} bytes")


def header(kind, size):
    """The header of a tar member that says what its data are and how long they are, in any length."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g", b"X", b"S", b"0"])
def test_tar_headers_of_gigabytes(tmp_path, kind):
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as tar:
        for name, data in (("a.png", png()), ("a.txt", b"a")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    path = tmp_path / "x.tar"
    path.write_bytes(good.getvalue()[:end] + header(kind, 3 << 30))
    os.truncate(path, path.stat().st_size + (4 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = open_records(tmp_path, progress=False)
    assert len(records) == 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert len(records.bad) == (kind in (b"L", b"x", b"X"))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_finds(form):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=form) as tar:
        for i in range(60):
            name = f"folder {i}/" + "üx"[i % 2] * (3, 40, 45 if form == tarfile.USTAR_FORMAT else 300)[i % 3]
            member = tarfile.TarInfo(name)
            member.size, member.mtime = 37 * i, i + (0.5 if form == tarfile.PAX_FORMAT else 0)
            if i % 7 == 0:
                member.type, member.size = (tarfile.DIRTYPE, tarfile.SYMTYPE)[i % 2], 0
            tar.addfile(member, io.BytesIO(b"a" * member.size))
    found = list(members(data))
    data.seek(0)
    with tarfile.open(fileobj=data, mode="r:") as tar:
        assert found == [(member.name, member.offset_data, member.size) for member in tar if member.isreg()]
    assert len(found) == 51


def test_damaged_tars_keep_what_stands_before():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("a", "b"):
            member = tarfile.TarInfo(name)
            member.size = 600
            tar.addfile(member, io.BytesIO(bytes(600)))
    whole = data.getvalue()
    for broken in (whole[:1600], whole[:2300], whole[:1536] + b"\1" + whole[1537:], whole[:1664] + b"9" + whole[1665:]):
        found = []
        with pytest.raises(MindSigmaError):
            for member in members(io.BytesIO(broken)):
                found.append(member[0])
        assert found == ["a"]


def test_long_json_lists_are_streamed(tmp_path, monkeypatch):
    """Entries that lie across what is read at once, in a document larger than the memory that reading takes."""
    rows = [{"path": f"{i}.png", "prompt": 'ü\\"]}, {' * (i % 50), "n": i} for i in range(20_000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    monkeypatch.setattr(tables, "LARGEST_ENTRY", 5000)
    tracemalloc.start()
    try:
        assert all(row == rows[i] for i, (_, row) in enumerate(tables.entries(path)))
        assert tracemalloc.get_traced_memory()[1] < 200_000 < path.stat().st_size
    finally:
        tracemalloc.stop()
    path.write_text("[1, 22, 333]")
    assert [row for _, row in tables.entries(path)] == [1, 22, 333]
    for wrong in (
        "[1, 2",
        "[1 2]",
        "[1,]",
        "[1] 2",
        '[{"a": 1, "a": 2}]',
        f"[{'9' * 99}]",
        "[" * 9999,
        f'["{"x" * 20000}"]',
    ):
        path.write_text(wrong)
        with pytest.raises(MindSigmaError, match="not valid JSON"):
            list(tables.entries(path))


def test_a_table_of_bad_rows_alone_ends_early(tmp_path, monkeypatch):
    monkeypatch.setattr("mindsigma.data.records.MOST_BAD", 100)
    (tmp_path / "rows.jsonl").write_text("{\n" * 1000)
    with pytest.raises(MindSigmaError, match="more than 100 bad rows"):
        open_records(tmp_path / "rows.jsonl", progress=False)


def test_what_is_told_of_bad_rows_fits_a_line(tmp_path):
    (tmp_path / "a\nb\x1b[31m.png").write_bytes(b"x")
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "good.txt").write_text("a")
    (tmp_path / "rows.json").write_text("{}")
    records = open_records(tmp_path, progress=False)
    assert records.bad and all(part.isprintable() for row in records.bad for part in row)


def test_the_tool_ends_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "metadata.csv")
    tool = Path(__file__).resolve().parent.parent / "tools" / "prepare_data.py"
    run = subprocess.run([sys.executable, str(tool), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and run.stderr == f"error: {tmp_path}/metadata.csv: not a regular file\n"

"""Layouts of data sets: all tell the same records, bad rows are listed with their reason, hostile input is harmless."""

import csv
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from killing import killed_everywhere
from PIL import Image

from mindsigma.data import Records, open_data, open_records
from mindsigma.data.check import check_images
from mindsigma.data.conversion_note import is_complete
from mindsigma.data.layouts import find_layout
from mindsigma.data.own_folder import Held
from mindsigma.data.prepared import convert, safe_names, write_bad_rows
from mindsigma.data.record import BadRow, Record
from mindsigma.data.records import read_image
from mindsigma.errors import MindSigmaError

SIZES = [(40, 60), (64, 64), (90, 30), (50, 45)]


def picture(i):
    """Image number i, no two alike."""
    height, width = SIZES[i]
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8))


def png(i=1):
    file = io.BytesIO()
    picture(i).save(file, "PNG")
    return file.getvalue()


def entries(**extra):
    rows = [{"path": f"{i % 2}/{i}.png", "prompt": f"short {i}", "sharegpt4v": f"long {i}"} for i in range(len(SIZES))]
    return [{**row, **extra} for row in rows]


def write_images(folder):
    for i, row in enumerate(entries()):
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / row["path"])


def official(folder, rows):
    write_images(folder / "InternImgs")
    (folder / "InternData").mkdir()
    (folder / "InternData" / "data_info.json").write_text(json.dumps(rows))
    return folder


def tar(path, members):
    """A tar file of (name, bytes or TarInfo)."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def layouts(tmp_path):
    """The same data set in every layout: name -> path."""
    rows = entries()
    paths = {"official": official(tmp_path / "official", rows)}
    paths["inside"] = paths["official"] / "InternData"
    for name in ("folder", "csv", "tsv", "jsonl", "json", "hub"):
        write_images(tmp_path / name)
        paths[name] = tmp_path / name
    for row in rows:
        (tmp_path / "folder" / row["path"]).with_suffix(".txt").write_text(f"  {row['prompt']}\n")
    for name, separator in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / name / f"rows.{name}", "w", newline="", encoding="utf-8-sig") as file:
            table = csv.writer(file, delimiter=separator)
            table.writerow(["Image", "Caption", "long_caption"])
            table.writerows([row["path"], row["prompt"], row["sharegpt4v"]] for row in rows)
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "jsonl" / "rows.jsonl").write_text(lines + "\n\n")
    (tmp_path / "json" / "rows.json").write_text(json.dumps(rows, indent=1))
    hub = [{"file_name": row["path"], "text": row["prompt"], "long_caption": row["sharegpt4v"]} for row in rows]
    (tmp_path / "hub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, hub)))
    (tmp_path / "shards").mkdir()
    for shard in (0, 1):
        members = []
        for i in (0, 1) if shard == 0 else (2, 3):
            members.append((f"{i}.png", png(i)))
            if i % 2:
                members.append((f"{i}.json", json.dumps(rows[i]).encode()))
            else:
                members += [
                    (f"{i}.json", json.dumps({"sharegpt4v": f"long {i}"}).encode()),
                    (f"{i}.txt", b"short %d" % i),
                ]
        tar(tmp_path / "shards" / f"{shard}.tar", members)
    paths["webdataset"] = tmp_path / "shards"
    return paths


def contents(records):
    return sorted((r.prompt, r.height, r.width, read_image(r).tobytes()) for r in records)


def test_all_layouts_tell_the_same(layouts):
    expected = sorted((f"short {i}", *SIZES[i], picture(i).tobytes()) for i in range(len(SIZES)))
    for name, path in layouts.items():
        records = open_records(path, progress=False)
        assert contents(records) == expected, name
        assert not records.bad
        longs = {record.long_prompt for record in records}
        assert longs == ({""} if name == "folder" else {f"long {i}" for i in range(len(SIZES))}), name
        assert records.sizes.tolist() == [[r.height, r.width] for r in records]
    names = {name: open_records(path, progress=False).layout for name, path in layouts.items()}
    assert names["official"] == names["inside"] == "official" and names["webdataset"] == "webdataset"
    assert names["csv"] == names["tsv"] == "csv" and names["jsonl"] == names["json"] == names["hub"] == "jsonl"
    assert (
        open_records(layouts["csv"] / "rows.csv", progress=False).fingerprint()
        == open_records(layouts["csv"], progress=False).fingerprint()
    )
    assert len(open_records(layouts["webdataset"] / "0.tar", progress=False)) == 2


@pytest.mark.parametrize("to", ["official", "jsonl", "webdataset"])
def test_conversions_keep_everything(layouts, tmp_path, to):
    source = open_records(layouts["official"], progress=False)
    done = []
    convert(source, tmp_path / "new" / to, to, shard_records=3, progress=done.append)
    assert sum(done) == len(source)
    result = open_records(tmp_path / "new" / to, strict=True, progress=False)
    assert result.layout == to
    assert [(r.prompt, r.long_prompt, r.height, r.width) for r in result] == [
        (r.prompt, r.long_prompt, r.height, r.width) for r in source
    ]
    for a, b in zip(source, result):
        assert read_image(a).tobytes() == read_image(b).tobytes()
    if to == "official":
        rows = json.loads((tmp_path / "new" / to / "InternData" / "data_info.json").read_text())
        assert rows[0] == {**entries()[0], "height": 40, "width": 60, "ratio": 40 / 60}
    if to == "webdataset":
        assert sorted(path.name for path in (tmp_path / "new" / to).glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("to", ["official", "webdataset"])
def test_an_interrupted_conversion_is_no_data_set_and_is_continued(layouts, tmp_path, to):
    source, target = open_records(layouts["official"], progress=False), tmp_path / "target"

    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, to, threads=1, shard_records=2, progress=interrupt)
    assert not list(target.rglob("*.part")) and not (target / "InternData").exists()
    with pytest.raises(MindSigmaError, match="interrupted"):
        open_records(target)
    kept = {path: path.stat().st_mtime_ns for path in target.rglob("*.*") if path.suffix in (".png", ".tar")}
    assert kept
    convert(source, target, to, shard_records=2)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert contents(open_records(target, progress=False)) == contents(source)


def test_a_target_that_holds_something_is_left_alone(layouts, tmp_path):
    source = open_records(layouts["official"], progress=False)
    with pytest.raises(MindSigmaError, match="not an empty folder"):
        convert(source, layouts["folder"], "official")
    convert(source, tmp_path / "new", "official")
    other = open_records(layouts["folder"], progress=False)
    with pytest.raises(MindSigmaError, match="another conversion"):
        convert(other, tmp_path / "new", "official")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("to", ["official", "jsonl", "webdataset"])
def test_a_conversion_killed_at_any_instant_is_continued(layouts, tmp_path, to):
    source = Records(list(open_records(layouts["official"], progress=False))[:2])
    target = tmp_path / "new" / "target"
    convert(source, tmp_path / "whole", to, shard_records=1)
    kills = 0
    for number in killed_everywhere(lambda: convert(source, target, to, threads=1, shard_records=1)):
        if not (target / ".prepare.json").exists() or not is_complete(target):
            convert(source, target, to, threads=1, shard_records=1)
        assert files_of(target) == files_of(tmp_path / "whole")
        shutil.rmtree(target.parent)
        kills = number
    assert kills > 12 and files_of(target) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("to", ["official", "jsonl", "webdataset"])
def test_an_image_of_the_same_size_is_written_again_and_alone(layouts, tmp_path, to):
    source, target = open_records(layouts["official"], progress=False), tmp_path / "target"
    convert(source, target, to, shard_records=2)
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    convert(source, target, to, shard_records=2)
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    file = Path(source[1].file)
    pixels = np.array(picture(1))
    Image.fromarray(255 - pixels).save(file, compress_level=0)
    picture(1).save(tmp_path / "1.png", compress_level=0)
    assert file.stat().st_size == (tmp_path / "1.png").stat().st_size
    shutil.copy(tmp_path / "1.png", file)
    convert(source, target, to, shard_records=2)
    Image.fromarray(255 - pixels).save(file, compress_level=0)
    found = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    convert(source, target, to, shard_records=2)
    assert contents(open_records(target, progress=False)) == contents(source)
    changed = {path.name for path in found if path.stat().st_mtime_ns != found[path]}
    assert changed == {".prepare.json", "00000.tar" if to == "webdataset" else "1.png"}
    records = [source[0]._replace(prompt="another"), *list(source)[1:]]
    with pytest.raises(MindSigmaError, match="other captions"):
        convert(Records(records), target, to, shard_records=2)


NOTES = ["[]", "5", "null", '"complete"', '{"complete": "yes"}', '{"complete": 1}', "{", "", "[" * 10**5]
NOTES += ["\ud800", '{"complete": true, "complete": true}', '{"a": ' + "9" * 10**6 + "}", " " * 2**17]


def test_notes_that_no_conversion_writes(layouts, tmp_path):
    """Nor links to endless files, FIFOs, folders: neither a data set nor a target, told in one line."""
    source, target = open_records(layouts["official"], progress=False), tmp_path / "target"
    convert(source, target, "official")
    note = target / ".prepare.json"
    note.unlink()
    for make in (
        *(lambda text=text: note.write_bytes(text.encode("utf-8", "surrogatepass")) for text in NOTES),
        lambda: os.mkfifo(note),
        lambda: os.symlink("/dev/zero", note),
        lambda: os.symlink(tmp_path / "absent", note),
        note.mkdir,
    ):
        make()
        for use in (lambda: open_records(target, progress=False), lambda: convert(source, target, "official")):
            with pytest.raises(MindSigmaError) as caught:
                use()
            assert str(target) in str(caught.value) and len(str(caught.value)) < 400
        note.rmdir() if note.is_dir() else note.unlink()
    assert len(open_records(target, progress=False)) == len(source)


def test_obstructions_are_told_before_anything_changes_and_no_link_is_followed(layouts, tmp_path):
    source, target, elsewhere = (
        open_records(layouts["official"], progress=False),
        tmp_path / "target",
        tmp_path / "else",
    )
    convert(source, target, "official")
    shutil.copytree(target / "InternImgs", elsewhere)
    images = target / "InternImgs"
    for make in (
        lambda: (shutil.rmtree(images), os.symlink(elsewhere, images)),
        lambda: (images.unlink(), images.write_text("a file")),
        lambda: (images.unlink(), images.mkdir(), os.symlink(elsewhere / "1", images / "1")),
        lambda: ((images / "1").unlink(), (images / "1" / "3.png").mkdir(parents=True)),
    ):
        make()
        before = files_of(tmp_path)
        with pytest.raises(MindSigmaError, match="is in the way"):
            convert(source, target, "official")
        assert files_of(tmp_path) == before
    shutil.rmtree(images)
    (images / "1").mkdir(parents=True)
    foreign = tmp_path / "foreign.png"
    foreign.write_bytes(b"mine")
    os.symlink(foreign, images / "1" / "3.png")
    convert(source, target, "official")
    assert foreign.read_bytes() == b"mine" and contents(open_records(target, progress=False)) == contents(source)


def test_leftovers_within_a_target_are_removed_and_nothing_else(layouts, tmp_path):
    source, target = open_records(layouts["official"], progress=False), tmp_path / "target"
    target.mkdir()
    (target / "..prepare.json.123.part").write_text("{")
    convert(source, target, "official")
    left = [target / "InternImgs" / "0" / ".0.png.77.part", target / ".x.part", tmp_path / ".target.77.part"]
    for path in left:
        path.write_text("half")
    convert(source, target, "official")
    assert [path.exists() for path in left] == [False, True, True]
    with Held(target), pytest.raises(MindSigmaError, match="another process is writing there"):
        convert(source, target, "official")


def test_lists_of_bad_rows_take_the_place_of_files_alone(tmp_path):
    rows = [BadRow("a\nb\tc\udcff", "broken row", "\x1b[31m")]
    write_bad_rows(tmp_path / "bad.txt", rows)
    assert (tmp_path / "bad.txt").read_text() == "broken row\ta\\nb\\tc\\udcff\t\\x1b[31m\n"
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(MindSigmaError, match="is no file"):
            write_bad_rows(path, rows)
    assert (tmp_path / "fifo").is_fifo()


def test_bad_rows_are_listed_with_their_reason(tmp_path):
    rows = entries(height=64, width=64)
    rows += [
        {"path": "absent.png", "prompt": "a"},
        {"path": "../official/x.png", "prompt": "a"},
        {"path": "/etc/passwd", "prompt": "a"},
        {"path": "0/0.png\0", "prompt": "a"},
        {"path": 5, "prompt": "a"},
        {"prompt": "a"},
        "text",
        None,
        {"path": "0/2.png", "prompt": "a"},
        {"path": "junk.png", "prompt": "a"},
        {"path": "wide.png", "prompt": "a"},
        {"path": "sub", "prompt": "a"},
        {"path": "0/empty.png", "prompt": " ", "sharegpt4v": None},
        {"path": "1/a.png", "prompt": "a", "height": 0, "width": 5},
        {"path": "1/b.png", "prompt": "a", "height": 10, "width": "x"},
        {"path": "1/c.png", "prompt": "a", "height": 1e300, "width": 7},
        {"path": "1/d.png", "prompt": "a", "height": True, "width": 7},
    ]
    path = official(tmp_path / "set", rows)
    images = path / "InternImgs"
    (images / "sub").mkdir()
    (images / "junk.png").write_bytes(b"junk")
    Image.new("RGB", (460, 100)).save(images / "wide.png")
    Image.new("RGB", (9, 9)).save(images / "0" / "empty.png")
    records = open_records(path, progress=False)
    assert len(records) == 4
    assert records.bad_by_reason() == {
        "broken row": 5,
        "no image file": 2,
        "outside the folder": 2,
        "duplicate": 1,
        "not a readable image": 1,
        "aspect ratio out of range": 1,
        "no caption": 1,
        "bad size": 4,
    }
    assert any("junk.png" in row.where for row in records.bad)
    with pytest.raises(MindSigmaError, match="bad rows"):
        open_records(path, strict=True, progress=False)
    assert len(open_records(path, max_ratio=None, progress=False)) == 5
    with pytest.raises(MindSigmaError, match="max_ratio"):
        open_records(path, max_ratio=0.5)


def test_images_beyond_the_ratio_are_no_fault(tmp_path):
    for i, (height, width) in enumerate([(45, 10), (46, 10), (10, 45), (10, 46)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    records = open_records(tmp_path, strict=True, progress=False)
    assert [record.key for record in records] == ["0.png", "2.png"] and len(records.bad) == 2


def test_what_caption_is_taken():
    both, short, long = (Record("k", p, q, 1, 1, "f") for p, q in (("a", "b"), ("a", ""), ("", "b")))
    assert [r.caption(True) for r in (both, short, long)] == ["a", "a", "b"]
    assert [r.caption(False) for r in (both, short, long)] == ["b", "a", "b"]


def test_a_folder_of_images_with_texts(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/er/b.jpg", "deep/c.webp", "d.png", "e.png", ".hidden.png"):
        picture(1).save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffein Igel, größer".encode())
    (tmp_path / "deep" / "er" / "b.txt").write_text("b")
    (tmp_path / "deep" / "c.webp.txt").write_text("c")
    (tmp_path / "e.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "notes.json").write_text('{"made": "by hand"}')
    records = open_records(tmp_path, progress=False)
    assert [(r.key, r.prompt) for r in records] == [
        ("a.png", "ein Igel, größer"),
        ("deep/c.webp", "c"),
        ("deep/er/b.jpg", "b"),
    ]
    assert sorted(row.reason for row in records.bad) == ["broken row", "no caption"]


def test_hostile_names_in_a_shard_do_no_harm(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    names = ["/etc/evil", "../../evil", "a/../../b", "plain", "nul:*?"]
    path = tar(folder / "x.tar", [(n + s, d) for n in names for s, d in ((".png", png()), (".txt", b"cap"))])
    with tarfile.open(path, "a") as file:
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "plain.png")):
            link = tarfile.TarInfo(f"link{kind.decode()}.png")
            link.type, link.linkname = kind, target
            file.addfile(link)
    records = open_records(folder, progress=False)
    assert [record.prompt for record in records] == ["cap"] * len(names) and not records.bad
    for to in ("official", "webdataset"):
        convert(records, tmp_path / to, to)
        assert contents(open_records(tmp_path / to, progress=False)) == contents(records)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "official", "webdataset"]


def test_names_for_any_key():
    keys = [
        "a.png",
        "/a.png",
        "../a.png",
        "A.png",
        "x.tar/b.png",
        ".h/.i.png",
        "",
        "..",
        "l" * 400 + ".jpg",
        "n\n\0.png",
        "a-11.png",
        "A.Png",
        "d/a.png",
        "d/a.png/b.png",
        "x\udcff/\ud800.png",
        "deep/" * 2000 + "a.png",
        "e" * 300 + "/" + "ß" * 300 + "." + "s" * 300,
    ]
    names = safe_names(keys)
    assert len({name.lower() for name in names}) == len(keys)
    for name in names:
        parts = name.split("/")
        assert not set(parts) & {"", ".", ".."} and all(len(p.encode()) < 230 and p.isprintable() for p in parts)
    assert names[0] == "a.png" and names[4] == "x/b.png"
    assert not {"/".join(name.lower().split("/")[:-1]) for name in names} & {name.lower() for name in names}
    assert all(len(name.encode()) < 1500 for name in names)


def test_no_folder_of_a_target_grows_without_bound():
    names = safe_names([f"x/{i}.png" for i in range(2500)] + ["y.png"])
    folders = Counter(name.rpartition("/")[0] for name in names)
    assert folders == {"x": 1000, "x/part-0001": 1000, "x/part-0002": 500, "": 1}


def test_faults_of_shards(tmp_path):
    good = tar(tmp_path / "good.tar", [("a.png", png()), ("a.txt", b"a"), ("b.png", png(0)), ("b.txt", b"b")])
    data = good.read_bytes()
    cut = tmp_path / "cut.tar"
    second = data.index(b"b.png")
    cut.write_bytes(data[: second + 2000])
    records = open_records(cut, progress=False)
    assert [r.prompt for r in records] == ["a"] and [row.reason for row in records.bad] == ["broken row"]
    (tmp_path / "text.tar").write_text("no tar at all " * 100)
    with pytest.raises(MindSigmaError, match="text.tar"):
        open_records(tmp_path / "text.tar")
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(MindSigmaError, match="decompress"):
        open_records(tmp_path / "x.tar.gz")
    odd = [
        ("c.png", b""),
        ("c.txt", b"empty image"),
        ("d.png", png()),
        ("d.json", b"{broken"),
        ("e.png", png()),
        ("e.json", b"[1]"),
        ("f.png", png()),
        ("f.txt", b"\xff\xff"),
        ("g.txt", b"alone"),
        ("h.png", png()),
        ("h.jpg", png()),
        ("h.txt", b"twice"),
        ("i.png", png()),
        ("j.png", b"junk"),
        ("j.txt", b"junk"),
    ]
    records = open_records(tar(tmp_path / "odd.tar", odd), progress=False)
    assert [r.prompt for r in records] == ["twice"]
    assert records.bad_by_reason() == {"not a readable image": 2, "broken row": 3, "duplicate": 1, "no caption": 1}


def test_what_is_no_data_set_is_told_in_one_line(tmp_path):
    empty, several = tmp_path / "empty", tmp_path / "several"
    empty.mkdir()
    several.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (several / name).write_text('{"path": "x.png", "prompt": "a"}\n')
    broken = official(tmp_path / "broken", [])
    index = broken / "InternData" / "data_info.json"
    for path, text in ((tmp_path / "absent", "no such"), (empty, "no usable"), (several, "a.jsonl, b.jsonl")):
        with pytest.raises(MindSigmaError, match=text):
            open_data(path)
    for text, message in (("[]", "no usable"), ('[{"path": ', "data_info.json: not valid JSON"), ("[" * 10**5, "JSON")):
        index.write_text(text)
        with pytest.raises(MindSigmaError, match=message):
            open_data(broken)
    index.write_bytes(b"[\xff]")
    with pytest.raises(MindSigmaError, match="UTF-8"):
        open_data(broken)
    for name, data in (("a.csv", b""), ("b.csv", b"path,prompt\n\xff,a\n"), ("c.txt", b"x")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MindSigmaError) as caught:
            open_data(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_lines_of_a_table_fail_alone(tmp_path):
    write_images(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"path": "0/0.png", "prompt": "a\\ud800b"}\n{"path"\n\n[1]\n')
    records = open_records(tmp_path / "rows.jsonl", progress=False)
    assert [r.prompt for r in records] == ["a?b"] and [row.where[-6:] for row in records.bad] == ["line 2", "line 4"]
    (tmp_path / "rows.csv").write_text('path,prompt\n0/0.png,a\n0/2.png,"b, c",d\n1/1.png\n')
    records = open_records(tmp_path / "rows.csv", progress=False)
    assert [r.prompt for r in records] == ["a"] and [row.reason for row in records.bad] == ["broken row"] * 2


def test_paths_of_a_table_may_be_relative_to_another_folder(tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "lists").mkdir()
    rows = entries()
    rows[0]["path"] = str(tmp_path / "images" / rows[0]["path"])
    (tmp_path / "lists" / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(MindSigmaError, match="no usable"):
        open_records(tmp_path / "lists", progress=False)
    records = open_records(tmp_path / "lists", image_root=tmp_path / "images", progress=False)
    assert [record.key for record in records] == [row["path"] for row in entries()]


def test_check_finds_what_headers_hide(tmp_path):
    rows = entries(height=64, width=64)
    path = official(tmp_path / "set", rows)
    cut = path / "InternImgs" / rows[3]["path"]
    cut.write_bytes(cut.read_bytes()[:-3000])
    records = open_records(path, strict=True, progress=False)
    assert len(records) == 4
    checked, corrected = check_images(records)
    assert corrected == 2 and checked.sizes.tolist() == [list(size) for size in SIZES[:3]]
    assert [row.reason for row in checked.bad] == ["not a readable image"] and rows[3]["path"] in checked.bad[0].where


def test_links_may_lead_out_of_the_folder(tmp_path):
    write_images(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "linked")
    (tmp_path / "rows.json").write_text(json.dumps([{**row, "path": f"linked/{row['path']}"} for row in entries()]))
    assert len(open_records(tmp_path / "rows.json", progress=False)) == 4
    assert find_layout(tmp_path)[0] == "jsonl"


def test_linked_folders_are_read_once(tmp_path):
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
        picture(1).save(tmp_path / folder / "a.png")
        (tmp_path / folder / "a.txt").write_text(folder)
    os.symlink(tmp_path / "elsewhere", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere" / "circle")
    assert [r.key for r in open_records(tmp_path / "data", progress=False)] == ["a.png", "link/a.png"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(MindSigmaError, match="Permission denied"):
        open_records(tmp_path)

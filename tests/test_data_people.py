"""Data sets as people keep them: suffixes, captions, tables and shards of other tools; what is not read is told."""

import gzip
import io
import json
import os
import tarfile

import pytest
from PIL import Image, PngImagePlugin

from mindsigma.data import open_records
from mindsigma.data.check import check_images
from mindsigma.data.images import FORMATS, SUFFIXES
from mindsigma.errors import MindSigmaError


def encoded(kind="PNG", size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind)
    return file.getvalue()


PNG = encoded()


def write(folder, files):
    """Files by name: bytes, texts, or values that become JSON."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(data, (bytes, str)):
            data = json.dumps(data)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def shard(files):
    """Bytes of a tar of files by name."""
    result = io.BytesIO()
    with tarfile.open(fileobj=result, mode="w") as tar:
        for name, data in files.items():
            data = data if isinstance(data, bytes) else data.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return result.getvalue()


def prompts(records):
    return {record.key: record.prompt for record in records}


def read(path, **options):
    return open_records(path, progress=False, **options)


def refused(path, *words):
    with pytest.raises(MindSigmaError) as caught:
        read(path)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("upper", [False, True])
def test_every_suffix_that_pillow_decodes(tmp_path, upper):
    other = {"DIB": "BMP", "MPO": "JPEG", "SUN": None, "PSD": None, "AVIF": None}
    kinds = {kind: other.get(kind, kind) for kind in FORMATS}
    suffixes = [(s, kinds[kind]) for kind, all_of in FORMATS.items() for s in all_of if kinds[kind]]
    for i, (suffix, kind) in enumerate(suffixes):
        name = f"{i}{suffix.upper() if upper else suffix}"
        write(tmp_path, {name: encoded(kind), f"{i}.txt": f"caption {i}"})
    assert len(suffixes) > 30
    records, corrected = check_images(read(tmp_path, strict=True))
    assert sorted(prompts(records).values()) == sorted(f"caption {i}" for i in range(len(suffixes))) and not corrected


def test_what_is_not_read_is_a_bad_row(tmp_path):
    names = ["0.heic", "1.JXL", "2.svg", "3.tar.gz", "4.tgz", "5.parquet", "6.zip", "7.xyz", "8"]
    write(tmp_path, {"good.png": PNG, "good.txt": "good", "README.txt": "notes", "good.npz": b"cached"})
    write(tmp_path, dict.fromkeys(names, b"x"))
    write(tmp_path, {f"{i}.txt": "a caption" for i in range(9)})
    records = read(tmp_path)
    assert prompts(records) == {"good.png": "good"}
    assert {os.path.basename(row.where) for row in records.bad} == set(names)
    assert {row.reason for row in records.bad} == {"kind of file that is not read"}
    assert not {".heic", ".eps", ".ico", ".pdf"} & SUFFIXES


def test_texts_beside_images(tmp_path):
    files = {
        "a.png": PNG,
        "a.caption": "caption",
        "b.png": PNG,
        "b.TXT": "upper",
        "c.png": PNG,
        "c.cap": "cap",
        "d.png": PNG,
        "d.json": {"caption": "side-car", "width": 7},
        "e.png": PNG,
        "e.png.json": {"tags": ["red", "square"]},
        "f.png": PNG,
        "f.txt": "ü".encode("utf-16"),
        "g.png": PNG,
        "g.txt": "  ",
        "g.caption": "behind an empty text",
        "h.png": PNG,
        "h.txt": "text first",
        "h.json": {"prompt": "not this"},
        "i.png": PNG,
        "i.json": "[",
        "j.png": PNG,
        "j.txt": "",
    }
    records = read(write(tmp_path, files))
    assert [record.prompt for record in records] == [
        *("caption", "upper", "cap", "side-car", "red, square", "ü", "behind an empty text", "text first"),
    ]
    assert {record.width for record in records} == {32}
    assert [(row.reason, row.where[-5:]) for row in records.bad] == [("broken row", "i.png"), ("no caption", "j.png")]


def test_large_texts_in_a_png_do_no_harm(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "y" * 2_000_000, zip=True)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=info)
    write(tmp_path, {"a.txt": "x"})
    assert len(check_images(read(tmp_path, strict=True))[0]) == 1


@pytest.mark.parametrize(
    "table",
    [
        "\ufefffile_name;text\r\nimg/0.png;a, b\r\n",
        "path\tprompt\nimg/0.png\ta, b\n",
        "image|caption\nimg/0.png|a, b\n",
        'Path,Prompt\nimg/0.png,"a, b"\n',
        "sep=;\nfile_name;text\nimg/0.png;a, b\n",
        "\nfile_name;text;;\n\nimg/0.png;a, b;;\n",
        'path,prompt\rimg/0.png,"a, b"\r',
        "path\tprompt\nimg/0.png\ta, b\n".encode("utf-16"),
    ],
)
def test_separators_are_found_by_the_header(tmp_path, table):
    write(tmp_path, {"img/0.png": PNG, "data.csv": table})
    assert prompts(read(tmp_path, strict=True)) == prompts(read(tmp_path / "data.csv")) == {"img/0.png": "a, b"}


def test_lines_of_unicode_end_no_row(tmp_path):
    write(tmp_path, {"0.png": PNG, "a.csv": "path,prompt\n0.png,a\u2028b\x85c\n"})
    assert prompts(read(tmp_path, strict=True)) == {"0.png": "a\u2028b\x85c"}
    write(tmp_path, {"b.jsonl": '{"path": "0.png", "prompt": "a\u2028b"}\n'})
    assert prompts(read(tmp_path / "b.jsonl")) == {"0.png": "a\u2028b"}


def test_the_message_names_the_table_that_does_not_count(tmp_path):
    write(tmp_path, {"0.png": PNG, "data.csv": "0.png,a cat\n"})
    refused(tmp_path, "data.csv: no column is named path, image", "0.png,a cat")
    refused(tmp_path / "data.csv", "no column is named path, image")
    write(tmp_path / "nested", {"train/0.png": PNG, "train/metadata.csv": "file_name,text\n0.png,a\n"})
    refused(tmp_path / "nested", "train/metadata.csv: give this table")
    write(tmp_path / "coco", {"0.png": PNG, "a.json": {"images": [], "annotations": []}})
    refused(tmp_path / "coco", "a.json: ")
    write(tmp_path / "latin", {"0.png": PNG, "a.csv": b"path,prompt\n0.png,\xfc\n"})
    refused(tmp_path / "latin" / "a.csv", "not UTF-8 text")


def test_a_json_object_keyed_by_images(tmp_path):
    images = {"0.png": PNG, "sub/1.png": PNG, "sub/2.png": PNG, "3.png": PNG}
    captions = {
        "0": {"caption": "a cat", "tags": "grey, old", "train_resolution": [8, 8], "width": 8, "height": 8},
        "/elsewhere/train/1.png": {"tags": "only, tags"},
        "d:\\train\\2.png": {"caption": "of Windows"},
        "3.png": "a text",
        "4": {"caption": "gone"},
        "../5.png": {"caption": "outside"},
        "6": {"caption": ""},
    }
    folder = write(tmp_path, {**images, "meta_cap.json": captions})
    for indent in (None, 1):
        (folder / "meta_cap.json").write_text(json.dumps(captions, indent=indent))
        records = read(folder)
        assert prompts(records) == {
            "0.png": "a cat, grey, old",
            "sub/1.png": "only, tags",
            "sub/2.png": "of Windows",
            "3.png": "a text",
        }
        assert sorted(row.reason for row in records.bad) == ["no caption", "no image file", "outside the folder"]
        assert records.sizes.tolist() == [[32, 32]] * 4
    write(tmp_path / "other", {"a.png": PNG, "a.txt": "text", "config.json": {"model": {"prompt": "no image"}}})
    assert prompts(read(tmp_path / "other")) == {"a.png": "text"}
    twice = write(tmp_path / "twice", {"x/a.png": PNG, "y/a.png": PNG, "y/b.png": PNG})
    write(twice, {"meta.json": {"a": {"caption": "which?"}, "b": {"caption": "b"}}})
    assert prompts(read(twice)) == {"y/b.png": "b"} and "may be any of" in read(twice).bad[0].detail


def test_names_with_dots_in_shards(tmp_path):
    files = {
        "a.b.c.png": PNG,
        "a.b.c.txt": "own",
        "a.b.d.png": PNG,
        "a.b.d.txt": "other",
        "0001.seg.png": PNG,
        "0001.PNG": PNG,
        "0001.TXT": "main",
        "0002.seg.png": PNG,
        "0002.caption": "mask alone",
        "0003.heic": b"x",
        "0003.txt": "a photograph",
        "0004.mp4": b"x",
        "0004.json": "{}",
        "notes.txt": "no sample",
        "._0005.png": b"of a Mac",
        "./deep.er/0006.png": PNG,
        "./deep.er/0006.json": '{"tags": ["t", "u"]}',
    }
    records = read(write(tmp_path, {"x.tar": shard(files)}))
    assert prompts(records) == {
        "x.tar/a.b.c.png": "own",
        "x.tar/a.b.d.png": "other",
        "x.tar/0001.png": "main",
        "x.tar/0002.seg.png": "mask alone",
        "x.tar/./deep.er/0006.png": "t, u",
    }
    assert {(row.reason, row.where.rpartition(" ")[2]) for row in records.bad} == {
        ("duplicate", "0001.seg.png"),
        ("kind of file that is not read", "0003.heic"),
        ("kind of file that is not read", "0004.mp4"),
    }


def test_nested_shards_and_what_lies_beside_them(tmp_path):
    one = shard({"0.png": PNG, "0.txt": "a"})
    write(tmp_path, {"a/00000.tar": one, "b/c/00000.TAR": one, "d.tar": b"damaged" * 99, "e.tar": gzip.compress(one)})
    write(tmp_path, {"f.tar.zst": b"x", "loose.png": PNG, "loose.txt": "loose"})
    records = read(tmp_path)
    assert prompts(records) == {"a/00000.tar/0.png": "a", "b/c/00000.TAR/0.png": "a"}
    told = {os.path.basename(row.where): row.detail for row in records.bad}
    assert set(told) == {"d.tar", "e.tar", "f.tar.zst", "loose.png"}
    assert "decompress it to .tar" in told["e.tar"] and "decompress it to .tar" in told["f.tar.zst"]


@pytest.mark.parametrize("name", ["0.tar.gz", "0.tgz", "0.tar.zst", "0.TAR.GZ", "sub/0.tar.xz", "0.tar"])
def test_compressed_shards_are_refused_by_name(tmp_path, name):
    write(tmp_path, {name: gzip.compress(shard({"0.png": PNG, "0.txt": "a"}))})
    for path in (tmp_path, tmp_path / name):
        refused(path, os.path.basename(name), "compressed shards cannot be read in place; decompress it to .tar")


def test_several_official_indices(tmp_path):
    write(tmp_path, {f"InternImgs/{i}.png": PNG for i in range(3)})
    write(tmp_path, {"InternData/data_info.json": [{"path": "2.png", "prompt": "c"}]})
    write(tmp_path, {"InternData/a.json": [{"path": f"{i}.png", "prompt": "ab"[i]} for i in range(2)]})
    write(tmp_path, {"InternData/notes.json": {"made": "by hand"}})
    records = read(tmp_path, strict=True)
    assert prompts(records) == {"2.png": "c", "0.png": "a", "1.png": "b"} and records.layout == "official, 2 indices"
    (tmp_path / "InternData" / "data_info.json").unlink()
    assert len(read(tmp_path / "InternData")) == 2

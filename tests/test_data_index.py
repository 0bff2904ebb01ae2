"""An index tells what reading the data set tells, is built by many processes, and grows without changing."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from killing import killed_everywhere
from test_data_records import entries, layouts, official, png, tar  # noqa: F401, layouts is a fixture

from mindsigma.data import BucketSampler, Index, Loader, Resolution, index_building, open_data, open_records, orders
from mindsigma.data.columns import Column
from mindsigma.data.index_building import Building
from mindsigma.data.shares import claim, from_share
from mindsigma.errors import MindSigmaError
from mindsigma.training import record_list
from mindsigma.training.record_list import open_list


def build(source, target, **options):
    return Building(source, target, **options).run()


def told(records):
    return list(records), sorted(records.bad), records.sizes[:].tolist(), records.fingerprint()


@pytest.fixture
def shards(tmp_path):
    """Two shards; of the five samples one has no caption and one no image that opens."""
    folder = tmp_path / "source"
    folder.mkdir()
    tar(folder / "a.tar", [("0.png", png(0)), ("0.txt", b"zero"), ("1.png", png(1)), ("1.txt", b"one")])
    tar(folder / "b.tar", [("2.png", png(2)), ("2.txt", "zwei ö".encode()), ("3.png", b"x"), ("3.txt", b"bad")])
    return folder


def test_an_index_of_every_layout_is_what_reading_it_gives(layouts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(index_building, "PIECE_ROWS", 3)
    monkeypatch.chdir(tmp_path)
    for name, path in layouts.items():
        assert build(path, tmp_path / "index" / name).version == 1
        index, direct = open_data(tmp_path / "index" / name), open_records(path, progress=False)
        assert isinstance(index, Index) and told(index) == told(direct), name
        assert index.layout == f"index of {direct.layout}" and index.count_captions() == direct.count_captions()
        assert [index[i] for i in (0, -1)] == [direct[0], direct[3]]
        assert index.image(2).tobytes() == direct.image(2).tobytes()
        assert sorted(os.listdir(index.path)) == ["mindsigma-index.json", "part-0001.safetensors", "version-0001.json"]


def test_bad_rows_are_those_of_reading(shards, tmp_path, monkeypatch):
    rows = [*entries(), {"path": "absent.png", "prompt": "a"}, {"path": "../x.png", "prompt": "a"}, {"path": "0/0.png"}]
    rows += [{"path": "0/0.png", "prompt": "twice"}, {"path": "1/1.png", "prompt": "a", "height": 9, "width": 900}]
    rows = [{"path": "1/3.png", "prompt": "far too wide", "height": 9, "width": 900}, *rows]
    monkeypatch.setattr(index_building, "PIECE_ROWS", 2)
    for i, path in enumerate((official(tmp_path / "official", rows), shards)):
        build(path, tmp_path / f"{i}")
        index, direct = open_data(tmp_path / f"{i}"), open_records(path, progress=False)
        assert [*index] == [*direct] and index.fingerprint() == direct.fingerprint()
        where, reasons = (sorted({row[n] for row in direct.bad}) for n in (0, 1))
        assert sorted({row[0] for row in index.bad}) == where and sorted(index.bad_by_reason()) == reasons
        assert len(index.bad) == len(direct.bad)
        with pytest.raises(MindSigmaError, match="without strict"):
            open_data(tmp_path / f"{i}", strict=True)
    with pytest.raises(MindSigmaError, match="was built with --max-ratio 4.5, not 2"):
        open_data(tmp_path / "0", max_ratio=2)
    shutil.rmtree(shards)
    shards.mkdir()
    tar(shards / "a.tar", [("0.png", b"x"), ("0.txt", b"zero")])
    with pytest.raises(MindSigmaError, match=r"no usable image.*e\.g\. .*a\.tar"):
        build(shards, tmp_path / "none")


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_building_killed_at_any_instant_goes_on(shards, tmp_path):
    build(shards, tmp_path / "whole")
    whole, target, kills = files_of(tmp_path / "whole"), tmp_path / "index", 0
    for number in killed_everywhere(lambda: build(shards, target, threads=1)):
        if (target / "mindsigma-index.json").exists():
            assert [*open_data(target)] == [*open_data(tmp_path / "whole")]
        if number % 3 == 0:
            assert build(shards, target).version == 1
            shutil.rmtree(target)
        kills = number
    assert kills > 10 and files_of(target) == whole


def test_processes_share_the_work(shards, tmp_path):
    target = tmp_path / "index"
    one = Building(shards, target)
    with claim(target / ".building", "000001") as mine:
        assert mine and one.run() == (0, 2, 0)  # b.tar is read elsewhere; the third piece is what lies beside them
        with pytest.raises(MindSigmaError, match="no such file"):
            Index(target)
    two = Building(shards, target)
    assert two.run() == (1, 1, 0) and one.run() == (1, 0, 0)
    assert build(shards, target) == (1, 0, 0)
    assert from_share(5, 1, 2) == [2, 3, 4, 0, 1]
    with pytest.raises(MindSigmaError, match="is an index of .*--append"):
        build(tmp_path / "source" / "a.tar", target)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(MindSigmaError, match="holds something else, such as notes.txt"):
        build(shards, tmp_path / "mine")


def test_appending_makes_a_version_and_leaves_the_old(shards, tmp_path):
    target = tmp_path / "index"
    build(shards, target)
    before = files_of(target)
    first = told(Index(target))
    tar(shards / "aa.tar", [("9.png", png(3)), ("9.txt", b"nine")])
    made = build(shards, target, append=True)
    assert made == (2, 1, 0)  # only the new shard was read
    index = open_data(target)
    assert [record.key for record in index] == ["a.tar/0.png", "a.tar/1.png", "b.tar/2.png", "aa.tar/9.png"]
    assert index.version == 2 and index.fingerprints[0] == first[3] and len(index.sizes) == 4
    assert told(open_data(target / "version-0001.json")) == first
    after = files_of(target)
    assert all(after[name] == before[name] for name in before if name != "mindsigma-index.json")
    assert build(shards, target, append=True) == (2, 0, 0)
    folder = tmp_path / "more"
    shutil.copytree(shards, folder)
    for changed in ("a.tar", "aa.tar"):
        (folder / changed).unlink()
    tar(folder / "a.tar", [("0.png", png(0)), ("0.txt", b"another"), ("1.png", png(1)), ("1.txt", b"one")])
    tar(folder / "c.tar", [("4.png", png(1)), ("4.txt", b"four")])
    made = build(folder, target, append=True)
    assert made.version == 3 and made.known == 2  # a.tar/1.png and b.tar/2.png
    index = open_data(target)
    assert [record.key for record in index][4:] == ["c.tar/4.png"] and index[4].file == str(folder / "c.tar")
    (row,) = [row for row in index.bad if row.reason == "duplicate"]
    assert "a.tar/0.png is in the index with other captions" in row.detail
    os.utime(shards / "b.tar", (1, 1))
    with pytest.raises(MindSigmaError, match=r"b\.tar: is another file than when it was indexed"):
        build(shards, target, append=True)


@pytest.mark.parametrize("largest", [1, 100], ids=["by version", "by record"])
def test_a_run_takes_a_later_version_if_it_may(shards, tmp_path, monkeypatch, largest):
    monkeypatch.setattr(record_list, "LARGEST_SHUFFLED", largest)
    target, file = tmp_path / "index", tmp_path / "data.safetensors"
    build(shards, target)
    open_list(open_records(shards, progress=False), file).write()  # a run that began without the index
    index = open_data(target)
    assert open_list(index, file, True).follows
    open_list(index, file).write()
    tar(shards / "c.tar", [("9.png", png(3)), ("9.txt", b"nine")])
    build(shards, target, append=True)
    later = open_data(target)
    refused = open_list(later, file, True)
    assert "1 records are new" in refused.difference and not refused.follows
    taken = open_list(later, file, True, True)
    assert taken.follows and taken.new == 1 and taken.fingerprint == later.fingerprint()
    if largest == 1:
        build(shards / "a.tar", tmp_path / "other")
        assert "no later version" in open_list(open_data(tmp_path / "other"), file, True, True).difference
    file.write_bytes(file.read_bytes()[:-3])
    assert open_list(later, file, True).difference and open_list(index, file, True).fingerprint == index.fingerprint()


def test_batches_of_an_index_are_those_of_reading(layouts, tmp_path, monkeypatch):  # noqa: F811
    build(layouts["webdataset"], tmp_path / "index")
    resolution = Resolution(256, True)
    for largest in (100, 2):  # both orders
        monkeypatch.setattr(orders, "LARGEST_SHUFFLED", largest)
        loaded = []
        for source in (open_records(layouts["webdataset"], progress=False), open_data(tmp_path / "index")):
            sampler = BucketSampler(source, 2, resolution, 3)
            loaded.append(list(Loader(source, sampler, seed=1).batches(0, 2 * len(sampler))))
        for one, other in zip(*loaded):
            if largest == 100:
                assert np.array_equal(one.images, other.images) and one.captions == other.captions
            assert np.array_equal(one.draws, other.draws) and one.size == other.size
        assert {text for batch in loaded[1] for text in batch.captions} >= {"long 1", "long 3"}


def test_moved_data_are_found(shards, tmp_path):
    (tmp_path / "here").mkdir()
    shutil.move(shards, tmp_path / "here" / "source")
    build(tmp_path / "here" / "source", tmp_path / "here" / "index")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert open_data(tmp_path / "there" / "index").image(0).size == (60, 40)
    shutil.move(tmp_path / "there" / "source", tmp_path / "elsewhere")
    with pytest.raises(MindSigmaError, match=r"a\.tar.*no such file"):
        open_data(tmp_path / "there" / "index").image(0)
    assert open_data(tmp_path / "there" / "index", image_root=str(tmp_path / "elsewhere")).image(0).size == (60, 40)


def test_damage_is_told_with_its_file(shards, tmp_path):
    target = tmp_path / "index"
    build(shards, target)
    part, current = target / "part-0001.safetensors", target / "mindsigma-index.json"
    data, document = part.read_bytes(), json.loads(current.read_text())

    def refused(match):
        with pytest.raises(MindSigmaError, match=match) as caught:
            list(open_data(target))
        assert "\n" not in str(caught.value)

    for wrong in (b"", data[:-1], data[:50], data + b"\0"):
        part.write_bytes(wrong)
        refused(r"part-0001\.safetensors: ")
    for name in ("key", "prompt.ends", "by_ratio", "bad.where"):
        part.write_bytes(data.replace(f'"{name}"'.encode(), f'"{name[:-1]}_"'.encode()))
        refused(r"part-0001\.safetensors: ")
    header = 8 + int.from_bytes(data[:8], "little")
    spoiled = 0
    for place in range(header, len(data), 5):  # every byte may be anything: told, or another row of the same files
        part.write_bytes(data[:place] + b"\xff" + data[place + 1 :])
        try:
            rows = list(open_data(target))
            assert all(Path(row.file).parent == shards for row in rows)
        except MindSigmaError as error:
            assert "part-0001" in str(error)
            spoiled += 1
    assert spoiled > 10
    part.write_bytes(data)
    for changes in ({"parts": []}, {"parts": [1]}, {"version": "1"}, {"format_version": 2}):
        current.write_text(json.dumps({**document, **changes}))
        refused(r"mindsigma-index\.json: ")
    for name, value in (("file", "../x.safetensors"), ("rows", 2), ("rows", "3"), ("bytes", 1), ("relative", None)):
        current.write_text(json.dumps({**document, "parts": [{**document["parts"][0], name: value}]}))
        refused("mindsigma-index|part-0001")


def test_columns_of_several_arrays_are_one():
    whole = np.arange(20).reshape(10, 2)
    column = Column([whole[:3], whole[3:3], whole[3:]])
    assert len(column) == 10 and column.shape == (10, 2) and np.array_equal(np.asarray(column, np.float64), whole)
    for index in (slice(2, 5), slice(None), slice(8, 2, -2), slice(5, 5), np.array([9, 0, 3, -1]), 4, -1):
        assert np.array_equal(column[index], whole[index])
    with pytest.raises(IndexError):
        column[10]


def test_the_tool_builds_appends_and_reports(shards, tmp_path, monkeypatch, capsys):
    from conftest import load_tool

    def tool(*words):
        monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, words)])
        load_tool("prepare_data").main()
        return capsys.readouterr().out

    said = tool(shards, tmp_path / "index", "--index")
    assert "version 1, pieces read here: 3" in said and "rows 4, kept 3, bad 1" in said
    assert (tmp_path / "index.bad_rows.txt").read_text().startswith("not a readable image\t")
    tar(shards / "c.tar", [("9.png", png(3)), ("9.txt", b"nine")])
    assert "version 2, pieces read here: 1" in tool(shards, tmp_path / "index", "--index", "--append")
    assert "kept 4" in tool(tmp_path / "index") and "layout: index of webdataset" in tool(tmp_path / "index")
    for words, said in (
        ([shards, "--index"], "needs a target"),
        ([shards, tmp_path / "x", "--append"], "--append is for --index"),
    ):
        with pytest.raises(MindSigmaError, match=said):
            tool(*words)

"""Features in shards are those of the other form, survive kills, and are told apart where they are damaged."""

import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import load_tool
from killing import killed_everywhere
from test_data_features import LENGTH, SMALL, Stub, copied, extract, files_of, records, spoil  # noqa: F401, a fixture

from mindsigma.data import BucketSampler, FeatureSet, Loader, Records, Resolution, open_data, open_features, orders
from mindsigma.data.feature_shards import Translation
from mindsigma.data.features import sample_file
from mindsigma.errors import MindSigmaError
from mindsigma.training.extraction import Extraction
from mindsigma.training.record_list import open_list

MULTI = Resolution(256, True)


def extraction_of(records, folder, encoders=None, resolution=SMALL, **options):  # noqa: F811
    options = {"shard_records": 4, "threads": 1, "batch_size": 2, **options}
    return Extraction(records, folder, encoders or Stub(), resolution, max_length=LENGTH, **options)


def shard(records, folder, rank=0, ranks=1, **options):  # noqa: F811
    extraction = extraction_of(records, folder, **options)
    extraction.run_shards(rank, ranks)
    return extraction.finish()


@pytest.fixture(scope="module")
def both(records, tmp_path_factory):  # noqa: F811
    """Folders of the same features: a file a record, and three shards."""
    folder = tmp_path_factory.mktemp("both")
    extract(records, folder / "files", resolution=MULTI, batch_size=2)
    assert shard(records, folder / "shards", resolution=MULTI) == 0
    return folder / "files", folder / "shards"


@pytest.fixture
def shards(both, tmp_path):
    """A copy of the shards that a test may spoil."""
    return Path(shutil.copytree(both[1], tmp_path / "shards"))


def test_shards_hold_what_files_hold(both, monkeypatch):
    files, shards = map(open_data, both)
    assert sorted(os.listdir(both[1])) == ["features.json", "index.safetensors", "null_caption.safetensors", "shards"]
    assert os.listdir(both[1] / "shards") and len(list((both[1] / "shards").glob("001-0000[012].tar"))) == 3
    assert isinstance(shards, FeatureSet) and [*files] == [*shards] and len(shards) == 9
    assert files.fingerprint() == shards.fingerprint() and np.array_equal(files.sizes, shards.sizes)
    for index in range(9):
        one, other = files.tensors(index), shards.tensors(index)
        assert one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
        assert files.bucket(index) == shards.bucket(index) and files[index] == shards[index]
        shards.require_sound(index)
        for real in (True, False):
            for a, b in zip(files.read(index, real), shards.read(index, real)):
                assert a.dtype == b.dtype and np.array_equal(a, b)
    assert np.array_equal(files.null_caption()[0], shards.null_caption()[0])
    for largest in (100, 4):  # today's order, and that of many
        monkeypatch.setattr(orders, "LARGEST_SHUFFLED", largest)
        loaders = [Loader(s, BucketSampler(s, 3, MULTI, 1), seed=2, max_length=30, threads=2) for s in (files, shards)]
        for one, other in zip(*(loader.batches(0, 2 * len(loader.sampler)) for loader in loaders)):
            if largest == 100:
                assert np.array_equal(one.moments, other.moments) and np.array_equal(one.states, other.states)
            assert one.size == other.size and np.array_equal(one.draws, other.draws)
    assert open_list(shards, "none").fingerprint == open_list(files, "none").fingerprint
    with pytest.raises(MindSigmaError, match="training wants"):
        shards.check_use(SMALL, LENGTH)
    with tarfile.open(both[1] / "shards" / "001-00000.tar") as tar:  # any other program reads them
        assert len(tar.getnames()) == 4


def test_a_killed_extraction_goes_on(records, tmp_path):  # noqa: F811
    shard(records, tmp_path / "whole")
    whole, folder, kills = files_of(tmp_path / "whole"), tmp_path / "features", 0
    for number in killed_everywhere(lambda: shard(records, folder)):
        if (folder / "index.safetensors").exists():
            assert len(open_features(folder)) == 9
        if number % 4 == 0:
            assert shard(records, folder) == 0 and files_of(folder) == whole
            shutil.rmtree(folder)
        kills = number
    assert kills > 20 and files_of(folder) == whole


def test_half_a_shard_is_gone_on_with_at_every_byte(records, tmp_path):  # noqa: F811
    folder = tmp_path / "features"
    shard(records, folder, shard_records=9)
    whole, path = files_of(folder), folder / "shards" / "001-00000.tar"
    data, images = path.read_bytes(), []
    for length in [*range(0, len(data), 1537), len(data)]:
        shutil.rmtree(folder)
        extraction_of(records, folder, shard_records=9)
        (folder / "shards").mkdir()
        path.with_name(path.name + ".growing").write_bytes(data[:length])
        stub = Stub()
        assert shard(records, folder, encoders=stub, shard_records=9) == 0 and files_of(folder) == whole
        images.append(stub.images)
    assert images[0] == 10 and images[-1] == 0 and images == sorted(images, reverse=True)
    spoiled = bytearray(data)
    spoiled[len(data) // 2] ^= 1  # a byte of a member that was never brought to the disk
    shutil.rmtree(folder)
    extraction_of(records, folder, shard_records=9)
    (folder / "shards").mkdir()
    path.with_name(path.name + ".growing").write_bytes(bytes(spoiled))
    assert shard(records, folder, shard_records=9) == 0 and files_of(folder) == whole


def test_processes_take_shards_from_each_other(records, tmp_path):  # noqa: F811
    folder = tmp_path / "features"
    one, two = extraction_of(records, folder), extraction_of(records, folder)
    with one.folder.claim(2) as mine:
        assert mine and two.run_shards(1, 2) == 8 and two.finish() == 1
        with pytest.raises(MindSigmaError, match="not finished"):
            open_data(folder)
    assert one.run_shards(0, 2) == 1 and one.finish() == 0
    shard(records, tmp_path / "alone")
    assert files_of(folder) == files_of(tmp_path / "alone")
    assert two.run_shards(1, 2) == 0 and two.finish() == 0  # who comes late does nothing
    assert files_of(folder) == files_of(tmp_path / "alone")


def test_what_is_new_or_changed_makes_another_round(records, tmp_path):  # noqa: F811
    mine, folder = copied(records, tmp_path / "images"), tmp_path / "features"
    shard(Records(list(mine)[:7]), folder)
    before = files_of(folder)
    assert extraction_of(Records(list(mine)[:7]), folder).folder.count == 0
    changed = [mine[0]._replace(prompt="another caption"), *list(mine)[1:]]
    shutil.copy(mine[6].file, mine[3].file)
    os.utime(mine[2].file, (1, 1))  # touched alone
    stub, now = Stub(), Records(changed[:5] + changed[6:])  # one is gone
    extraction = extraction_of(now, folder, stub)
    assert extraction.folder.missing.tolist() == [0, 3, 6, 7]
    extraction.run_shards()
    assert len(open_features(folder)) == 7  # until all is there
    assert extraction.finish() == 0
    after, features = files_of(folder), open_features(folder)
    assert all(after[name] == before[name] for name in before if name.startswith("shards"))
    assert "shards/002-00000.tar" in after
    extract(now, tmp_path / "files")
    fresh = open_features(tmp_path / "files")
    assert [*features] == [*fresh] and features.fingerprint() == fresh.fingerprint()
    for index in range(8):
        assert np.array_equal(features.read(index, True)[0], fresh.read(index, True)[0])
    assert shard(now, folder) == 0 and files_of(folder) == after
    (folder / "shards" / "001-00000.tar").unlink()  # as damage asks for
    lost = extraction_of(now, folder)
    assert lost.folder.missing.tolist() == [1, 2] and shard(now, folder) == 0
    assert [*open_features(folder)] == [*fresh]
    for index in range(8):
        assert np.array_equal(open_features(folder).read(index, True)[0], fresh.read(index, True)[0])


def test_bad_images_are_listed_and_left_out(records, tmp_path):  # noqa: F811
    mine, folder = copied(records, tmp_path / "images"), tmp_path / "features"
    good = {i: spoil(mine[i]) for i in (0, 5)}
    extraction = extraction_of(mine, folder)
    extraction.run_shards()
    assert extraction.finish() == 0 and [Path(row.where).name for row in extraction.left_out] == ["0.png", "5.png"]
    assert len(open_features(folder)) == 7 and len((folder / "left_out.txt").read_text().splitlines()) == 2
    shards = os.listdir(folder / "shards")
    assert shard(mine, folder) == 0 and os.listdir(folder / "shards") == shards  # tried again, nothing was added
    for i, data in good.items():
        Path(mine[i].file).write_bytes(data)
    assert shard(mine, folder) == 0 and len(open_features(folder)) == 9 and not (folder / "left_out.txt").exists()
    assert [row[0] for row in open_features(folder)] == [record.key for record in mine]
    (tmp_path / "bad.png").write_bytes(b"junk")
    broken = Records([records[0]._replace(file=str(tmp_path / "bad.png"))])
    for _ in range(2):
        with pytest.raises(MindSigmaError, match=r"bad\.png.*prepare_data"):
            shard(broken, tmp_path / "none")
    shutil.copy(records[0].file, tmp_path / "bad.png")
    assert shard(broken, tmp_path / "none") == 0


def test_damage_is_told_with_its_shard(shards):
    features = open_features(shards)
    path, index = shards / "shards" / "001-00001.tar", shards / "index.safetensors"
    data = path.read_bytes()
    offset, length = features.place(5)[1:]
    for place in (offset, offset + 20, offset + length - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(MindSigmaError, match=r"001-00001\.tar: 5\.png: damaged, its checksum.*extract_features"):
            open_features(shards).read(5, True)
    features.read(1, True)
    path.write_bytes(data[:offset])
    with pytest.raises(MindSigmaError, match=r"001-00001\.tar: 5\.png: cut off"):
        open_features(shards).tensors(5)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(MindSigmaError, match=r"001-00001\.tar: not a regular file"):
        open_features(shards).tensors(5)
    sampler = BucketSampler(features, 3, MULTI)
    loader = Loader(open_features(shards), sampler, max_length=30, max_bad_images=9)
    with pytest.warns(UserWarning, match=r"001-00001\.tar"):
        assert sum(batch.replaced for batch in loader.batches(0, len(sampler)))
    whole, spoiled = index.read_bytes(), 0
    for place in range(0, len(whole), 37):
        index.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            found = open_features(shards)
            [*found], found.tensors(0)
        except MindSigmaError as error:
            assert str(shards) in str(error)
            spoiled += 1
    assert spoiled > 20


def test_files_are_translated_byte_for_byte(both, records, tmp_path, monkeypatch, capsys):  # noqa: F811
    def tool(*words):
        monkeypatch.setattr("sys.argv", ["prepare_data.py", *map(str, words)])
        load_tool("prepare_data").main()
        return capsys.readouterr().out

    folder = tmp_path / "packed"
    assert f"complete: {folder}" in tool(both[0], folder, "--to", "shards", "--shard-records", "4")
    found, files = open_features(folder), open_features(both[0])
    assert [*found] == [*files] and found.fingerprint() == files.fingerprint()
    for index in range(9):
        file, offset, length = found.place(index)
        assert Path(file).read_bytes()[offset : offset + length] == files.where(index).read_bytes()
    assert extraction_of(records, folder, resolution=MULTI).folder.count == 0  # of the same images, as extracting sees
    assert Translation(files, folder, 4).run() == 0
    assert "verified: 9 records" in tool(folder, "--check") and "verified: 9 records" in tool(both[0], "--check")
    assert "samples in" in tool(folder, "--benchmark", "2", "--batch-size", "2")
    path = folder / "shards" / "001-00002.tar"
    path.write_bytes(path.read_bytes()[:1000] + b"?" + path.read_bytes()[1001:])
    with pytest.raises(MindSigmaError, match=r"1 of 9 records are damaged, e\.g\. .*001-00002\.tar: 8\.png"):
        tool(folder, "--check")
    damaged = Path(shutil.copytree(both[0], tmp_path / "damaged"))
    shutil.copy(sample_file(damaged, "0.png"), sample_file(damaged, "1.png"))
    with pytest.raises(MindSigmaError, match=r"safetensors: is of another record"):
        tool(damaged, tmp_path / "again", "--to", "shards")
    with pytest.raises(MindSigmaError, match="is in shards already"):
        tool(folder, tmp_path / "x", "--to", "shards")
    with pytest.raises(MindSigmaError, match="--to shards is for a folder of features"):
        tool(tmp_path, tmp_path / "x", "--to", "shards")


def test_the_forms_do_not_mix(both, records, tmp_path):  # noqa: F811
    with pytest.raises(MindSigmaError, match="these features are a file a record, not shards"):
        shard(records, both[0], resolution=MULTI)
    with pytest.raises(MindSigmaError, match="these features are shards, not a file a record"):
        extract(records, both[1], resolution=MULTI)
    with pytest.raises(MindSigmaError, match="made with states_dtype"):
        shard(records, both[1], resolution=MULTI, states_dtype="fp32")
    with pytest.raises(MindSigmaError, match="at least 1 record"):
        shard(records, tmp_path / "x", shard_records=-1)

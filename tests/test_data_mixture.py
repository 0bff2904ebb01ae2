"""Mixtures: each set as often as its weight says, every record once before any comes again."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
from test_data_features import LENGTH, extract, records  # noqa: F401, a fixture
from training_runs import square_features

from mindsigma.data import BucketSampler, Loader, Records, Resolution, open_data, orders
from mindsigma.data.index_building import Building
from mindsigma.data.prepared import convert
from mindsigma.errors import MindSigmaError
from mindsigma.training.record_list import VersionList, open_list

MULTI = Resolution(256, True)


@pytest.fixture
def mixture(records, tmp_path, monkeypatch):  # noqa: F811
    """mixture(weights): of a folder of nine images, an index of them, and a shard of the first three."""
    convert(records, tmp_path / "folder", "official")
    convert(Records(list(records)[:3]), tmp_path / "shards", "webdataset")
    Building(tmp_path / "folder", tmp_path / "index").run()
    monkeypatch.setattr(orders, "LARGEST_SHUFFLED", 4)  # so that the index is used as a large one

    def make(**weights):
        file = tmp_path / "three.mixture.json"
        file.write_text(json.dumps(weights))
        return open_data(file, progress=False)

    return make


def test_sets_are_taken_by_their_weights(mixture):
    source = mixture(folder=1, index=2, shards=0.5)
    assert len(source) == 21 and source[9].key == source[0].key and source.sizes.shape == (21, 2) and not source.bad
    assert [record.prompt for record in source][18:] == [source[i].prompt for i in (-3, -2, -1)]
    sampler, assigned = BucketSampler(source, 1, MULTI, 3), MULTI.assign(source.sizes)
    epochs, taken = 4, []
    for step in range(epochs * len(sampler)):
        bucket, (row,), _ = sampler.batch(step)
        assert MULTI.buckets()[assigned[row]] == bucket
        taken.append(int(row))
    # Of three shapes the folder has three images, the index six draws, the shard one record each: half of one is one.
    assert sampler.order == "keyed" and len(sampler) == 9 + 18 + 3 == sampler.summary().records
    counts = Counter(taken)
    assert [counts[i] for i in range(21)] == [epochs] * 9 + [2 * epochs] * 9 + [epochs] * 3
    again = BucketSampler(source, 1, MULTI, 3)
    assert [int(again.batch(step)[1][0]) for step in (50, 3, 77)] == [taken[step] for step in (50, 3, 77)]
    assert source.fingerprint() != mixture(folder=1, index=2, shards=1).fingerprint()


def test_what_an_epoch_leaves_the_next_takes(mixture):
    source = mixture(index=0.34)  # one of three, of each shape
    sampler = BucketSampler(source, 1, MULTI, 1)
    steps = len(sampler)
    assert steps == 3
    epochs = [sorted(int(sampler.batch(step)[1][0]) for step in range(e * steps, (e + 1) * steps)) for e in range(6)]
    assert sorted(epochs[0] + epochs[1] + epochs[2]) == list(range(9)) == sorted(epochs[3] + epochs[4] + epochs[5])
    batches = list(Loader(source, BucketSampler(source, 2, MULTI, 1), seed=1).batches(0, 3))
    assert all(batch.images.shape[0] == 2 and not batch.replaced for batch in batches)


def test_features_are_mixed(records, tmp_path):  # noqa: F811
    one = square_features(tmp_path / "one", 5)
    shutil.copytree(one, tmp_path / "two")
    extract(records, tmp_path / "other")
    file = tmp_path / "x.mixture.json"
    file.write_text(json.dumps({"one": 1, "two": 3}))
    mixed, alone = open_data(file), open_data(one)
    assert len(mixed) == 10 and mixed.max_length == alone.max_length and mixed[7] == alone[2]
    assert all(np.array_equal(a, b) for a, b in zip(mixed.read(8, True), alone.read(3, True)))
    assert np.array_equal(mixed.null_caption()[0], alone.null_caption()[0])
    sampler = BucketSampler(mixed, 4, Resolution(64), 0)
    batches = list(Loader(mixed, sampler, max_length=8).batches(0, len(sampler)))
    assert len(batches) == 5 and batches[0].moments.shape == (4, 8, 8, 8)
    kept = open_list(mixed, tmp_path / "list.safetensors")
    kept.write()
    assert isinstance(kept, VersionList) and open_list(mixed, tmp_path / "list.safetensors", True).follows
    file.write_text(json.dumps({"one": 1, "two": 2}))
    assert "no later version" in open_list(open_data(file), tmp_path / "list.safetensors", True).difference
    file.write_text(json.dumps({"one": 1, "other": 1}))
    with pytest.raises(MindSigmaError, match="other was made with .*; extract again"):
        open_data(file)


@pytest.mark.parametrize(
    "text, said",
    [
        ("{}", "names no data set"),
        ('{"a": 0}', "with a weight above 0"),
        ('{"a": "1"}', "with a weight above 0"),
        ('{"a": true}', "with a weight above 0"),
        ('{"a": 1001}', "at most 1000"),
        ('{"a.mixture.json": 1}', "no mixture"),
        ('{"absent": 1}', "absent: no such file or folder"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[1]", "not a JSON object"),
    ],
)
def test_what_is_no_mixture(tmp_path, text, said):
    (tmp_path / "x.mixture.json").write_text(text)
    with pytest.raises(MindSigmaError, match=said):
        open_data(tmp_path / "x.mixture.json")

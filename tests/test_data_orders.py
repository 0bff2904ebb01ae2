"""The order of a run: that of few records as it always was, that of many computed place by place."""

import hashlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_data_sampler import MULTI, source

from mindsigma.data import BucketSampler, Resolution, orders
from mindsigma.data.permutation import Permutation

SMALL = Resolution(1024, True, "inference")


@pytest.mark.parametrize(
    "count, seed, batch, resolution, key, incomplete, steps, digest",
    [
        (500, 0, 8, MULTI, 5, "repeat", 77, "5fe152930fca50891a9cd1fae3ca9e6e"),
        (500, 0, 16, MULTI, 1, "drop", 17, "4b2e551e26d0178a2323c3a9de65c7b5"),
        (300, 3, 7, Resolution(256), 0, "repeat", 43, "b1ad625bc9d40503395f34b25c927de8"),
        (2000, 1, 64, SMALL, 2**40, "repeat", 50, "f79863bb643dbde5cee1c84deef64596"),
    ],
)
def test_few_records_are_drawn_as_they_always_were(count, seed, batch, resolution, key, incomplete, steps, digest):
    """SHA-256 of buckets, records and draws of two epochs, as commit 05d9124 gave them."""
    sampler, found = BucketSampler(source(count, seed), batch, resolution, key, incomplete), hashlib.sha256()
    assert len(sampler) == steps and sampler.order is None
    for step in range(2 * steps + 3):
        bucket, rows, draws = sampler.batch(step)
        for data in (repr(bucket).encode(), rows.tobytes(), draws.tobytes()):
            found.update(data)
    assert found.hexdigest()[:32] == digest


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_takes_every_place_once(count):
    places = np.arange(count)
    taken = Permutation(count, 3, "x", 1)(places)
    assert taken.dtype == np.int64 and np.array_equal(np.sort(taken), places)
    some = np.random.default_rng(0).permutation(count)[:20]
    assert np.array_equal(Permutation(count, 3, "x", 1)(some), taken[some])
    if count > 100:
        for key in ((4, "x", 1), (3, "y", 1), (3, "x", 2)):
            assert (Permutation(count, *key)(places) == taken).mean() < 0.01


def test_permutations_are_spread_evenly():
    """Of 5 places all 120 orders come alike; of many, place and value are independent."""
    orders = Counter(tuple(Permutation(5, 0, "x", i)(np.arange(5)).tolist()) for i in range(1200))
    square = sum((orders[key] - 10) ** 2 / 10 for key in orders)
    assert len(orders) == 120 and square < 190  # of 119 degrees of freedom; 0.9999 lie below
    count = 10**7
    sample = np.arange(0, count, 999)
    taken = Permutation(count, 1, "x")(sample)
    table = np.histogram2d(sample, taken, 10, [(0, count)] * 2)[0]
    expected = len(sample) / 100
    assert ((table - expected) ** 2 / expected).sum() < 160  # of 81
    near = np.abs(np.diff(Permutation(count, 1, "x")(np.arange(10000))))
    assert abs(near.mean() / count - 1 / 3) < 0.01 and np.abs(near).min() > 0


@pytest.fixture(params=[True, False], ids=["by ratio", "in memory"])
def many(request, monkeypatch):
    """A source whose order is computed: one with rows by ratio in two parts, as an index has, and one without."""
    monkeypatch.setattr(orders, "LARGEST_SHUFFLED", 100)
    data = source(700, 2)
    if not request.param:
        return data
    parts = []
    for first, last in ((0, 450), (450, 700)):
        sizes = data.sizes[first:last].astype(np.float64)
        parts.append((first, np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable").astype(np.int32)))
    return SimpleNamespace(sizes=data.sizes, by_ratio=lambda: parts)


@pytest.mark.parametrize("resolution", [MULTI, SMALL, Resolution(256)], ids=["training", "inference", "square"])
def test_many_records_are_drawn_once_an_epoch_whatever_the_ranks(many, resolution):
    sampler, assigned = BucketSampler(many, 16, resolution, 7), resolution.assign(many.sizes)
    assert sampler.order == "keyed" and sampler.summary().records == 700
    steps, buckets, orders = len(sampler), resolution.buckets(), []
    for epoch in (0, 1, 5):
        rows = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            bucket, taken, draws = sampler.batch(step)
            assert (assigned[taken] == buckets.index(bucket)).all() and taken.dtype == np.int64
            assert draws.tolist() == list(range(step * 16, step * 16 + 16))
            rows.append(taken)
        counts = np.bincount(np.concatenate(rows), minlength=700)
        assert counts.min() >= 1 and counts.sum() == 700 + sampler.summary().repeated
        for number in np.unique(assigned):
            of_bucket = counts[assigned == number]
            assert of_bucket.max() - of_bucket.min() <= 1
        orders.append(np.concatenate(rows).tolist())
    assert orders[0] != orders[1] != orders[2]
    bucket, rows, _ = BucketSampler(many, 16, resolution, 7).batch(5 * steps + 3)  # resumed there
    assert np.array_equal(rows, orders[2][48:64]) and bucket in sampler.buckets()
    drawn = list(sampler.substitutes(bucket, 5))
    assert sorted(drawn) == np.flatnonzero(assigned == buckets.index(bucket)).tolist()
    dropping = BucketSampler(many, 16, resolution, 7, "drop")
    taken = np.concatenate([dropping.batch(step)[1] for step in range(len(dropping))])
    assert len(np.unique(taken)) == len(taken) == 700 - dropping.summary().dropped

"""What is counted and measured: TextAtlas' own counts, FID and KID of the original programs, precision and recall."""

import json
import zipfile

import numpy as np
import pytest
from conftest import GOLDEN

from mindsigma.errors import MindSigmaError
from mindsigma.evaluation.arrays import read_arrays
from mindsigma.evaluation.fid import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    read_features,
    read_statistics,
    write_statistics,
)
from mindsigma.evaluation.kernel_distances import cmmd, kid
from mindsigma.evaluation.precision_recall import precision_recall
from mindsigma.evaluation.words import Counts, bootstrap, count, hits, ratio, total

FOLDER = GOLDEN / "evaluation"
PAIRS = json.loads((FOLDER / "ocr_pairs.json").read_text())


def assert_figures(counts, golden):
    assert (counts.hits, counts.read, counts.wanted) == (
        golden["correct_words"],
        golden["predicted_words"],
        golden["ground_truth_words"],
    )
    for name in ("accuracy", "precision", "f1"):
        assert abs(getattr(counts, name) - golden[name]) <= 1e-9, name
    assert abs(counts.cer - golden["cer"]) <= 1e-12


def test_counts_of_single_pictures():
    for pair in PAIRS["items"]:
        counts = count(pair["recognised"], pair["ground_truth"])
        assert_figures(counts, pair)
        assert counts.distance == pair["levenshtein"]


@pytest.mark.parametrize("name, step", [("total", 1), ("total_of_every_second_item", 2)])
def test_counts_of_a_subset_are_over_all_its_words(name, step):
    counts = total([count(pair["recognised"], pair["ground_truth"]) for pair in PAIRS["items"][::step]])
    assert_figures(counts, PAIRS[name])
    assert counts.pictures == PAIRS[name]["items"]
    assert abs(counts.mean_distance - PAIRS[name]["average_levenshtein"]) <= 1e-9


def test_ratios_of_words():
    assert [ratio(pair["a"], pair["b"]) for pair in PAIRS["word_ratios"]] == [p["ratio"] for p in PAIRS["word_ratios"]]


def test_hits_are_taken_greedily():
    wanted = ["abcdeg", "xbcdef"]
    assert hits(["abcdef", "abcdhg"], wanted) == 1 and hits(["abcdhg", "abcdef"], wanted) == 2


def test_bootstrap_covers_the_spread_of_fresh_samples():
    """Of 200 pictures that are read with chance 0.3, 95 of 100 intervals hold 30 %; 80 at the very least."""
    random, inside = np.random.default_rng(0), 0
    for seed in range(60):
        counts = [Counts(int(one), 1, 1, 0.0, 0, 1, 1) for one in random.random(200) < 0.3]
        low, high = bootstrap(counts, samples=300, seed=seed)
        inside += low <= 30 <= high
    assert 48 <= inside <= 60
    assert bootstrap([]) == (0.0, 0.0)


@pytest.fixture(scope="module")
def fid():
    data = np.load(FOLDER / "fid.npz")
    return data["real"], data["fake"], json.loads(str(data["values"]))


def pairs_of(real, fake):
    constant = real.copy()
    constant[:, 5] = 1.25
    return {
        "full": (real, fake),
        "self": (real, real),
        "few": (real[:32], fake[:32]),
        "halves": (real[::2], real[1::2]),
        "constant_column": (constant, fake),
    }


@pytest.mark.parametrize("name", ["full", "self", "few", "halves", "constant_column"])
def test_frechet_distance(fid, name):
    one, other = (Statistics.of(features) for features in pairs_of(*fid[:2])[name])
    for program in ("pytorch_fid", "clean_fid", "textatlas"):
        golden = fid[2][name][program]
        assert frechet_distance(one, other) == pytest.approx(golden, rel=1e-6, abs=1e-9), program
    assert frechet_distance(other, one) == pytest.approx(frechet_distance(one, other), rel=1e-12, abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Of diagonal covariances it is |m1 - m2|² + sum (s1 - s2)², whatever the rank."""
    for deviations in ([1.0, 2.0, 3.0], [0.0, 2.0, 1e-9]):
        one = Statistics(np.array([1.0, 0.0, 0.0]), np.diag(np.square([2.0, 2.0, 0.5])))
        other = Statistics(np.zeros(3), np.diag(np.square(deviations)))
        wanted = 1 + np.square(np.array([2.0, 2.0, 0.5]) - deviations).sum()
        assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_statistics_in_parts_are_those_of_the_whole(fid):
    real = fid[0].astype(np.float64) * 1e-3 + 50  # a mean far from 0
    running = RunningStatistics()
    for start in (0, 1, 40, 41, 299):
        stop = {0: 1, 1: 40, 40: 41, 41: 299, 299: 300}[start]
        running.add(real[start:stop])
    result = running.result()
    np.testing.assert_allclose(result.mean, real.mean(0), rtol=1e-14)
    np.testing.assert_allclose(result.covariance, np.cov(real, rowvar=False), rtol=0, atol=1e-17)
    assert result.count == 300
    with pytest.raises(MindSigmaError, match="at least 2"):
        RunningStatistics().result()


def test_kid(fid):
    real, fake, values = fid
    value, deviation = kid(real[:260], fake[:260], subsets=1)
    assert abs(value - values["kid_whole_sets"]) <= 1e-13 and abs(value - values["kid_clean_fid"]) <= 1e-13
    assert deviation == 0
    value, deviation = kid(real, fake, subsets=50, subset_size=100)
    assert abs(value - values["kid_whole_sets"]) < 4 * deviation / 50**0.5 and deviation > 0


def test_cmmd_is_its_definition(fid):
    one, other = (x[:50].astype(np.float64) for x in fid[:2])
    one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (one, other))

    def mean(a, b):
        return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / (2 * 10**2)).mean()

    wanted = 1000 * (mean(one, one) + mean(other, other) - 2 * mean(one, other))
    assert cmmd(fid[0][:50], fid[1][:50]) == pytest.approx(wanted, rel=1e-9)
    assert cmmd(fid[0][:50], fid[0][:50]) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_by_brute_force():
    random = np.random.default_rng(3)
    made, real = random.standard_normal((40, 3)), random.standard_normal((60, 3)) * 0.7

    def share(points, manifold):
        inside = 0
        distances = np.linalg.norm(manifold[:, None] - manifold[None], axis=-1)
        radii = np.sort(distances, 1)[:, 3]  # the first is the point itself
        for point in points:
            inside += bool((np.linalg.norm(manifold - point, axis=1) <= radii).any())
        return inside / len(points)

    assert precision_recall(made, real) == (share(made, real), share(real, made))
    assert precision_recall(made, made + 1000) == (0, 0) and precision_recall(made, made) == (1, 1)
    with pytest.raises(MindSigmaError, match="more than 3"):
        precision_recall(made[:3], real)


def test_statistics_files(tmp_path, fid):
    """They are read by NumPy as pytorch-fid and clean-fid do, and theirs are read here."""
    statistics = Statistics.of(fid[0])
    write_statistics(tmp_path / "a.npz", statistics, fid[0])
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["mu"], statistics.mean) and np.array_equal(file["sigma"], statistics.covariance)
    again = read_statistics(tmp_path / "a.npz")
    assert frechet_distance(again, statistics) == pytest.approx(0, abs=1e-9) and again.count == 300
    assert np.array_equal(read_features(tmp_path / "a.npz"), fid[0])
    np.savez_compressed(tmp_path / "clean.npz", mu=statistics.mean, sigma=np.asfortranarray(statistics.covariance))
    other = read_statistics(tmp_path / "clean.npz")
    assert np.array_equal(other.covariance, statistics.covariance) and other.count == 0


def test_bad_statistics_files(tmp_path):
    path = tmp_path / "a.npz"

    def refused(match, read=read_statistics):
        with pytest.raises(MindSigmaError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)

    refused("no such file")
    path.write_bytes(b"PK but no zip")
    refused("not an .npz file")
    np.savez(path, mu=np.zeros(3))
    refused("lacks mu and sigma")
    refused("holds no features", read_features)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    refused("no mean and covariance")
    np.savez(path, mu=np.full(2, np.nan), sigma=np.zeros((2, 2)))
    refused("no finite number")
    np.savez(path, mu=np.array([{}, {}], object), sigma=np.zeros((2, 2)))
    refused("not numbers")
    with zipfile.ZipFile(path, "w") as archive:  # a header that promises a terabyte
        header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    refused("its size is not that of its shape", lambda file: read_arrays(file))

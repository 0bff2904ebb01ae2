"""What a run tells of its processes: the slowest one, and whose loss is not finite."""

import json
from types import SimpleNamespace

import numpy as np
from training_runs import square_features

from mindsigma.data import BucketSampler, Loader, Resolution, open_data
from mindsigma.training.times import Times
from mindsigma.training.trainer import Trainer


class Together:
    """Collectives of process `rank` of several, the others of which have given `others` to every sum."""

    def __init__(self, rank, others):
        self.ranks = SimpleNamespace(rank=rank, count=len(others), first=rank == 0)
        self.alone, self.others = False, others

    def total(self, values):
        return (np.asarray(values) + sum(other for i, other in enumerate(self.others) if i != self.ranks.rank)).tolist()


def told(tmp_path, seconds):
    """Lines that process 0 of three says; seconds (3, 3): loader, step, collective a step of each."""
    others = [np.zeros((3, 3)) for _ in seconds]
    for i, row in enumerate(seconds):
        others[i][i] = row
    times = Times(Together(0, [other.ravel() for other in others]), tmp_path / "ranks.jsonl")
    times._sums, times._steps = dict(zip(("loader", "step", "collective"), 4 * np.array(seconds[0]))), 4
    return times.told(12)


def test_slowest_process(tmp_path):
    """Which one the others wait for: they spend that time in collectives."""
    (line,) = told(tmp_path, [(0.1, 2.0, 1.0), (1.0, 1.2, 0.1), (0.1, 2.0, 1.0)])
    assert "step 12: process 1 is the slowest, 2.10 s a step, the median 1.10 (loader 1.00 s, step 1.20 s" in line
    (stored,) = [json.loads(text) for text in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert stored == {"step": 12, "slowest": 1, "loader": 1.0, "step_seconds": 1.2, "collective": 0.1, "median": 1.1}
    assert told(tmp_path, [(0.1, 1.0, 0.1)] * 3) == []


def test_whose_loss_is_not_finite(tmp_path):
    """The first process names the samples of the other, which it has not read."""
    source = open_data(square_features(tmp_path / "features"))
    sampler = BucketSampler(source, 4, Resolution(64), seed=3)
    loader = Loader(source, sampler, 0, 2, max_length=8)
    said = []
    flags = np.array([0.0, 1.0])
    run = SimpleNamespace(
        ranks=SimpleNamespace(rank=0, count=2), step=5, collectives=Together(0, [np.zeros(2), flags]),
        method=SimpleNamespace(loaders=lambda: [loader]), say=said.append,
    )  # fmt: skip
    Trainer._name_broken(run, {"mse": 1.0})
    _, indices, _ = sampler.batch(5)
    names = ", ".join(str(source.where(index)) for index in indices[2:])
    assert said == [f"step 6: the loss of process 1 is not finite; its samples: {names}"]

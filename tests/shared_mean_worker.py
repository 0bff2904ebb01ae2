"""One of three processes that take means by shared memory without MindSpore: rank, folder."""

import importlib.util
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

# The file alone: its package would import MindSpore, in every process.
SPEC = importlib.util.spec_from_file_location(
    "shared_mean", Path(__file__).parents[1] / "mindsigma" / "backends" / "cpu" / "shared_mean.py"
)
MODULE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MODULE)


class Files:
    """Collectives over files, for the few numbers that SharedMean needs at its start."""

    def __init__(self, folder, rank, count):
        self.folder, self.round, self.ranks = folder, 0, SimpleNamespace(rank=rank, count=count)

    def _exchange(self, array):
        self.round += 1
        part = self.folder / f"{self.round}-{self.ranks.rank}.part"
        with open(part, "wb") as file:
            np.save(file, array)
        part.rename(part.with_suffix(".npy"))
        paths = [self.folder / f"{self.round}-{rank}.npy" for rank in range(self.ranks.count)]
        while not all(path.exists() for path in paths):
            time.sleep(0.01)
        return [np.load(path) for path in paths]

    def array_from_rank(self, rank, array):
        return self._exchange(array)[rank]

    def total(self, values):
        return np.sum(self._exchange(np.array(values, np.float64)), 0)

    def barrier(self):
        self._exchange(np.zeros(1))


if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    shared = MODULE.SharedMean(Files(folder, rank, 3), 1007)
    assert shared.works
    random = np.random.default_rng(rank)
    for i in range(50):
        time.sleep(random.uniform(0, 0.002))
        given = [random.standard_normal(shape).astype(np.float32) for shape in ((10, 100), (7,))]
        means = shared(given)
        np.savez(folder / f"result-{i}-{rank}.npz", *given, *means)

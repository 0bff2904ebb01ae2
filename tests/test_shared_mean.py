"""Means over processes through shared memory."""

import subprocess
import sys

import numpy as np
from conftest import ROOT


def test_means_of_three_processes(tmp_path):
    """Fifty in a row, each process late at times: sums in the order of the ranks, the same bits everywhere."""
    worker = [sys.executable, str(ROOT / "tests" / "shared_mean_worker.py")]
    processes = [subprocess.Popen([*worker, str(rank), str(tmp_path)]) for rank in range(3)]
    assert [process.wait(300) for process in processes] == [0, 0, 0]
    for i in range(50):
        files = [np.load(tmp_path / f"result-{i}-{rank}.npz") for rank in range(3)]
        for j in range(2):
            given = [file[f"arr_{j}"] for file in files]
            expected = (given[0] + given[1] + given[2]) * np.float32(1 / 3)
            for file in files:
                assert file[f"arr_{j + 2}"].tobytes() == expected.tobytes()

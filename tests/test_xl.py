"""Memory that is promised: guided steps of XL/2 at full size with random weights, a tiled 4K decode."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[1] / "tools" / "benchmark.py"


def peak_gb(case, tmp_path):
    """Peak memory of a benchmark case; the tool fails if a step's value is not finite."""
    out = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARK), "--cases", case, "--repeats", "0", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["cases"][case]["peak_bytes"] / 1e9


@pytest.mark.slow
def test_step_at_256_px(tmp_path):
    assert peak_gb("xl-256", tmp_path) < 8


@pytest.mark.slow
@pytest.mark.parametrize("case", ["xl-1024", "xl-1024-kv"])
def test_step_at_1024_px(case, tmp_path):
    assert peak_gb(case, tmp_path) < 16


@pytest.mark.slow
def test_decode_of_4096_px(tmp_path):
    """64 times the area of a tile, and the output alone takes 0.2 GB."""
    assert peak_gb("mini-decode-4k", tmp_path) < 2.5

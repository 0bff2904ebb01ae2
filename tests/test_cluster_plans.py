"""Plans of recipes on many NPUs, on paper, against the closed forms."""

import subprocess
import sys

import pytest
from conftest import ROOT

from mindsigma.config_file import parse_with_config
from mindsigma.inspect.cluster import RECIPES, estimate, traffic
from mindsigma.inspect.roofline import Npu, read_npus
from mindsigma.training.run_options import build_parser

NPU = Npu("some", fp16_tflops=100, hccs_gbs=10, roce_gbs=1)


@pytest.mark.parametrize(
    ("cards", "zero", "group", "gradients", "weights"),
    [
        (1, 0, 0, (0, 0), (0, 0)),
        (4, 0, 0, (8 * 640 * 3 // 4, 0), (0, 0)),
        (4, 1, 0, (8 * 640 * 3 // 4, 0), (2 * 640 * 3 // 4, 0)),
        (4, 2, 0, (4 * 640 * 3 // 4, 0), (2 * 640 * 3 // 4, 0)),
        (4, 3, 0, (2 * 640 * 3 // 4, 0), (4 * 640 * 3 // 4, 0)),
        (16, 2, 0, (4 * 640 * 7 // 8, 4 * 640 // 8 // 2), (2 * 640 * 7 // 8, 2 * 640 // 8 // 2)),
        (128, 2, 0, (8 * 640 * 7 // 8, 8 * 640 // 8 * 15 // 16), (0, 0)),
        # In a server scattered and gathered; an eighth is then summed over 16 servers.
        (128, 2, 8, (4 * 640 * 7 // 8, 8 * 640 // 8 * 15 // 16), (2 * 640 * 7 // 8, 0)),
        (128, 3, 8, (2 * 640 * 7 // 8, 8 * 640 // 8 * 15 // 16), (4 * 640 * 7 // 8, 0)),
        # Half a server; a quarter is then summed over two groups of a server, and an eighth over 16 servers.
        (128, 2, 4, (4 * 640 * 3 // 4 + 8 * 640 // 4 // 2, 8 * 640 // 8 * 15 // 16), (2 * 640 * 3 // 4, 0)),
    ],
)
def test_traffic_of_rings(cards, zero, group, gradients, weights):
    """Of a matrix of 64 rows, which 128 cards cannot divide."""
    found = traffic([(64, 10)], cards, zero, group)
    assert (found.gradients, found.weights) == (gradients, weights)


def test_estimate():
    report = {"flops": {"total": 2e12}}
    found = estimate(RECIPES[0], report, [(64, 10**7)], NPU, 8, 2)
    arithmetic = RECIPES[0].batch * 4 * 1e12 / 100e12
    sent = 64e7 * 7 / 8
    assert found.seconds[0] == pytest.approx(arithmetic / 0.45 + 2 * sent / 10e9)
    assert found.seconds[1] == pytest.approx(arithmetic / 0.25 + 6 * sent / 10e9)
    assert found.images[1] == pytest.approx(8 * RECIPES[0].batch / found.seconds[0])


def test_recipes_are_those_of_the_configs():
    for recipe in RECIPES:
        file = str(ROOT / "configs" / "train" / f"{recipe.name}.yaml")
        args = parse_with_config(build_parser(), ["--config", file, "--data", "data", "--output", "run"])
        assert (args.batch_size, args.steps, args.recompute) == (recipe.batch, recipe.steps, True)


def test_the_page_has_the_table():
    command = [sys.executable, ROOT / "tools" / "roofline.py", "--npu", "910B", "--recipes", "8", "64", "512"]
    command += ["--zero", "2", "--zero-group", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3 * len(RECIPES)
    assert "\n".join(rows) in (ROOT / "configs" / "cluster" / "README.md").read_text()
    assert read_npus(ROOT / "configs" / "npu.yaml")["910B"].hccs_gbs == 196

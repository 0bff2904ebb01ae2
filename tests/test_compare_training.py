"""tools/compare_training.py without a peer: one process and two with the same images make the same step."""

import json
import subprocess
import sys

import pytest
from training_runs import ROOT, TOKENS, write_network


@pytest.mark.slow
def test_processes_share_a_step(tmp_path):
    network, results = write_network(tmp_path / "network"), []
    for processes, extra in ((1, []), (2, ["--recompute"])):
        out = tmp_path / "result.json"
        command = [sys.executable, str(ROOT / "tools" / "compare_training.py"), "--model", str(network), *extra]
        command += ["--batch-size", str(4 // processes), "--processes", str(processes), "--resolution", "64"]
        command += ["--max-length", str(TOKENS), "--steps", "3", "--output", str(out)]
        subprocess.run(command, check=True, timeout=300)
        (result,) = json.loads(out.read_text()).values()
        assert result["images_per_second"] == pytest.approx(4 / result["seconds"])
        assert result["peak_gb"] > (processes - 0.5) * result["largest_peak_gb"] > 0
        results.append([line["grad_norm"] for line in result["lines"]])
    assert len(results[0]) == 3 and results[1] == pytest.approx(results[0], rel=1e-4)

"""Trains this project's network on inputs that tools/compare_training.py wrote; one process of those that share a step.

python tools/peers/train_here.py FOLDER
"""

import json
import resource
import sys
import time
from pathlib import Path

from mindsigma import command_line

NAMES = ("clean", "noise", "numbers", "timestep", "states", "mask")


def main():
    """Train as FOLDER/run.json says; writes FOLDER/here_RANK.json."""
    import numpy as np
    from mindspore import Tensor

    from mindsigma import __version__
    from mindsigma.backends.cpu.step import accelerate_step
    from mindsigma.conversion.component import open_source
    from mindsigma.distributed import join_ranks
    from mindsigma.runtime import set_device
    from mindsigma.training.optimizers import OptimizerConfig
    from mindsigma.training.start import build_dit
    from mindsigma.training.step import StepConfig, TrainingStep

    folder = Path(sys.argv[1])
    run = json.loads((folder / "run.json").read_text())
    set_device()
    ranks = join_ranks()
    component = open_source(folder / "start", "dit").components[0]
    dit = build_dit(component.config, component=component)
    del component  # and the mapped file
    if run["recompute"]:
        for block in dit.blocks:
            block.recompute()
    optimizer = OptimizerConfig("adamw", run["betas"], (run["eps"],))
    config = StepConfig(max_norm=run["max_norm"])
    training = accelerate_step(TrainingStep(dit, dit.trainable_params(), optimizer, config, ranks))
    rows = slice(ranks.rank * run["batch_size"], (ranks.rank + 1) * run["batch_size"])
    lines = []
    for step in range(run["steps"]):
        data = np.load(folder / f"step_{step}.npz")
        start, cpu = time.perf_counter(), time.process_time()
        mse, bound, norm, _ = training.run([tuple(Tensor(data[name][rows]) for name in NAMES)], run["rate"])
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        lines.append({"loss": mse + bound, "grad_norm": norm, "seconds": seconds, "cpu_seconds": cpu})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {"lines": lines, "peak_gb": peak, "version": __version__}
    (folder / f"here_{ranks.rank}.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    command_line.run(main)

"""Compare training with PyTorch: same weights, same data, same noise; losses, seconds a step and peak memory.

python tools/compare_training.py --data FEATURES --peer-python PEER/bin/python --steps 50
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindsigma import command_line  # noqa: E402
from mindsigma.errors import MindSigmaError  # noqa: E402

PEER = Path(__file__).with_name("peers") / "train_torch.py"
WARM = 2  # first steps, left out of the medians


def build_parser():
    """The options of this tool."""
    parser = argparse.ArgumentParser(
        description="Train the same network on the same inputs here and with PyTorch and diffusers; print both."
    )
    add = parser.add_argument
    add("--data", metavar="FEATURES", help="folder of tools/extract_features.py; default random numbers of that shape")
    add("--peer-python", required=True, metavar="FILE", help="Python of an environment with torch and diffusers")
    add(
        "--model",
        default="sigma-mini",
        help="whose shape, and with --trained whose weights, the network has; a released "
        "name without weights at hand needs random data",
    )
    add("--components", help="folder with the VAE; default --model")
    add("--trained", action="store_true", help="begin from its weights instead of fresh ones")
    add("--steps", type=int, default=50)
    add("--batch-size", type=int, default=8)
    add("--resolution", type=int, default=256)
    add("--max-length", type=int, default=40, help="tokens of a caption")
    add("--learning-rate", type=float, default=1e-4)
    add("--seed", type=int, default=43)
    add("--output", metavar="FILE", help="write the losses of both as JSON")
    return parser


NAMES = ("clean", "noise", "numbers", "timestep", "states", "mask")


def write_inputs(args, folder, config):
    """Micro-batches of all steps as step_N.npz, as the trainer would make them."""
    import numpy as np

    from mindsigma.data import BucketSampler, Loader, Resolution, open_data
    from mindsigma.diffusion.loss import LossConfig
    from mindsigma.pipeline.loading import open_vae
    from mindsigma.pipeline.locate import locate
    from mindsigma.training.inputs import StepInputs

    source = open_data(args.data)
    sampler = BucketSampler(source, args.batch_size, Resolution(args.resolution), args.seed)
    loader = Loader(source, sampler, seed=args.seed, max_length=args.max_length)
    states, mask = source.null_caption(args.max_length)
    vae = open_vae(locate(args.components or args.model)).config
    inputs = StepInputs(vae, (states, int(mask.sum())), LossConfig(config.learn_sigma), args.max_length, args.seed)
    for batch in loader.batches(0, args.steps):
        (tensors,) = inputs.micro_batches(batch, 1)
        np.savez(folder / f"step_{batch.step}.npz", **{n: t.asnumpy() for n, t in zip(NAMES, tensors)})


def write_random(args, folder, config):
    """Random latents and captions in the shape of the data."""
    import numpy as np

    from mindsigma.diffusion.loss import LossConfig, coefficients

    rng = np.random.default_rng(args.seed)
    side = args.resolution // 8
    for step in range(args.steps):
        clean, noise = rng.standard_normal((2, args.batch_size, config.in_channels, side, side), np.float32)
        timestep = rng.integers(1000, size=args.batch_size)
        states = rng.standard_normal((args.batch_size, args.max_length, config.caption_channels), np.float32)
        numbers = coefficients(timestep, LossConfig(config.learn_sigma))
        mask = np.ones((args.batch_size, args.max_length), np.int32)
        arrays = (clean, noise, numbers, timestep.astype(np.float32), states, mask)
        np.savez(folder / f"step_{step}.npz", **dict(zip(NAMES, arrays)))


def train_here(args, folder, dit, optimizer, max_norm):
    """Lines as the peer writes them, and the peak memory in GB."""
    import time

    import numpy as np
    from mindspore import Tensor

    from mindsigma.training.step import StepConfig, TrainingStep

    training = TrainingStep(dit, dit.trainable_params(), optimizer, StepConfig(max_norm=max_norm))
    lines = []
    for step in range(args.steps):
        data = np.load(folder / f"step_{step}.npz")
        start = time.perf_counter()
        mse, bound, norm, _ = training.run([tuple(Tensor(data[name]) for name in NAMES)], args.learning_rate)
        lines.append({"loss": mse + bound, "grad_norm": norm, "seconds": time.perf_counter() - start})
    return lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main():
    """Parse, train twice, print the table; returns the exit code."""
    args = build_parser().parse_args()
    if args.steps <= WARM:
        raise MindSigmaError(f"--steps must be above {WARM}, not {args.steps}")
    from mindsigma.conversion import convert
    from mindsigma.conversion.component import open_source
    from mindsigma.conversion.targets import prepare
    from mindsigma.diffusion.loss import COLUMNS
    from mindsigma.models.dit.config import PRESETS
    from mindsigma.pipeline.saving import save_network
    from mindsigma.runtime import set_device
    from mindsigma.training.optimizers import OptimizerConfig
    from mindsigma.training.start import build_dit, open_start

    set_device()
    optimizer, max_norm = OptimizerConfig("adamw"), 1.0
    if args.trained or args.model not in PRESETS or args.data:
        component = open_start(args.model)
        config = component.config
    else:
        component, config = None, PRESETS[args.model]
    dit = build_dit(config, component=component if args.trained else None, seed=args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_network(dit, folder / "start", "fp32")
        start = open_source(folder / "start", "dit").components[0]
        convert.write([prepare(start, "diffusers")], folder / "diffusers", "diffusers")
        del dit  # the peer needs the memory
        (write_inputs if args.data else write_random)(args, folder, config)
        run = {
            "steps": args.steps,
            "rate": args.learning_rate,
            "betas": optimizer.betas,
            "eps": optimizer.eps[0],
            "max_norm": max_norm,
            "columns": COLUMNS,
            "threads": os.cpu_count(),
        }
        (folder / "run.json").write_text(json.dumps(run))
        done = subprocess.run([args.peer_python, str(PEER), str(folder)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MindSigmaError(f"--peer-python {args.peer_python}: {last}")
        theirs = json.loads((folder / "torch.json").read_text())
        dit = build_dit(config, component=start, seed=args.seed)
        ours, peak = train_here(args, folder, dit, optimizer, max_norm)
    report(args, ours, peak, theirs)
    return 0


def report(args, ours, peak, theirs):
    """Print, and write if asked for, what both measured."""
    worst, place = max((abs(a["loss"] - b["loss"]), i) for i, (a, b) in enumerate(zip(ours, theirs["lines"])))
    medians = [statistics.median(line["seconds"] for line in lines[WARM:]) for lines in (ours, theirs["lines"])]
    for step in sorted({0, 1, 2, 5, 10, 20, 30, 40, len(ours) - 1} & set(range(len(ours)))):
        print(f"step {step:>3}: loss {ours[step]['loss']:.6f} here, {theirs['lines'][step]['loss']:.6f} with PyTorch")
    print(f"largest difference of the loss: {worst:.2e} at step {place}")
    print(f"seconds a step (median): {medians[0]:.2f} here, {medians[1]:.2f} with PyTorch {theirs['version']}")
    print(f"PyTorch / here: {medians[1] / medians[0]:.2f}; first step here {ours[0]['seconds']:.1f} s")
    print(f"peak memory: {peak:.1f} GB here, {theirs['peak_gb']:.1f} GB with PyTorch")
    if args.output:
        lines = {"here": ours, "torch": theirs["lines"], "peak_gb": [peak, theirs["peak_gb"]]}
        Path(args.output).write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    command_line.run(main)

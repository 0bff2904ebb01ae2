"""Compare training with PyTorch: same weights, same data, same noise; losses, seconds a step and peak memory.

python tools/compare_training.py --data FEATURES --peer-python PEER/bin/python --steps 50
"""

from mindsigma import command_line  # first, as it judges this Python

# isort: split
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mindsigma.errors import MindSigmaError

SCRIPTS = {name: Path(__file__).with_name("peers") / f"train_{name}.py" for name in ("here", "torch")}
WARM = 2  # first steps, left out of the medians


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Train the same network on the same inputs here and with PyTorch and diffusers; print both. "
        "Each trains in processes of its own, one after the other.",
        "python tools/compare_training.py --data features --peer-python PEER/bin/python --steps 50",
    )
    add = parser.add_argument
    add("--data", metavar="FEATURES", help="folder of tools/extract_features.py; default random numbers of that shape")
    add("--peer-python", metavar="FILE", help="Python of an environment with torch and diffusers; default: only here")
    add(
        "--model",
        default="sigma-mini",
        help="whose shape, and with --trained whose weights, the network has; a released "
        "name without weights at hand needs random data",
    )
    add("--components", help="folder with the VAE; default --model")
    add("--trained", action="store_true", help="begin from its weights instead of fresh ones")
    add("--steps", type=int, default=50)
    add("--batch-size", type=int, default=8, help="images of one process")
    add("--processes", type=int, default=1, help="that share a step, as msrun and torchrun would start them")
    add("--recompute", action="store_true", help="compute each block again in the backward pass, on both sides")
    add("--depth", type=int, help="blocks of the network instead of --model's; fresh weights only")
    add("--resolution", type=int, default=256)
    add("--max-length", type=int, default=40, help="tokens of a caption")
    add("--learning-rate", type=float, default=1e-4)
    add("--seed", type=int, default=43)
    add("--output", metavar="FILE", help="write losses, seconds and memory as JSON")
    return parser


NAMES = ("clean", "noise", "numbers", "timestep", "states", "mask")


def write_inputs(args, folder, config):
    """Micro-batches of all steps as step_N.npz, as the trainer would make them."""
    import numpy as np

    from mindsigma.data import BucketSampler, Loader, Resolution, open_data
    from mindsigma.training.inputs import StepInputs
    from mindsigma.training.loss import LossConfig
    from mindsigma.weights.loading import open_vae
    from mindsigma.weights.locate import locate

    source = open_data(args.data)
    sampler = BucketSampler(source, args.batch_size * args.processes, Resolution(args.resolution), args.seed)
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

    from mindsigma.training.loss import LossConfig, coefficients

    rng = np.random.default_rng(args.seed)
    side, count = args.resolution // 8, args.batch_size * args.processes
    for step in range(args.steps):
        clean, noise = rng.standard_normal((2, count, config.in_channels, side, side), np.float32)
        timestep = rng.integers(1000, size=count)
        states = rng.standard_normal((count, args.max_length, config.caption_channels), np.float32)
        numbers = coefficients(timestep, LossConfig(config.learn_sigma))
        mask = np.ones((count, args.max_length), np.int32)
        arrays = (clean, noise, numbers, timestep.astype(np.float32), states, mask)
        np.savez(folder / f"step_{step}.npz", **dict(zip(NAMES, arrays)))


def train(name, python, folder, count):
    """Run a script of peers/ in `count` processes; returns what each wrote."""
    command = [python, str(SCRIPTS[name]), str(folder)]
    common, port = {**os.environ, "GLOG_v": "3"}, free_port()
    environments = [common]
    if count > 1 and name == "torch":
        common.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(count))
        environments = [{**common, "RANK": str(i)} for i in range(count)]
    elif count > 1:
        common.update(MS_WORKER_NUM=str(count), RANK_SIZE=str(count), MS_SCHED_HOST="127.0.0.1")
        common.update(MS_SCHED_PORT=str(port))
        ranks = [{"RANK_ID": str(i), "MS_NODE_ID": str(i), "DEVICE_ID": str(i)} for i in range(count)]
        environments = [{**common, "MS_ROLE": "MS_SCHED", "RANK_ID": "0"}]
        environments += [{**common, "MS_ROLE": "MS_WORKER", **rank} for rank in ranks]
    processes = []
    try:
        for environment in environments:
            with open(folder / f"{name}_{len(processes)}.log", "w") as log:
                streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                processes.append(subprocess.Popen(command, env=environment, **streams))
            if environment.get("MS_ROLE") == "MS_SCHED":
                wait_for(port, processes[0])
        wait(processes, name, folder)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [json.loads((folder / f"{name}_{i}.json").read_text()) for i in range(count)]


def wait(processes, name, folder):
    """Wait for all; raise with the last line of the first that fails."""
    while any(process.poll() is None for process in processes) or any(process.returncode for process in processes):
        for i, process in enumerate(processes):
            if process.poll():
                lines = (folder / f"{name}_{i}.log").read_text(errors="replace").strip().splitlines()
                raise MindSigmaError(f"{' '.join(map(str, process.args[:2]))}: {(lines or ['no message'])[-1]}")
        time.sleep(0.1)


def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port, process):
    """Wait until a scheduler listens; workers that find none at their first try wait long before the next."""
    while process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def main():
    """Parse, train twice, print the table; returns the exit code."""
    args = build_parser().parse_args()
    if args.steps <= WARM:
        raise MindSigmaError(f"--steps must be above {WARM}, not {args.steps}")
    for name in ("batch_size", "processes", "depth"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.depth and args.trained:
        raise MindSigmaError("--depth makes another network: --trained has no weights for it")
    from mindsigma.conversion import writing as convert
    from mindsigma.conversion.component import open_source
    from mindsigma.conversion.targets import prepare
    from mindsigma.models.dit_config import PRESETS
    from mindsigma.runtime import set_device
    from mindsigma.training.loss import COLUMNS
    from mindsigma.training.optimizers import OptimizerConfig
    from mindsigma.training.start import build_dit, open_start
    from mindsigma.weights.formats.atomic import write_json
    from mindsigma.weights.saving import save_network

    set_device()
    optimizer = OptimizerConfig("adamw")
    if args.trained or args.model not in PRESETS or args.data:
        component = open_start(args.model)
        config = component.config
    else:
        component, config = None, PRESETS[args.model]
    if args.depth:
        config = replace(config, depth=args.depth)
    dit = build_dit(config, component=component if args.trained else None, seed=args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_network(dit, folder / "start", "fp32")
        if args.peer_python:
            start = open_source(folder / "start", "dit").components[0]
            convert.write([prepare(start, "diffusers")], folder / "diffusers", "diffusers")
            del start
        del dit  # those who train need the memory
        (write_inputs if args.data else write_random)(args, folder, config)
        run = {
            "steps": args.steps,
            "batch_size": args.batch_size,
            "recompute": args.recompute,
            "rate": args.learning_rate,
            "betas": optimizer.betas,
            "eps": optimizer.eps[0],
            "max_norm": 1.0,
            "columns": COLUMNS,
            "threads": len(os.sched_getaffinity(0)),
        }
        write_json(folder / "run.json", run)
        results = {"here": train("here", sys.executable, folder, args.processes)}
        if args.peer_python:
            results["torch"] = train("torch", args.peer_python, folder, args.processes)
    report(args, {name: summary(args, ranks) for name, ranks in results.items()})
    return 0


def summary(args, ranks):
    """Losses of the first process, its seconds, images a second of all, memory of all and of the largest."""
    lines = ranks[0]["lines"]
    seconds = statistics.median(line["seconds"] for line in lines[WARM:])
    peaks = [rank["peak_gb"] for rank in ranks]
    return {
        "version": ranks[0]["version"],
        "seconds": seconds,
        "first_seconds": lines[0]["seconds"],
        "images_per_second": args.batch_size * args.processes / seconds,
        "peak_gb": sum(peaks),
        "largest_peak_gb": max(peaks),
        "lines": lines,
    }


def report(args, results):
    """Print, and write if asked for, what was measured."""
    lines = [result["lines"] for result in results.values()]
    for step in sorted({0, 1, 2, 5, 10, 20, 30, 40, args.steps - 1} & set(range(args.steps))):
        losses = ", ".join(f"{result['lines'][step]['loss']:.6f} {name}" for name, result in results.items())
        print(f"step {step:>3}: loss {losses}")
    for name, result in results.items():
        print(
            f"{name} ({result['version']}): {result['seconds']:.2f} s a step (median), first "
            f"{result['first_seconds']:.1f} s; {result['images_per_second']:.2f} images/s; peak memory "
            f"{result['peak_gb']:.2f} GB" + (f", {result['largest_peak_gb']:.2f} GB a process" * (args.processes > 1))
        )
    if len(lines) == 2:
        worst, place = max((abs(a["loss"] - b["loss"]), i) for i, (a, b) in enumerate(zip(*lines)))
        print(f"largest difference of the loss: {worst:.2e} at step {place}")
        print(f"PyTorch / here: {results['torch']['seconds'] / results['here']['seconds']:.2f}")
    if args.output:
        from mindsigma.weights.formats.atomic import write_json

        write_json(Path(args.output), results)


if __name__ == "__main__":
    command_line.run(main)

"""Measure a training step of sigma-mini and XL/2: images a second, peak memory; processes, recompute, PyTorch beside.

    python tools/benchmark_training.py --peer-python PYTHON_WITH_TORCH

Each line is a run of tools/compare_training.py. Prints a table and writes JSON.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError

COMPARE = Path(__file__).with_name("compare_training.py")
CASES = {  # 256 px, captions of full length
    "sigma-mini": ("sigma-mini", 8, 40),
    "xl": ("PixArt-Sigma-XL-2-256x256", 1, 300),
}


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0], "python tools/benchmark_training.py --cases sigma-mini --processes 1"
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    add("--processes", nargs="+", type=int, default=[1, 2], metavar="N", help="that share a step")
    add("--recompute", nargs="+", choices=("off", "on"), default=["off", "on"])
    add("--peer-python", metavar="FILE", help="Python of an environment with torch and diffusers; default: only here")
    add("--data", metavar="FEATURES", help="folder of tools/extract_features.py for sigma-mini; default random numbers")
    add("--depth", type=int, help="blocks, for a smaller network of the same width")
    add("--steps", type=int, default=7, help="of a run; the first two are left out of the medians")
    add("--out", default="outputs/benchmark_training.json", help="where the numbers go")
    return parser


def measure(args, case, processes, recompute, folder):
    """Results of one run, by side."""
    model, batch, tokens = CASES[case]
    out = Path(folder) / "result.json"
    command = [sys.executable, str(COMPARE), "--model", model, "--batch-size", str(batch), "--max-length", str(tokens)]
    command += ["--steps", str(args.steps), "--processes", str(processes), "--output", str(out)]
    command += ["--recompute"] * (recompute == "on")
    command += ["--data", args.data] if args.data and case == "sigma-mini" else []
    command += ["--peer-python", args.peer_python] if args.peer_python else []
    command += ["--depth", str(args.depth)] if args.depth else []
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MindSigmaError(f"{case}, {processes} processes, recompute {recompute}: {last}")
    return json.loads(out.read_text())


def main():
    """Run the cases, print the table, write the file; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma.weights.formats.atomic import write_json

    report = []
    print(f"{'case':<11} {'processes':>9} {'recompute':>9} {'side':>6} {'s a step':>9} {'images/s':>9} "
          f"{'peak GB':>8} {'largest':>8} {'torch/here':>10}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for case in args.cases:
            for recompute in args.recompute:
                for processes in args.processes:
                    results = measure(args, case, processes, recompute, folder)
                    setting = {"case": case, "processes": processes, "recompute": recompute, "depth": args.depth}
                    report.append({**setting, "results": results})
                    for side, result in results.items():
                        ratio = ""
                        if side == "here" and "torch" in results:
                            ratio = f"{results['torch']['seconds'] / result['seconds']:.2f}"
                        print(
                            f"{case:<11} {processes:>9} {recompute:>9} {side:>6} {result['seconds']:>9.2f} "
                            f"{result['images_per_second']:>9.2f} {result['peak_gb']:>8.2f} "
                            f"{result['largest_peak_gb']:>8.2f} {ratio:>10}",
                            flush=True,
                        )
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    print(out)
    return 0


if __name__ == "__main__":
    command_line.run(main)

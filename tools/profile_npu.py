"""Time and profile denoising and training steps on an NPU, and print the rows of the table in tools/measure/README.md.

    python tools/profile_npu.py --out profile.json

On an NPU: guided steps of XL/2 at 256, 512, 1024 and 2048 px and a training step at 512 px, random weights. On a CPU
the same code runs sigma-mini (--model sigma-mini --sizes 256 --train-sizes 256), to be tried out before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from mindsigma import __version__, command_line
from mindsigma.errors import MindSigmaError

ROOT = Path(__file__).resolve().parents[1]


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(__doc__.splitlines()[0], "python tools/profile_npu.py --out profile.json")
    add = parser.add_argument
    add("--model", default="xl", help="xl (the XL/2 of each size) or a preset")
    add("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048], help="square images, in pixels")
    add("--train-sizes", type=int, nargs="*", default=[512], help="sizes of training steps; none to leave them out")
    add("--tokens", type=int, help="length of the captions; default the model's longest")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on a CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    add("--warm-up", type=int, default=3, help="steps before the clock starts; the first compiles")
    add("--steps", type=int, default=20, help="timed steps; the median counts")
    add("--profiled", type=int, default=3, help="further steps under mindspore.profiler; 0 for none")
    add("--out", default="outputs/profile.json", help="where the numbers go")
    add("--only", nargs=2, metavar=("KIND", "PIXELS"), help=argparse.SUPPRESS)
    return parser


def measure(args, kind, pixels):
    """Result of one case, in this process."""
    from mindsigma.inspect.profiling import denoising, model_name, timed, training
    from mindsigma.runtime import resolve_dtype, set_device

    device = set_device(args.device)
    model = model_name(args.model, pixels)
    make = {"step": denoising, "train": training}[kind]
    result = timed(make(model, pixels, args.dtype, args.tokens), args.warm_up, args.steps, args.profiled)
    dtype = str(resolve_dtype(args.dtype)).lower()
    return {"case": kind, "pixels": pixels, "model": model, "device": device, "dtype": dtype, **result}


def in_new_process(case):
    """Result of one case from a process of its own, so that peaks of memory are its own."""
    kind, pixels = case
    with tempfile.NamedTemporaryFile("r", suffix=".json") as file:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", kind, str(pixels), "--out", file.name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            message = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise MindSigmaError(f"{kind} at {pixels} px: {message.removeprefix('error: ')}")
        return json.loads(Path(file.name).read_text(encoding="utf-8"))


def versions():
    """Device, MindSpore, CANN and driver, as far as they can be told."""
    from mindsigma.inspect.profiling import software

    return {"mindsigma": __version__, **software()}


def row(result):
    """One row of the table, in Markdown."""
    what = "guided step" if result["case"] == "step" else "training step, batch 1"
    return (
        f"| {result['device']} | {result['model']} | {what}, {result['pixels']} px, {result['dtype']} "
        f"| {result['median_seconds']:.3f} | {result['first_seconds']:.1f} | {result['peak_bytes'] / 1e9:.1f} GB |"
    )


def main():
    """Measure every case, print the rows, write the file; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma.weights.formats.atomic import write_json

    for name in ("warm_up", "steps"):
        if getattr(args, name) < 1:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.profiled < 0:
        raise MindSigmaError(f"--profiled must not be negative, not {args.profiled}")
    if args.only:
        result = measure(args, args.only[0], int(args.only[1]))
        write_json(Path(args.out), result)
        return 0
    cases = [("step", pixels) for pixels in args.sizes] + [("train", pixels) for pixels in args.train_sizes]
    found = versions()
    print(", ".join(f"{name} {value}" for name, value in found.items()))
    print("| device | model | case | seconds | first | peak memory |\n|---|---|---|---|---|---|")
    results = []
    for case in cases:
        results.append(in_new_process(case))
        print(row(results[-1]), flush=True)
    for result in results:
        total = sum(seconds for _, _, seconds in result["kernels"])
        shares = ", ".join(f"{kind} {seconds / total:.0%}" for kind, _, seconds in result["kernels"][:6])
        if shares:
            print(f"{result['case']} {result['pixels']} px: {shares}")
    write_json(Path(args.out), {"versions": found, "options": vars(args), "cases": results})
    print(args.out)
    return 0


if __name__ == "__main__":
    command_line.run(main)

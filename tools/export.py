"""Write the graph that an NPU would run as MINDIR, on any host, with a report of what is in it.

    python tools/export.py --model PixArt-Sigma-XL-2-1024-MS --part step --dtype fp16 --report -

Exit code 1 if --diff finds nodes that the stored report does not have.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError
from mindsigma.sampling import SAMPLERS

ROOT = Path(__file__).resolve().parents[1]

GOLDEN = ROOT / "tests" / "golden" / "graphs"


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0], "python tools/export.py --model PixArt-Sigma-XL-2-1024-MS --part step --report -"
    )
    add = parser.add_argument
    add("--model", default="sigma-mini", help="preset or released name (no weights needed), folder or weight file")
    add("--part", default="step", help="step, caption, vae-decode, vae-encode, t5 or train")
    add("--height", type=int, help="pixels; default the model's base resolution")
    add("--width", type=int, help="pixels; default the model's base resolution")
    add("--batch", type=int, default=1, help="images; guidance doubles what the DiT sees")
    add("--tokens", type=int, help="length of the captions; default the model's longest")
    add("--guidance", action=argparse.BooleanOptionalAction, default=True, help="two captions an image")
    add("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16", help="of the activations")
    add("--device", choices=("Ascend", "CPU"), default="Ascend", help="whose kernels the graph holds; neither runs it")
    add("--depth", type=int, help="only so many blocks, of an architecture without weights")
    add("--kv-compression", metavar="MODE:FACTOR:LAYERS", help="instead of the model's own; none for none")
    add("--sampler", choices=tuple(SAMPLERS), default="dpm", help="of the denoising step")
    add("--pag-layers", metavar="LAYERS", help="the step has perturbed attention in these blocks, as in 14 or 3,13-15")
    add("--inpaint", action="store_true", help="the step sets to a given image what a mask keeps")
    add("--control-layers", type=int, default=0, metavar="N", help="the step has a ControlNet of N blocks beside it")
    add("--optimizer", default="came", choices=("came", "adamw", "lion"), help="of the training step")
    add("--recompute", action="store_true", help="the training step computes the blocks' activations twice")
    add("--no-weights", action="store_true", help="leave the weights out of the file although there are some")
    add("--out", metavar="FILE.mindir", help="where the graph goes; default nowhere")
    add("--report", metavar="FILE", help="the report as text; - prints it")
    add("--short", action="store_true", help="list in the text only data movements of activations")
    add(
        "--launches",
        action="store_true",
        help="also what the back end launches: a dry run on the Ascend host, with g++",
    )
    add("--json", metavar="FILE", help="the report as JSON")
    add("--diff", metavar="STORED.json", help="compare with a report that --json or --update wrote")
    add("--update", nargs="*", metavar="NAME", help="write the stored reports anew: all, or those of these names")
    return parser


def request_of(args):
    """The Request of the command line."""
    from mindsigma.inspect.parts import Request

    names = (
        "model", "part", "height", "width", "batch", "dtype", "tokens", "depth", "kv_compression", "optimizer",
        "recompute", "device", "sampler", "pag_layers", "inpaint", "control_layers",
    )  # fmt: skip
    values = {name: getattr(args, name) for name in names}
    return Request(**values, guided=args.guidance, weights=not args.no_weights)


def update(names):
    """Write the stored reports of these cases, or of all, anew and print what changed."""
    from mindsigma.inspect.cases import CASES
    from mindsigma.inspect.compare import as_json, differences, read_report
    from mindsigma.inspect.launches import stored_launches
    from mindsigma.inspect.parts import export_part
    from mindsigma.inspect.report import compact, report_of

    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise MindSigmaError(f"--update {unknown[0]}: no such case; known: {', '.join(CASES)}")
    names = names or list(CASES)
    if len(names) > 1:  # one process each: MindSpore keeps what it compiled
        for name in names:
            code = subprocess.run([sys.executable, __file__, "--update", name]).returncode
            if code:
                raise MindSigmaError(f"--update {name} failed")
        return
    report = compact({**report_of(*export_part(CASES[names[0]])), **stored_launches(CASES[names[0]])})
    file = GOLDEN / f"{names[0]}.json"
    lines = differences(read_report(file), report)[0] if file.is_file() else ["new"]
    write(file, as_json(report))
    print("\n".join([f"{file.relative_to(ROOT)}:{'' if lines else ' as before'}", *(f"  {line}" for line in lines)]))


def write(path, text):
    """Write a text beside its target and rename it."""
    from mindsigma.weights.formats.atomic import naming, replacing

    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


def main():
    """Export, report, compare; returns the exit code."""
    args = build_parser().parse_args()
    if args.update is not None:
        update(args.update)
        return 0
    request = request_of(args)
    from mindsigma.inspect.compare import differences, read_report
    from mindsigma.inspect.parts import export_part
    from mindsigma.inspect.report import compact, report_of
    from mindsigma.inspect.report_text import text_of
    from mindsigma.weights.formats.atomic import write_json

    stored = read_report(args.diff) if args.diff else None
    if args.launches and request.device != "Ascend":
        raise MindSigmaError(f"--launches is of Ascend's back end, not of --device {request.device}")
    report = report_of(*export_part(request, None if args.out is None else Path(args.out)))
    if args.launches:
        from mindsigma.inspect.launches import stored_launches

        report.update(stored_launches(request))
    text = text_of(report, args.short)
    if args.report and args.report != "-":
        write(Path(args.report), text + "\n")
    elif args.report or not (args.out or args.json or args.diff):
        print(text)
    if args.json:
        write_json(Path(args.json), report)
    if report["violations"]:
        print(f"warning: the NPU's kernels refuse: {report['violations'][0]}", file=sys.stderr)
    if stored is None:
        return 0
    lines, added = differences(stored, compact(report))
    print("\n".join(lines) if lines else "no differences")
    return 1 if added else 0


if __name__ == "__main__":
    command_line.run(main)

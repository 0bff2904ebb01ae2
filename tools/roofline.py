"""Estimate the least time of a denoising step on an NPU from its graph's report and the NPU's published peaks.

    python tools/roofline.py --npu 910B
    python tools/roofline.py --npu 910B --recipes 8 64 512 --zero 2 --zero-group 8

Reads the stored reports of the presets, or those of tools/export.py --json. Nothing is measured.
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.choices import ZERO_STAGES
from mindsigma.errors import MindSigmaError

ROOT = Path(__file__).resolve().parents[1]


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(__doc__.splitlines()[0], "python tools/roofline.py --npu 910B")
    add = parser.add_argument
    add("reports", nargs="*", metavar="REPORT.json", help="of tools/export.py; default the stored ones of all presets")
    add("--npu", nargs="+", help="names in --npus; default all")
    add("--npus", default=str(ROOT / "configs" / "npu.yaml"), metavar="FILE.yaml", help="peaks of NPUs")
    add("--efficiency", type=float, default=1.0, help="part of the peaks that is reached; 1 is the bound")
    add("--recipes", type=int, nargs="+", metavar="N", help="instead: configs/train on N cards, as a table")
    add("--zero", type=int, choices=ZERO_STAGES, default=2, help="stage of ZeRO of --recipes")
    add("--zero-group", type=int, default=0, metavar="N", help="cards that divide among themselves; default all")
    add("--kinds", type=int, default=0, metavar="N", help="list the N most expensive kinds of nodes")
    return parser


def recipes(args, npus):
    """Print the table of --recipes; returns the exit code."""
    from mindsigma.inspect.cluster import ASSUMPTIONS, SERVER, table
    from mindsigma.inspect.compare import read_report

    if min(args.recipes) < 1:
        raise MindSigmaError(f"--recipes {min(args.recipes)}: at least 1 card")
    group = args.zero_group
    if group and (group < 2 or SERVER % group and group % SERVER or any(n > group and n % group for n in args.recipes)):
        raise MindSigmaError(f"--zero-group {group}: take a divisor or a multiple of {SERVER} that divides the cards")
    if len(args.npu or ()) != 1:
        raise MindSigmaError("--recipes needs one --npu, whose links are known, such as 910B")
    among = f" in groups of {group}" if group else ""
    print(f"Planned on paper for the {args.npu[0]}, ZeRO {args.zero}{among}; not measured.\n\n{ASSUMPTIONS}\n")
    reports = ROOT / "tests" / "golden" / "graphs"
    npu, read = npus[args.npu[0]], lambda name: read_report(reports / f"{name}.json")
    lines = table(read, args.recipes, npu, args.zero, group)
    print("\n".join(lines))
    return 0


def main():
    """Read, estimate, print; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma.inspect.cases import WHOLE
    from mindsigma.inspect.compare import read_report
    from mindsigma.inspect.roofline import HEADER, lines_of, read_npus

    npus = read_npus(args.npus)
    for name in args.npu or ():
        if name not in npus:
            raise MindSigmaError(f"--npu {name}: not in {args.npus}; known: {', '.join(npus)}")
    if args.recipes:
        return recipes(args, npus)
    stored = [ROOT / "tests" / "golden" / "graphs" / f"{name}.json" for name in WHOLE]
    files = args.reports or [file for file in stored if file.is_file()]
    reports = [read_report(file) for file in files]
    print(
        f"Estimates, not measurements: each node at {args.efficiency:g} of the peak of arithmetic or memory, whichever "
        "takes longer; no overlap, no launch times.\npublished: mindone's example on one 910B, batch 1 with guidance."
    )
    print(HEADER)
    for name in args.npu or npus:
        for report in reports:
            print("\n".join(lines_of(report, npus[name], args.efficiency, args.kinds)))
    return 0


if __name__ == "__main__":
    command_line.run(main)

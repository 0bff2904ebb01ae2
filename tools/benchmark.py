"""Measure seconds and peak memory, alone or in turn with diffusers (PyTorch) and mindone (MindSpore).

    python tools/benchmark.py
    python tools/benchmark.py --peer diffusers mindone --peer-python PYTHON_WITH_TORCH

Cases: sigma-mini's images cold and warm, guided steps of XL/2, VAE, T5, training, translation of T5-XXL. A peer runs
the same case on the same inputs in a process of its own, A B A B; the first run of each compiles and is not counted.
Prints a table and writes JSON, and Markdown beside it, with the machine and the versions.
"""

from mindsigma import command_line  # first, as it judges this Python

# isort: split
import os
import sys
import tempfile
from pathlib import Path

from measure.commands import COMMANDS, NEED_TORCH, WARMED
from measure.peers import PEER_CASES, SAME_WEIGHTS, difference, peer_contestant, training_step, write_inputs
from measure.tables import TEXT_HEAD, TITLES, machine, markdown, text_line
from measure.turns import Command, Worker, in_turn

from mindsigma.errors import MindSigmaError

TOOLS = Path(__file__).resolve().parent

CASES = tuple(TITLES)
DEFAULT_CASES = ("mini-cold", "mini-warm", "xl-256", "xl-512")
DEFAULT_PEER_CASES = (
    "mini-warm", "mini-warm-4", "mini-cold", "mini-cold-cached", "mini-step", "xl-256", "xl-512", "vae-512", "t5-mini",
    "t5-xxl-2", "train-mini",
)  # fmt: skip
REPEATS = 5
PEER_REPEATS = {"mini-warm-4": 3, "mini-cold": 3, "mini-cold-cached": 2, "xl-512": 3, "vae-512": 2}
MINDONE_REPEATS = {"xl-256": 2}


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0],
        "python tools/benchmark.py --cases mini-warm\n\nwithout --cases: "
        + " ".join(DEFAULT_CASES)
        + "; with a peer: "
        + " ".join(DEFAULT_PEER_CASES),
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, metavar="CASE", help="what to measure: " + " ".join(CASES))
    add(
        "--repeats",
        type=int,
        help="counted runs a case, with 0 the first one counts; default 5, beside a peer 2 or 3 of slow ones",
    )
    add("--peer", nargs="+", choices=tuple(PEER_CASES), default=[], help="whom to run beside")
    add("--peer-python", metavar="PATH", help="interpreter of an environment with torch, diffusers and transformers")
    add("--out", default="outputs/benchmark.json", help="where the numbers go; the tables go beside it as .md")
    return parser


def check(args):
    """Cases to measure; raises for options that do not fit together."""
    if args.repeats is not None and args.repeats < 0:
        raise MindSigmaError(f"--repeats must be at least 0, not {args.repeats}")
    cases = args.cases or (DEFAULT_PEER_CASES if args.peer else DEFAULT_CASES)
    torch = "diffusers" in args.peer or any(case in NEED_TORCH for case in cases)
    if torch and not args.peer_python:
        raise MindSigmaError("give --peer-python, an interpreter of an environment that has PyTorch")
    if args.peer_python and not os.access(args.peer_python, os.X_OK):
        raise MindSigmaError(f"--peer-python {args.peer_python}: no such program")
    if args.cases and "train-mini" in cases and "diffusers" not in args.peer:
        raise MindSigmaError("--cases train-mini is measured beside PyTorch alone: give --peer diffusers")
    return list(dict.fromkeys(cases))


def contestant(case, folder, peer_python):
    """Worker or Command that runs a case here."""
    if case in COMMANDS:
        return Command(lambda: COMMANDS[case](folder, peer_python))
    return Worker(sys.executable, TOOLS / "measure" / "cases.py", case, {})


def measure(case, peer, args, folder, versions):
    """Results of a case here and by a peer (None: here alone; None is returned for what the peer does not have)."""
    if case == "train-mini":
        if peer != "diffusers":
            return None
        ours, theirs, apart = training_step(folder, args.peer_python, args.repeats)
        return {"here": ours, peer: {**theirs, "difference": apart}}
    repeats = args.repeats
    if repeats is None:
        few = {**PEER_REPEATS, **(MINDONE_REPEATS if peer == "mindone" else {})} if peer else {}
        repeats = few.get(case, REPEATS)
    contestants = {}
    try:
        if peer:
            other = peer_contestant(peer, case, folder, args.peer_python)
            if other is None:
                return None
            contestants[peer] = other
        contestants["here"] = contestant(case, folder, args.peer_python)
        results = in_turn(contestants, repeats, warm_up=case not in COMMANDS or case in WARMED)
        for one in contestants.values():
            versions.update(one.prepared.get("versions", {}))
        if peer and case in SAME_WEIGHTS:
            results[peer]["difference"] = compare(contestants, peer, folder)
    finally:
        for one in contestants.values():
            one.close()
    return results


def compare(contestants, peer, folder):
    """Difference of the last results of both."""
    import numpy as np

    for name, one in contestants.items():
        one.save(folder / f"{name}.npy")
    return difference(np.load(folder / "here.npy"), np.load(folder / f"{peer}.npy"))


def main():
    """Run the cases, print the table, write the files."""
    args = build_parser().parse_args()
    cases = check(args)
    from mindsigma.weights.formats.atomic import replacing, write_json

    report = {"machine": machine(), "cases": {}}
    versions = {}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()))
    print(TEXT_HEAD)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.peer:
            write_inputs(folder)
        for case in cases:
            entry = {}
            for peer in args.peer or [None]:
                results = measure(case, peer, args, folder, versions)
                if results is None:
                    continue
                ours = results.pop("here")
                if not entry:
                    entry = {**ours, **({"peers": {}} if peer else {})}
                print(text_line(case, ours), flush=True)
                for other, theirs in results.items():
                    ratio = theirs["median_seconds"] / ours["median_seconds"]
                    entry["peers"][other] = {**theirs, "ratio": ratio, "here": ours}
                    print(text_line(case, entry["peers"][other], other), flush=True)
            if entry:
                report["cases"][case] = entry
            else:
                print(f"{case:<18} not of {' '.join(args.peer)}; left out")
    report["machine"].update({name: value for name, value in versions.items() if name != "numpy"})
    out = Path(args.out)
    write_json(out, report)
    tables = out.with_suffix(".md")
    with replacing(tables) as file:
        file.write(markdown(report).encode())
    print(out, tables, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)

"""Draw the held-out losses of several runs into one figure, and print them as a table.

python tools/compare_runs.py runs/position-keep runs/position-interpolate --output position.png
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Compare runs of tools/train.py by their held-out loss.",
        "python tools/compare_runs.py runs/plain runs/kv-conv-deep --output curves.png",
    )
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs; the folder's name is the curve's")
    add("--output", metavar="FILE", help="PNG of the curves")
    add("--title", default="")
    return parser


def curve_of(folder):
    """list of (step, held-out loss) of a run."""
    from mindsigma.training.run_log import LOG, read_log

    path = Path(folder) / LOG
    points = [(line["step"], line["validation_loss"]) for line in read_log(path) if "validation_loss" in line]
    if not points:
        raise MindSigmaError(f"{path}: no held-out loss; train with --validation-data")
    return points


def train_seconds(folder):
    """Median seconds a step by the log, validation left out; None if there are too few lines."""
    import statistics

    from mindsigma.training.run_log import LOG, read_log

    lines = [line for line in read_log(Path(folder) / LOG) if "images_per_second" in line]
    seconds = [
        (b["seconds"] - a["seconds"]) / (b["step"] - a["step"])
        for a, b in zip(lines, lines[1:])
        if b["step"] > a["step"] and b["seconds"] > a["seconds"]
    ]
    return statistics.median(seconds) if seconds else None


def draw(path, curves, title):
    """PNG with one curve a run: dict name -> points."""
    from matplotlib.figure import Figure

    from mindsigma.weights.formats.atomic import replacing

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points), marker="o", markersize=3, label=name)
    axes.set(xlabel="step", ylabel="held-out loss", title=title, yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(Path(path)) as file:
        figure.savefig(file, format="png", dpi=100)


def main():
    """Parse, read, print; returns the exit code."""
    args = build_parser().parse_args()
    curves = {Path(folder).name: curve_of(folder) for folder in args.runs}
    steps = sorted({step for points in curves.values() for step, _ in points})
    width = max(len(name) for name in curves)
    print(" " * width + "".join(f"{f'step {step}':>12}" for step in steps) + "      s/step")
    for folder, (name, points) in zip(args.runs, curves.items()):
        known, seconds = dict(points), train_seconds(folder)
        cells = "".join(f"{known[step]:>12.5f}" if step in known else " " * 12 for step in steps)
        print(f"{name:<{width}}{cells}{'' if seconds is None else f'{seconds:>12.2f}'}")
    if args.output:
        draw(args.output, curves, args.title)
        print(args.output)
    return 0


if __name__ == "__main__":
    command_line.run(main)

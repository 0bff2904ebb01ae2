"""Measure how cost grows with resolution: memory of the VAE's decode, seconds of XL/2's guided step; draw both.

    python tools/scaling.py --out outputs/scaling.json --figure outputs/scaling.png

A point is KIND:WHAT:PIXELS: tiled or whole (decode) of mini or sdxl; step or block of plain or kv. Steps too long to be
run are estimated from single blocks, 28 times one, and drawn hollow. Each point is a process of its own; points that
the JSON already holds are not measured again, so that a run goes on where it was stopped. With --processor the seconds
are those of all cores together, which other work on the machine hardly changes.
"""

from mindsigma import command_line  # first, as it judges this Python

# isort: split
import json
import statistics
import sys
from pathlib import Path

from measure.tables import machine, table
from measure.turns import Worker, in_turn

from mindsigma.errors import MindSigmaError

TOOLS = Path(__file__).resolve().parent

WHATS = {"tiled": ("mini", "sdxl"), "whole": ("mini", "sdxl"), "step": ("plain", "kv"), "block": ("plain", "kv")}
PIXELS = (256, 512, 1024, 2048, 4096)
DEFAULT_POINTS = (
    *(f"tiled:mini:{pixels}" for pixels in PIXELS[1:]),
    "whole:mini:512", "whole:mini:1024", "tiled:sdxl:512",
    *(f"step:{what}:{pixels}" for pixels in (256, 512, 1024) for what in ("plain", "kv")),
    *(f"block:{what}:{pixels}" for pixels in (1024, 2048) for what in ("plain", "kv")),
)  # fmt: skip
REPEATS = {"step:256": 3, "step:512": 2, "block:1024": 2, "block:2048": 1}  # after a first run; else the first counts
DEPTH = 28
# Share of a 4K or 2K image's time that compressing keys and values fourfold saves (arXiv 2403.04692: 58 to 38 s, 91 to
# 60 s), and of a step's operations, counted.
PAPER_SAVING = {2048: 1 - 38 / 58, 4096: 1 - 60 / 91}
COUNTED_SAVING = {512: 0.04, 1024: 0.13, 2048: 0.25, 4096: 0.33}


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0], "python tools/scaling.py --out outputs/scaling.json --figure outputs/scaling.png"
    )
    add = parser.add_argument
    add("--points", nargs="+", metavar="KIND:WHAT:PIXELS", help="default: " + " ".join(DEFAULT_POINTS))
    add("--processor", action="store_true", help="tell seconds of all cores together instead of the clock's")
    add("--again", action="store_true", help="measure the points anew that the file holds")
    add("--out", default="outputs/scaling.json", help="where the numbers are kept, after every point")
    add("--figure", metavar="FILE.png", help="where the figure goes; default beside the numbers")
    return parser


def parse_point(text):
    """(kind, what, pixels) of a point."""
    kind, what, pixels = (*text.split(":"), "", "")[:3]
    if text.count(":") != 2 or what not in WHATS.get(kind, ()) or not pixels.isdigit() or int(pixels) not in PIXELS:
        kinds = "; ".join(f"{name}:{'|'.join(whats)}" for name, whats in WHATS.items())
        raise MindSigmaError(f"--points {text}: not one of {kinds}, with {', '.join(map(str, PIXELS))} pixels")
    return kind, what, int(pixels)


def measure(kind, what, pixels):
    """Result of one point, as of `in_turn`."""
    options = {"pixels": pixels}
    options.update({"vae": what} if kind in ("tiled", "whole") else {"compressed": what == "kv"})
    worker = Worker(sys.executable, TOOLS / "measure" / "scaling_cases.py", kind, options)
    try:
        return in_turn({"here": worker}, REPEATS.get(f"{kind}:{pixels}", 0))["here"]
    finally:
        worker.close()


def read_report(path):
    """What an earlier run wrote, or an empty report."""
    if not path.is_file():
        return {"machine": machine(), "points": {}}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        points = report["points"]
        for text in points:
            parse_point(text)
        return {"machine": report["machine"], "points": points}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise MindSigmaError(f"--out {path}: exists and is not a report of this tool; give another name") from None


def step_seconds(points, what):
    """dict pixels -> (seconds of a guided step, whether it was run rather than estimated by block)."""
    result = {}
    for pixels in PIXELS:
        run, plain = points.get(f"step:{what}:{pixels}"), points.get(f"block:plain:{pixels}")
        compressed = points.get(f"block:kv:{pixels}")
        if run:
            result[pixels] = run["median_seconds"], True
        elif plain and (what == "plain" or compressed):
            halves = plain["median_seconds"], (plain if what == "plain" else compressed)["median_seconds"]
            result[pixels] = DEPTH / 2 * sum(halves), False  # the deeper half of the layers is compressed
    return result


def step_rows(points):
    """Rows of cells of the steps, by size."""
    plain, kv = step_seconds(points, "plain"), step_seconds(points, "kv")
    rows = []
    for pixels in sorted(set(plain) | set(kv)):
        a, b = plain.get(pixels), kv.get(pixels)
        saved = f"{1 - b[0] / a[0]:.0%}" if a and b else ""
        paper = f"{PAPER_SAVING[pixels]:.0%}" if pixels in PAPER_SAVING else ""
        run = points.get(f"step:plain:{pixels}") or points.get(f"step:kv:{pixels}")
        peak = f"{run['peak_bytes'] / 1e9:.1f} GB" if run else ""
        rows.append([str(pixels), str((pixels // 16) ** 2), _cell(a), _cell(b), saved, paper, peak])
    return rows


def decode_rows(points):
    """Rows of cells of the decodes."""
    rows = []
    for text, point in points.items():
        kind, what, pixels = parse_point(text)
        if kind in ("tiled", "whole"):
            peak = f"{point['peak_bytes'] / 1e9:.2f} GB"
            rows.append([f"{what}, {kind}", str(pixels), peak, f"{point['median_seconds']:.1f}"])
    return rows


def tables(points):
    """Markdown of the steps, and of the decodes."""
    head = ["px", "tokens", "step, s", "with KV compression", "saved", "paper", "peak memory"]
    decodes = table(["decode", "px", "peak memory", "s"], decode_rows(points))
    return f"{table(head, step_rows(points))}\n\n{decodes}"


def _processor(point):
    return statistics.median(point["cpu_seconds"])


def _cell(value):
    return "" if value is None else f"{value[0]:.1f}" if value[1] else f"{value[0]:.0f} (by block)"


def draw(path, points):
    """PNG: memory of the decode, seconds of a step, what compression saves."""
    from matplotlib.figure import Figure

    from mindsigma.weights.formats.atomic import replacing

    figure = Figure(figsize=(12, 4), layout="constrained")
    memory, seconds, saving = figure.subplots(1, 3)
    for kind in ("tiled", "whole"):
        for what, name in (("mini", "sigma-mini's VAE"), ("sdxl", "SDXL's VAE")):
            found = {
                p: points[f"{kind}:{what}:{p}"]["peak_bytes"] / 1e9 for p in PIXELS if f"{kind}:{what}:{p}" in points
            }
            if found:
                memory.plot(*zip(*found.items()), marker="o", linestyle="-" if kind == "tiled" else "--",
                            label=f"{name}, {kind}")  # fmt: skip
    memory.set(title="decode: peak memory of the process", xlabel="pixels a side", ylabel="GB", xscale="log")
    curves = {what: step_seconds(points, what) for what in ("plain", "kv")}
    for what, name, colour in (("plain", "no compression", "tab:blue"), ("kv", "KV compression", "tab:orange")):
        curve = {(pixels // 16) ** 2: value for pixels, value in curves[what].items()}
        seconds.plot(list(curve), [value for value, _ in curve.values()], color=colour, label=name)
        for tokens, (value, was_run) in curve.items():
            seconds.plot(tokens, value, "o", color=colour, markerfacecolor=colour if was_run else "white")
    seconds.set(title="XL/2: a guided step (hollow: by block)", xlabel="tokens", ylabel="s", xscale="log", yscale="log")
    both = [pixels for pixels in curves["plain"] if pixels in curves["kv"]]
    saved = [100 * (1 - curves["kv"][pixels][0] / curves["plain"][pixels][0]) for pixels in both]
    saving.plot(both, saved, marker="o", label="here, seconds")
    for name, values, style in (
        ("operations, counted", COUNTED_SAVING, ":"),
        ("the paper, seconds", PAPER_SAVING, "s"),
    ):
        saving.plot(list(values), [100 * value for value in values.values()], style, color="gray", label=name)
    saving.set(title="saved by KV compression", xlabel="pixels a side", ylabel="%", xscale="log")
    for axes, ticks in ((memory, PIXELS[1:]), (saving, PIXELS), (seconds, [(p // 16) ** 2 for p in PIXELS[:4]])):
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    memory.set_ylim(bottom=0)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def main():
    """Measure what is missing, print the tables, draw; returns the exit code."""
    args = build_parser().parse_args()
    wanted = list(dict.fromkeys(args.points or DEFAULT_POINTS))
    parsed = {text: parse_point(text) for text in wanted}
    from mindsigma.weights.formats.atomic import write_json

    out = Path(args.out)
    report = read_report(out)
    points = report["points"]
    for text, point in parsed.items():
        if text in points and not args.again:
            continue
        points[text] = measure(*point)
        write_json(out, report)
        result = points[text]
        seconds = _processor(result) if args.processor else result["median_seconds"]
        print(f"{text:<18} {seconds:9.2f} s {result['peak_bytes'] / 1e9:7.2f} GB", flush=True)
    if args.processor:
        points = {text: {**point, "median_seconds": _processor(point)} for text, point in points.items()}
    print(tables(points))
    figure = Path(args.figure) if args.figure else out.with_suffix(".png")
    draw(figure, points)
    print(out, figure, sep="\n")
    return 0


if __name__ == "__main__":
    command_line.run(main)

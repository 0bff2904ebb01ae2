"""How well pictures keep to the edges that a ControlNet was asked for: a table and a grid of pictures.

    python tools/compare_controls.py --controlnet runs/edges/checkpoints/step_00000700/controlnet_ema --data held-out

Draws the caption of each picture of a data set from the same noise, guided by the picture's Canny edges and not.
The table has means over the pictures, of the Canny edges of what was drawn. Precision: the share of drawn edge pixels
that lie within a few pixels of an asked one; recall: the share of asked ones that lie near a drawn one; F1: their
harmonic mean. The data's own pictures, once through the VAE, tell what is to be had.
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say

CELL = 128  # pixels a side of a picture in the grid


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Agreement of drawn edges with those that were asked for.",
        "python tools/compare_controls.py --controlnet runs/edges/checkpoints/step_00000700/controlnet_ema "
        "--data scenes/held-out",
    )
    add = parser.add_argument
    add("--model", default="sigma-mini", help="the base")
    add("--components", help="as of tools/generate.py")
    add("--controlnet", required=True, metavar="FOLDER", help="of edges")
    add("--data", required=True, help="pictures with captions, of any layout")
    add("--condition", default="canny", metavar="KIND", help="canny, with the thresholds of its training")
    add("--count", type=int, default=24, help="pictures, spread over the data")
    add("--scale", type=float, nargs="+", default=[1.0], help="of the control")
    add("--guess-mode", action="store_true", help="draw with each scale in guess mode, too")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--guidance-scale", type=float, default=4.5)
    add("--tolerance", type=float, default=2.0, help="pixels that an edge may lie beside the asked one")
    add("--shown", type=int, default=8, help="pictures in the grid")
    add("--seed", type=int, default=0)
    add("--output", default="outputs/controls", help="folder of grid.png and controls.json")
    return parser


def agreement(found, asked, tolerance):
    """(precision, recall, F1) of edges, bool (H, W) each.

    Without any edge on one side what is measured there is 0, on both sides 1.
    """
    if not found.any() and not asked.any():
        return 1.0, 1.0, 1.0
    precision, recall = _share_near(found, asked, tolerance), _share_near(asked, found, tolerance)
    return precision, recall, 2 * precision * recall / max(precision + recall, 1e-12)


def _share_near(these, those, tolerance):
    """Share of `these` that lie within `tolerance` pixels of one of `those`."""
    import cv2
    import numpy as np

    if not these.any() or not those.any():
        return 0.0
    distance = cv2.distanceTransform((~those).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float((distance[these] <= tolerance + 1e-4).mean())


def cases(args, size):
    """list of (caption, picture, condition) of the data, PIL images of size x size."""
    import numpy as np

    from mindsigma.data import open_records
    from mindsigma.data.conditions import Condition
    from mindsigma.data.images import cover_and_crop

    condition = Condition.of(args.condition)
    if condition.kind != "canny":
        raise MindSigmaError(f"--condition {args.condition}: edges are compared, which canny draws")
    records = open_records(args.data)
    result = []
    for index in np.linspace(0, len(records) - 1, min(args.count, len(records))).round().astype(int).tolist():
        picture = cover_and_crop(records.image(index), size, size, "bilinear")
        result.append((records.caption(index, True), picture, condition.computed(picture)))
    return result, condition


def edges_of(picture, condition):
    """bool (H, W) of a PIL image."""
    import numpy as np

    return np.asarray(condition.computed(picture))[..., 0] > 0


def main():
    """Draw, compare, print; returns the exit code."""
    args = build_parser().parse_args()
    if args.count < 1 or args.steps < 2 or args.shown < 1 or not args.tolerance >= 0:
        raise MindSigmaError("--count and --shown must be at least 1, --steps 2, --tolerance 0")
    import numpy as np

    from mindsigma import PixArtSigmaPipeline
    from mindsigma.pipeline.pictures import image_grid, save_png, through_vae
    from mindsigma.weights.formats.atomic import write_json

    pipeline = PixArtSigmaPipeline.from_pretrained(args.model, components=args.components, controlnet=args.controlnet)
    drawn_from, condition = cases(args, pipeline.default_size)
    rows = {"the pictures themselves, through the VAE": [through_vae(pipeline.vae, one) for _, one, _ in drawn_from]}
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale, "progress": False}
    ways = [("without control", 0.0, False), *((f"with control, scale {s:g}", s, False) for s in args.scale)]
    ways += [(f"in guess mode, scale {s:g}", s, True) for s in args.scale if args.guess_mode]
    for name, scale, guess in ways:
        rows[name] = []
        for i, (caption, _, asked) in enumerate(drawn_from):
            control = {"control_image": asked, "control_scale": scale, "guess_mode": guess}
            rows[name].append(pipeline(caption, seed=args.seed + i, **options, **control).images[0])
    table = []
    for name, pictures in rows.items():
        found = [
            agreement(edges_of(picture, condition), edges_of(one, condition), args.tolerance)
            for picture, (_, one, _) in zip(pictures, drawn_from)
        ]
        means, deviation = np.mean(found, 0), np.std(found, 0)
        table.append({"name": name, **dict(zip(("precision", "recall", "f1"), means)), "f1_deviation": deviation[2]})
    say("| | precision | recall | F1 | deviation of F1 |", "|---|---|---|---|---|")
    for row in table:
        say("| {name} | {precision:.3f} | {recall:.3f} | {f1:.3f} | {f1_deviation:.3f} |".format(**row))
    shown = slice(0, args.shown)
    pictures = [asked for _, _, asked in drawn_from[shown]]
    pictures += [one for name in list(rows)[1:] for one in rows[name][shown]]
    small = [one.resize((CELL, CELL)) for one in pictures]
    folder = Path(args.output)
    captions = [caption for caption, _, _ in drawn_from]
    about = {"prompts": "\n".join(captions[shown]), "rows": "\n".join(["condition", *list(rows)[1:]])}
    save_png(image_grid(small, len(captions[shown])), folder / "grid.png", about)
    table = [{key: value if key == "name" else float(value) for key, value in row.items()} for row in table]
    write_json(folder / "controls.json", {"controlnet": args.controlnet, "prompts": captions, "rows": table})
    say(folder / "grid.png")
    return 0


if __name__ == "__main__":
    command_line.run(main)

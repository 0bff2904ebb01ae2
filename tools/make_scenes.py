"""Compose a data set of captioned emoji scenes, such as the bundled sigma-mini was trained on, or of pages of text.

python tools/make_scenes.py scenes/ --count 2000 --aspect-ratios 0.78,1.0,1.29 --held-out 0.1
python tools/make_scenes.py words/ --text words --held-out 0.1

The same command goes on after a kill.
"""

import argparse
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say
from mindsigma.progress import bar

TRAIN, HELD_OUT = SETS = ("train", "held-out")  # folders of the two sets
SIDE_MULTIPLE = 16  # pixels, of sides that no table gives
RATIOS = (0.2, 5.0)
CHUNK = 64  # scenes handed to the threads at once
DONE = "scenes.json"
TEXTS = "textatlas.json"  # what is to be read on which image, in TextAtlasEval's layout
KINDS = ("words", "sentences")  # of pages of text
OF_TEXT = ("word", "ink", "letters", "shift")  # options that pages of text alone have


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Compose captioned emoji scenes, the same for the same options.",
        "python tools/make_scenes.py scenes --count 200 --held-out 0.1",
    )
    add = parser.add_argument
    add("out", help="folder to write; with --held-out it gets the folders train/ and held-out/")
    add("--count", type=int, default=1000, help="scenes to train on")
    add("--size", type=int, default=256, help="pixels: side of the square, whose area other aspect ratios keep")
    add(
        "--aspect-ratios",
        type=ratios,
        metavar="all|H/W,...",
        help='heights over widths to vary, as in "0.78,1.0,1.29", or "all" of the training table; default squares',
    )
    add("--held-out", type=float, default=0.0, metavar="SHARE", help="share of compositions kept out of training")
    add("--held-out-count", type=int, metavar="N", help="scenes of those compositions; default a tenth of --count")
    add("--only", action="append", default=[], metavar="NAME", help="use this emoji alone; may be given again")
    add("--exclude", action="append", default=[], metavar="NAME", help="leave this emoji out; may be given again")
    add("--layout", choices=("official", "folder"), default="official", help="official layout, or .txt beside images")
    add("--format", choices=("png", "webp", "jpg"), default="png", help="of the images; webp is lossless")
    add(
        "--text",
        choices=KINDS,
        help="pages of text instead: a word of a small vocabulary in large letters, or sentences, alone or below an "
        f"emoji. Each set gets a {TEXTS}, which tools/evaluate.py textatlas reads",
    )
    add("--word", action="append", default=[], metavar="WORD", help="write this word alone; may be given again")
    add("--ink", action="append", default=[], metavar="COLOUR", help="of the letters; may be given again")
    add("--letters", type=float, metavar="SHARE", help="size of letters, of the shorter side; default 0.25 or 0.085")
    add("--shift", type=float, metavar="SHARE", help="of the shorter side that a text moves by lot; default 0.02")
    add("--picture-share", type=float, default=0.5, metavar="SHARE", help="of the pages of --text, with an emoji")
    add("--seed", type=int, default=0, help="another seed composes other scenes")
    add("--threads", type=int, default=4, help="scenes drawn at once")
    return parser


def ratios(text):
    """List of aspect ratios, or the text "all"; for argparse."""
    if text == "all":
        return text
    values = [float(part) for part in text.split(",")]
    if not all(RATIOS[0] <= value <= RATIOS[1] for value in values):
        raise argparse.ArgumentTypeError(f"aspect ratios must lie in {RATIOS[0]} ... {RATIOS[1]}")
    return values


def sizes_of(size, wanted):
    """List of (height, width) in pixels: of the training table where it has this base and ratio, else of equal area."""
    from mindsigma.data.aspect_ratio import TRAINING_BASES, training_bins

    if wanted is None:
        return [(size, size)]
    bins = training_bins(size if size in TRAINING_BASES else 1024)
    if wanted == "all":
        wanted = [float(key) for key in bins]
    known = {float(key): pair for key, pair in bins.items()} if size in TRAINING_BASES else {}
    return [known.get(ratio) or _equal_area(size, ratio) for ratio in wanted]


def _equal_area(size, ratio):
    return tuple(max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in (size * ratio**0.5, size / ratio**0.5))


def write(noted, maker, count, held_out, sizes, args):
    """Draw `count` scenes into a NotedFolder, which is complete only when all of them are there."""
    from mindsigma.data import scenes, text_scenes
    from mindsigma.data.prepared import put_lines
    from mindsigma.data.randomness import generator

    official, texts = args.layout == "official", {}
    draw = text_scenes.draw if args.text else scenes.draw

    def make(number):
        scene = maker.scene(number, held_out)
        if args.text:
            texts[number] = scene
        # The first takes the first size, and so on: every size is there in equal numbers.
        pick = generator(args.seed, "size of scene", number // len(sizes)).permutation(len(sizes))[number % len(sizes)]
        height, width = sizes[pick]
        stem = f"{number // 1000:05d}/{number:08d}"
        name, picture = f"{stem}.{args.format}", encoded(draw(scene, height, width), args.format)
        noted.put(f"InternImgs/{name}" if official else name, lambda file: file.write(picture))
        if not official:
            noted.put(f"{stem}.txt", lambda file: put_lines(file, [scene.caption]))
        return {
            "path": name,
            "prompt": scene.caption,
            "sharegpt4v": "",
            "height": height,
            "width": width,
            "ratio": height / width,
        }

    rows = []
    with ThreadPoolExecutor(args.threads) as pool, bar(count, noted.target.name, "scene") as done:
        for start in range(0, count, CHUNK):
            rows += pool.map(make, range(start, min(start + CHUNK, count)))
            done.update(len(rows) - done.n)
    if official:
        lines = [json.dumps(row) + ("," if row is not rows[-1] else "") for row in rows]
        noted.put("InternData/data_info.json", lambda file: put_lines(file, ["[", *lines, "]"]))
    if args.text:
        entries = json.dumps([text_entry(texts[i], row["path"], official) for i, row in enumerate(rows)], indent=1)
        noted.put(TEXTS, lambda file: put_lines(file, entries.split("\n")))
    noted.complete()


def text_entry(page, path, official):
    """What TEXTS says of a page: where its image is, its prompt, what is to be read."""
    return {
        "image_path": path.rpartition("/")[2],
        "original_image_path": f"InternImgs/{path}" if official else path,
        "prompt": page.caption,
        "raw_text": page.text,
    }


def encoded(picture, suffix):
    """The bytes of a picture, the same every time."""
    kinds = {"png": ("PNG", {}), "webp": ("WEBP", {"lossless": True}), "jpg": ("JPEG", {"quality": 95})}
    kind, options = kinds[suffix]
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def require_own(out, folders, task):
    """Raise MindSigmaError unless `out` (Path) is free or holds what a run of these options, perhaps killed, wrote."""
    from mindsigma.data import conversion_note
    from mindsigma.weights.formats.atomic import LEFTOVER, naming

    for folder in folders:
        if folder != out and out.exists():
            with naming(out):
                others = [
                    name for name in os.listdir(out) if name not in (*SETS, DONE) and not LEFTOVER.fullmatch(name)
                ]
            if others:
                raise MindSigmaError(f"{out}: is not an empty folder; choose another")
        conversion_note.require_own(folder, task)


def main():
    """Parse, compose, write; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma.data.conversion_note import NotedFolder
    from mindsigma.data.own_folder import Held
    from mindsigma.data.scenes import SceneMaker, load_things
    from mindsigma.data.text_scenes import SHIFT, PageMaker
    from mindsigma.weights.formats.atomic import write_json

    if args.held_out_count is None:
        args.held_out_count = max(1, args.count // 10) if args.held_out else 0
    for name, least in (("count", 1), ("threads", 1), ("size", SIDE_MULTIPLE), ("held_out_count", 0)):
        if getattr(args, name) < least:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if args.held_out_count and not args.held_out:
        raise MindSigmaError("--held-out-count needs --held-out SHARE")
    if not args.text:
        for name in OF_TEXT:
            if getattr(args, name) not in ([], None):
                raise MindSigmaError(f"--{name} belongs to --text")
    things = load_things(args.only, args.exclude)
    if args.text:
        shift = SHIFT if args.shift is None else args.shift
        maker = PageMaker(
            things,
            args.text,
            args.word,
            args.seed,
            args.held_out,
            args.picture_share,
            inks=args.ink,
            letters=args.letters,
            shift=shift,
        )
    else:
        maker = SceneMaker(things, args.seed, args.held_out)
    sizes = sizes_of(args.size, args.aspect_ratios)
    out = Path(args.out)
    sets = [(out / TRAIN if args.held_out else out, args.count, False)]
    if args.held_out_count:
        sets.append((out / HELD_OUT, args.held_out_count, True))
    left = ("out", "threads", *(() if args.text else ("text", "picture_share", *OF_TEXT)))
    options = {name: value for name, value in sorted(vars(args).items()) if name not in left}
    require_own(out, [folder for folder, _, _ in sets], {"scenes": options})
    for folder, count, held_out in sets:
        with Held(folder):
            write(NotedFolder(folder, {"scenes": options}), maker, count, held_out, sizes, args)
        say(f"{folder}: {count} scenes")
    write_json(out / DONE, options)
    return 0


if __name__ == "__main__":
    command_line.run(main)

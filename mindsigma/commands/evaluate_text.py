"""`evaluate.py textatlas`: draw, read, count."""

from pathlib import Path

from mindsigma.commands.evaluate_drawing import collectives_of, draw_jobs, progress, teller
from mindsigma.commands.generate_options import judged
from mindsigma.data.own_folder import Held
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.evaluation.clip import Clip
from mindsigma.evaluation.drawing import Folder, Job
from mindsigma.evaluation.features import InceptionFeatures, statistics_of
from mindsigma.evaluation.measurements import Measurements
from mindsigma.evaluation.ocr import Reader
from mindsigma.evaluation.results import told, write_results
from mindsigma.evaluation.text_scores import (
    DecodedPictures,
    FolderPictures,
    ReferencePictures,
    by_subset,
    collect,
    measure_cosines,
    measure_texts,
    summary,
)
from mindsigma.evaluation.textatlas import TextAtlas
from mindsigma.evaluation.words import count
from mindsigma.pipeline.components import Components

IMAGES = "images"  # folder of the pictures that are drawn
SHOWN = 3  # rows that are left out, on the terminal


def textatlas(args, command):
    """Returns the exit code."""
    given = [name for name, value in (("--model", args.model), ("--images", args.images)) if value]
    given += ["--reference"] if args.reference else []
    if len(given) != 1:
        what = f"not {' and '.join(given)}" if given else "to say whose pictures are scored"
        raise MindSigmaError(f"give one of --model, --images and --reference, {what}")
    if args.vae and not args.reference:
        raise MindSigmaError("--vae belongs to --reference, whose pictures it encodes and decodes")
    judged(args)
    data = TextAtlas(args.data, args.subset, args.limit)
    output = Path(args.output)
    collectives = collectives_of(args)
    tell = teller(collectives)
    tell(f"{args.data}: {len(data.items)} prompts of {', '.join(data.subsets)}; {len(data.bad)} rows left out")
    tell(*(one_line(f"  {row}", 300) for row in data.bad[:SHOWN]))
    # What is missing for the scores is told before an hour of drawing.
    count("a", "a")
    reader = Reader(args.ocr, args.ocr_setting)
    clip = Clip(args.clip) if args.clip else None
    if clip is not None:
        clip.open_tokenizer()
    inception = InceptionFeatures(args.inception, "textatlas") if args.inception else None
    with Held(output, shared=True):
        pictures = _pictures(args, data, output, collectives)
        items = _there(args, data.items, pictures)
        scores, statistics = _measured(items, data, pictures, (reader, clip, inception), output, collectives)
        if not collectives.ranks.first:
            return 0
        longest = clip.length if clip is not None else None
        overall = summary(scores, _together(statistics), longest)
        result = {
            "name": args.name or _name(args),
            "data": str(args.data),
            "rows_left_out": len(data.bad),
            "pictures_missing": len(data.items) - len(items),
            "drawing": Folder(output / IMAGES).stored if args.model else None,
            "ocr": reader.about,
            "clip": clip.name if clip is not None else None,
            "subsets": by_subset(scores, statistics, longest),
            "overall": overall,
        }
        say(*told(result))
        say(*write_results(output, result, scores, pictures, args.sheet))
    return 0


def _pictures(args, data, output, collectives):
    """The pictures to be scored, drawn before if need be."""
    if args.vae:
        return DecodedPictures(data, Components.of_folder(args.vae, args.dtype).vae)
    if args.reference:
        return ReferencePictures(data)
    if args.images:
        return FolderPictures(args.images, data.items)
    jobs = [Job(f"{item.subset}/{item.name}", item.prompt, (args.seed + item.number,)) for item in data.items]
    draw_jobs(args, output / IMAGES, jobs, collectives, {"seed": args.seed})
    return FolderPictures(output / IMAGES, data.items)


def _there(args, items, pictures):
    """The items that have a picture; all must, unless --partial."""
    missing = {id(item) for item in pictures.missing(items)}
    there = [item for item in items if id(item) not in missing]
    if missing and (not args.partial or not there):
        first = next(item for item in items if id(item) in missing)
        raise MindSigmaError(
            f"{pictures.path}: {len(missing)} of {len(items)} pictures are missing, the first is {first.subset}/"
            f"{one_line(first.name)}; draw them, or give --partial"
        )
    return there


def _measured(items, data, pictures, judges, output, collectives):
    """list of Score, and by subset the RunningStatistics of generated and real pictures."""
    reader, clip, inception = judges
    ranks = collectives.ranks
    mine = items[ranks.rank :: ranks.count]
    measurements = Measurements(output, ranks.rank)
    measurements.read()
    with progress(len(items), "read", collectives) as done:
        measure_texts(mine, pictures, reader, measurements, done)
    if clip is not None:
        with progress(len(items), "CLIP", collectives) as done:
            measure_cosines(mine, pictures, clip, measurements, done=done)
    measurements.close()
    collectives.barrier()
    measurements.read()
    statistics = {}
    if inception is not None:
        for subset in data.subsets:
            part = [item for item in items if item.subset == subset and item.reference is not None]
            if part:
                statistics[subset] = _statistics(part, data, pictures, inception, collectives)
    scores = collect(items, pictures, measurements, reader, clip) if ranks.first else []
    return scores, statistics


def _statistics(items, data, pictures, inception, collectives):
    """(generated, real) RunningStatistics of the same items."""
    result = []
    for read in (pictures.read, data.reference):
        with progress(len(items), "FID", collectives) as done:
            result.append(statistics_of(inception, items, collectives, read, done)[0])
    return tuple(result)


def _together(statistics):
    """Statistics of all subsets as one, or None."""
    if not statistics:
        return None
    from mindsigma.evaluation.fid import RunningStatistics

    together = RunningStatistics(), RunningStatistics()
    for pair in statistics.values():
        for whole, part in zip(together, pair):
            whole.merge(part.count, part.mean, part.scatter)
    return together


def _name(args):
    if args.reference:
        return f"reference pictures through the VAE of {args.vae}" if args.vae else "reference pictures"
    return str(args.model or args.images)

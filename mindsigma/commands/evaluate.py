"""Evaluate pictures: text that can be read on them, FID, KID, CMMD, precision and recall, CLIP score; other benchmarks.

python tools/evaluate.py textatlas --config configs/evaluate/textatlas.yaml --data TextAtlasEval --output runs/textatlas
python tools/evaluate.py fid --images runs/mjhq --reference MJHQ-30K --inception pt_inception-2015-12-05-6726825d.pth
"""

import sys
from pathlib import Path

from mindsigma import command_line
from mindsigma.commands.evaluate_options import COMMANDS, build_parser, check, usage
from mindsigma.config_file import parse_with_config
from mindsigma.errors import MindSigmaError, one_line, say


def main():
    """Dispatch; returns the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        say(*usage().split("\n"))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        command_line.parser("").parse_args(arguments)
    if arguments[0] not in COMMANDS:
        meant = command_line.did_you_mean(arguments[0], COMMANDS)
        raise MindSigmaError(f"unknown command {one_line(arguments[0])}; choose from {', '.join(COMMANDS)}{meant}")
    args = parse_with_config(build_parser(arguments[0]), arguments[1:])
    check(args)
    from mindsigma.commands.evaluate_text import textatlas

    run_command = {"textatlas": textatlas, "draw": draw_benchmark, "clip": clip_score, "statistics": statistics}
    return run_command.get(arguments[0], compare)(args, arguments[0])


def draw_benchmark(args, command):
    """`draw`: a benchmark's prompts into its layout."""
    from mindsigma.commands.evaluate_drawing import collectives_of, draw_jobs, teller
    from mindsigma.evaluation.layouts import jobs_of, published, write_geneval_metadata

    if args.model is None:
        raise MindSigmaError("give --model, which draws")
    jobs = jobs_of(args.benchmark, args.prompts, args.images_per_prompt, args.seed)[: args.limit]
    collectives = collectives_of(args)
    tell = teller(collectives)
    tell(f"{args.benchmark}: {len(jobs)} pictures of {args.prompts}")
    draw_jobs(args, Path(args.output), jobs, collectives, {"benchmark": args.benchmark})
    if args.benchmark == "geneval" and collectives.ranks.first:
        write_geneval_metadata(Path(args.prompts), args.output)
    tell(*published(args.benchmark).split("\n"))
    tell(args.output)
    return 0


def statistics(args, command):
    """`statistics`: what later comparisons need of a folder."""
    import numpy as np

    from mindsigma.commands.evaluate_drawing import collectives_of, progress, teller
    from mindsigma.evaluation.features import InceptionFeatures, features_of, image_files, statistics_of
    from mindsigma.evaluation.fid import RunningStatistics, write_statistics

    target = Path(args.output)
    if target.suffix != ".npz":
        raise MindSigmaError(f"--output {target}: statistics are written as .npz")
    files = image_files(args.images)
    collectives = collectives_of(args)
    extract = InceptionFeatures(require_inception(args), args.resize, args.batch_size)
    kept = None
    with progress(len(files), "features", collectives) as done:
        if args.features:
            kept = features_of(extract, files, collectives, done=done)
            running = RunningStatistics()
            running.add(kept)
            left = len(files) - len(kept)
        else:
            running, left = statistics_of(extract, files, collectives, done=done)
    if collectives.ranks.first:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_statistics(target, running.result(), None if kept is None else np.asarray(kept, np.float32))
    teller(collectives)(f"{running.count} images, {left} left out, {extract.about}", target)
    return 0


def require_inception(args):
    """Path of --inception; raises MindSigmaError with the command that fetches it."""
    from mindsigma.evaluation.inception import SOURCES

    if args.inception is None:
        source = SOURCES["torchvision" if args.resize == "textatlas" else "fid"]
        raise MindSigmaError(f"give --inception FILE, the network's weights; fetch them with: curl -LO {source}")
    return args.inception


def compare(args, command):
    """`fid`, `kid`, `cmmd` and `precision-recall`: two sets of images."""
    from mindsigma.commands.evaluate_drawing import collectives_of, teller
    from mindsigma.evaluation.fid import frechet_distance
    from mindsigma.evaluation.kernel_distances import cmmd, kid
    from mindsigma.evaluation.precision_recall import precision_recall

    collectives = collectives_of(args)
    sides = Sides(args, command, collectives)
    if command == "fid":
        one, other = sides.statistics(args.images), sides.statistics(args.reference)
        result = {"fid": frechet_distance(one, other), "images": one.count, "reference_images": other.count}
    else:
        one, other = sides.features(args.images), sides.features(args.reference)
        result = {"images": len(one), "reference_images": len(other)}
        if command == "kid":
            mean, deviation = kid(one, other, args.subsets, args.subset_size, args.seed)
            result.update(kid=mean, deviation=deviation, subsets=args.subsets)
        elif command == "cmmd":
            result.update(cmmd=cmmd(one, other))
        else:
            precision, recall = precision_recall(one, other, args.neighbours)
            result.update(precision=precision, recall=recall, neighbours=args.neighbours)
    result["features"] = sides.about
    result["left_out"] = sides.left_out
    tell_result(args, result, teller(collectives), collectives)
    return 0


class Sides:
    """The two sides of a comparison: folders, whose features are made, or .npz files, which hold what was made."""

    def __init__(self, args, command, collectives):
        self.args, self.command, self.collectives = args, command, collectives
        self.left_out, self.about, self._extract = 0, "as stored", None

    def _extractor(self):
        from mindsigma.evaluation.clip import Clip
        from mindsigma.evaluation.features import ClipFeatures, InceptionFeatures

        if self._extract is None:
            args = self.args
            if self.command == "cmmd":
                self._extract = ClipFeatures(Clip(args.clip), args.batch_size)
            else:
                self._extract = InceptionFeatures(require_inception(args), args.resize, args.batch_size)
            self.about = self._extract.about
        return self._extract

    def _made(self, path, make):
        from mindsigma.commands.evaluate_drawing import progress
        from mindsigma.evaluation.features import image_files

        files = image_files(path)
        extract = self._extractor()
        with progress(len(files), f"features of {Path(path).name}", self.collectives) as done:
            return files, make(extract, files, self.collectives, done=done)

    def statistics(self, path):
        """Statistics of a folder or of an .npz."""
        from mindsigma.evaluation.features import statistics_of
        from mindsigma.evaluation.fid import read_statistics

        if Path(path).suffix == ".npz":
            return read_statistics(Path(path))
        _, (running, left) = self._made(path, statistics_of)
        self.left_out += left
        return running.result()

    def features(self, path):
        """Features (n, d) of a folder or of an .npz."""
        from mindsigma.evaluation.features import features_of
        from mindsigma.evaluation.fid import read_features

        if Path(path).suffix == ".npz":
            return read_features(Path(path))
        files, found = self._made(path, features_of)
        self.left_out += len(files) - len(found)
        return found


def clip_score(args, command):
    """`clip`: pictures against the prompts that they hold, or that lie beside them."""
    import numpy as np

    from mindsigma.commands.evaluate_drawing import collectives_of, progress, teller
    from mindsigma.evaluation.clip import CUTS, Clip, cosines, scores
    from mindsigma.evaluation.features import ClipFeatures, batched, image_files
    from mindsigma.evaluation.prompts_of_pictures import prompt_of

    files = image_files(args.images)
    prompts = [prompt_of(file) for file in files]
    paired = [(file, prompt) for file, prompt in zip(files, prompts) if prompt]
    if not paired:
        raise MindSigmaError(f"{args.images}: no picture there holds a prompt, or has one beside it as NAME.txt")
    collectives = collectives_of(args)
    clip = Clip(args.clip)
    clip.open_tokenizer()
    mine = paired[collectives.ranks.rank :: collectives.ranks.count]
    sums = np.zeros((len(CUTS), 2))  # of the cosines, and of their positive parts
    count = too_long = 0
    with progress(len(paired), "pictures", collectives) as done:
        for places, features in batched(ClipFeatures(clip, args.batch_size), [file for file, _ in mine], done=done):
            texts = [mine[i][1] for i in places]
            for row, cut in enumerate(CUTS):
                values = cosines(features, clip.text_features(texts, cut))
                sums[row] += values.sum(), np.maximum(values, 0).sum()
            count += len(places)
            too_long += sum(clip.count_tokens(text) > clip.length for text in texts)
    *flat, count, too_long = collectives.total([*sums.ravel(), count, too_long])
    if not count:
        raise MindSigmaError(f"{args.images}: no picture could be read")
    result = {"clip": clip.name, "pictures": int(count), "prompts_too_long": int(too_long)}
    for row, cut in enumerate(CUTS):
        result[cut] = scores(flat[2 * row] / count, flat[2 * row + 1] / count)
    result["left_out"] = len(files) - int(count)
    tell_result(args, result, teller(collectives), collectives)
    return 0


def tell_result(args, result, tell, collectives):
    """Print a result; write it where --json asks."""
    from mindsigma.weights.formats.atomic import write_json

    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {number:.6g}" for key, number in value.items())
        shown = f"{value:.6g}" if isinstance(value, float) else value
        tell(f"{name.replace('_', ' ')}: {shown}")
    if args.json and collectives.ranks.first:
        write_json(Path(args.json), result)


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

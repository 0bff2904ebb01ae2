"""Check a data set of captioned images and, if a target is given, write it in another layout, or an index of it.

python tools/prepare_data.py photos/ photos-official/ --to official --check
python tools/prepare_data.py shards/ shards-index/ --index
"""

import argparse
import time
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.progress import bar

AT_ONCE = 1 << 18  # sizes compared at once
SHOWN = 3  # bad rows shown on the terminal


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Check a data set of captioned images, count its buckets, convert it to another layout, or index it.",
        "python tools/prepare_data.py photos data --to official --check",
    )
    add = parser.add_argument
    add(
        "source",
        help="official layout, folder of captioned images, CSV/TSV/JSON/JSONL table, WebDataset shard or "
        "folder of shards, index; for --benchmark, --check and --to shards also a folder of features",
    )
    add("target", nargs="?", help="folder to write; without it the source is only checked")
    add(
        "--to",
        choices=("official", "jsonl", "webdataset", "shards"),
        default="official",
        help="layout of the target; shards: of features, a file a record becomes a member of a shard",
    )
    add(
        "--index",
        action="store_true",
        help="write an index of the source instead, which opens in milliseconds however many images there are; start "
        "the command several times to share the work",
    )
    add("--append", action="store_true", help="with --index: add what is new to an index, as another version of it")
    add("--strict", action="store_true", help="stop with an error if any row is bad")
    add("--check", action="store_true", help="decode every image, correct wrong sizes; of features verify checksums")
    add("--max-ratio", type=float, default=4.5, help="leave out images whose sides differ by more than this factor")
    add("--image-root", metavar="FOLDER", help="what the image paths of a table are relative to, if not its folder")
    add("--bad-rows", metavar="FILE", help="where to list the bad rows; default TARGET.bad_rows.txt")
    add("--shard-records", type=int, default=1000, help="samples of a WebDataset shard, records of one of features")
    add("--resolution", type=int, default=1024, help="base whose buckets are counted")
    add("--multi-scale", action=argparse.BooleanOptionalAction, default=True, help="buckets, or one square size")
    add("--batch-size", type=int, default=1, help="records of a step over all ranks, for the count of repeats")
    add("--incomplete", choices=("repeat", "drop"), default="repeat", help="last batch of a bucket")
    add("--threads", type=int, default=8, help="images read at once")
    add("--benchmark", type=int, metavar="STEPS", help="load this many batches as training would, print the speed")
    return parser


def main():
    """Parse, read, report, convert; returns the exit code."""
    args = build_parser().parse_args()
    for name in ("threads", "batch_size", "shard_records"):
        if getattr(args, name) < 1:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    check(args)
    if args.index and not index(args):
        return 0
    from mindsigma.data import BucketSampler, FeatureSet, Resolution, open_data
    from mindsigma.data.check import check_images
    from mindsigma.data.prepared import convert

    if args.index:
        source = open_data(args.target)
    else:
        source = open_data(args.source, max_ratio=args.max_ratio, image_root=args.image_root, threads=args.threads)
    if isinstance(source, FeatureSet):
        if features(source, args):
            return 0
        resolution = source.resolution
    else:
        resolution = Resolution(args.resolution, args.multi_scale)
        if args.check:
            with bar(len(source), "decode", "image") as done:
                source, corrected = check_images(source, args.threads, args.max_ratio, done.update)
            say(f"sizes corrected: {corrected}")
        report(source, args)
    sampler = BucketSampler(source, args.batch_size, resolution, incomplete=args.incomplete)
    chosen = "" if isinstance(source, FeatureSet) else " (--resolution, --multi-scale and --batch-size count others)"
    say("", f"buckets of {resolution.base} px, batches of {args.batch_size}{chosen}:")
    say(*str(sampler.summary()).split("\n"))
    say(f"smaller than their bucket, to be enlarged: {enlarged(source.sizes, resolution)}")
    if not isinstance(source, FeatureSet) and args.strict:
        source.require_no_bad()
    if args.target and not args.index:
        with bar(len(source), "write", "image") as done:
            convert(source, args.target, args.to, args.threads, args.shard_records, done.update)
        say(args.target)
    if args.benchmark is not None:
        benchmark(source, sampler, args)
    return 0


def check(args):
    """Raise for options that cannot be meant."""
    from mindsigma.data import is_mixture
    from mindsigma.data.features import is_feature_folder

    if args.to == "shards" and not (args.target and is_feature_folder(args.source)):
        raise MindSigmaError("--to shards is for a folder of features, and needs a target")
    if args.target and is_mixture(args.source):
        raise MindSigmaError(f"{args.source}: a mixture can be read, not converted or indexed; do that with its sets")
    if args.append and not args.index:
        raise MindSigmaError("--append is for --index: it adds records to an index")
    if args.index and (args.target is None or args.check):
        raise MindSigmaError("--index needs a target, the folder of the index; --check is for images, without --index")


def index(args):
    """Build the index, or this process's part of it; returns whether it is complete."""
    from mindsigma.data.index_building import Building

    building = Building(args.source, args.target, args.append, args.max_ratio, args.image_root, args.threads)
    with bar(None, "index", "row") as done:
        built = building.run(done.update)
    if not built.version:
        say(f"pieces read here: {built.made}; other processes still read theirs, and the last completes {args.target}")
        return False
    if built.known:
        say(f"records that the index held before: {built.known}")
    say(f"{args.target}: version {built.version}, pieces read here: {built.made}")
    return True


def features(source, args):
    """Verify or translate a folder of features, if that is asked for; returns whether it was."""
    translated = args.target is not None and args.to == "shards"
    if args.index or (args.target and not translated) or not (translated or args.check or args.benchmark is not None):
        raise MindSigmaError(f"{args.source}: a folder of features is read with --benchmark, --check or --to shards")
    if args.check:
        verify(source)
    if translated:
        from mindsigma.data.feature_shards import ShardedFeatureSet, Translation

        if isinstance(source, ShardedFeatureSet):
            raise MindSigmaError(f"{args.source}: is in shards already")
        translation = Translation(source, args.target, args.shard_records)
        with bar(len(translation.missing), "translate", "record") as done:
            absent = translation.run(done.update)
        say(f"{absent} shards of other processes are not there yet" if absent else f"complete: {args.target}")
    return args.benchmark is None


def verify(source):
    """Read all features; raise for the first that is damaged, after listing some."""
    faults = []
    with bar(len(source), "verify", "record") as done:
        for index in range(len(source)):
            try:
                source.require_sound(index)
            except MindSigmaError as error:
                faults.append(error)
                say(*[f"  {error}"] * (len(faults) <= SHOWN))
            done.update(1)
    if faults:
        raise MindSigmaError(f"{source.path}: {len(faults)} of {len(source)} records are damaged, e.g. {faults[0]}")
    say(f"verified: {len(source)} records")


def report(records, args):
    """Print what was read and what is bad, and write the bad rows to a file."""
    from mindsigma.data.prepared import write_bad_rows

    say(f"layout: {records.layout}")
    say(f"rows {len(records) + len(records.bad)}, kept {len(records)}, bad {len(records.bad)}")
    for reason, count in records.bad_by_reason().most_common():
        say(f"  {reason}: {count}")
        for row in [row for row in records.bad if row.reason == reason][:SHOWN]:
            say(one_line(f"    {row.where}{': ' + row.detail if row.detail else ''}", 300))
    say("captions: {} short, {} long, {} both".format(*records.count_captions()))
    if args.bad_rows is None and (args.target is None or not records.bad):
        return
    file = Path(args.bad_rows) if args.bad_rows else Path(f"{args.target.rstrip('/')}.bad_rows.txt")
    write_bad_rows(file, records.bad)
    say(f"bad rows: {file}")


def enlarged(sizes, resolution):
    """How many images of these sizes (n, 2) have fewer pixels along a side than the bucket they are cut to."""
    import numpy as np

    buckets, count = np.array([bucket[1:] for bucket in resolution.buckets()]), 0
    for start in range(0, len(sizes), AT_ONCE):
        some = sizes[start : start + AT_ONCE]
        count += int((some < buckets[resolution.assign(some)]).any(1).sum())
    return count


def benchmark(source, sampler, args):
    """Print how many samples a second the loader alone delivers."""
    from mindsigma.data import Loader

    if args.benchmark < 1:
        raise MindSigmaError(f"--benchmark must be at least 1 step, not {args.benchmark}")
    length = {"max_length": source.max_length} if hasattr(source, "max_length") else {}
    loader = Loader(source, sampler, threads=args.threads, **length)
    start, count = time.perf_counter(), 0
    for batch in loader.batches(0, args.benchmark):
        count += len(batch.draws)
    seconds = time.perf_counter() - start
    say(f"loader: {count} samples in {seconds:.2f} s, {count / seconds:.1f} a second ({args.threads} threads)")


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

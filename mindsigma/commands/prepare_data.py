"""Check a data set of captioned images and, if a target is given, write it in another layout.

python tools/prepare_data.py photos/ photos-official/ --to official --check
"""

import argparse
import time
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, one_line, say
from mindsigma.progress import bar

SHOWN = 3  # bad rows shown on the terminal


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Check a data set of captioned images, count its buckets, convert it to another layout.",
        "python tools/prepare_data.py photos data --to official --check",
    )
    add = parser.add_argument
    add(
        "source",
        help="official layout, folder of captioned images, CSV/TSV/JSON/JSONL table, WebDataset shard or "
        "folder of shards; for --benchmark also a folder of features",
    )
    add("target", nargs="?", help="folder to write; without it the source is only checked")
    add("--to", choices=("official", "jsonl", "webdataset"), default="official", help="layout of the target")
    add("--strict", action="store_true", help="stop with an error if any row is bad")
    add("--check", action="store_true", help="decode every image, correct wrong sizes")
    add("--max-ratio", type=float, default=4.5, help="leave out images whose sides differ by more than this factor")
    add("--image-root", metavar="FOLDER", help="what the image paths of a table are relative to, if not its folder")
    add("--bad-rows", metavar="FILE", help="where to list the bad rows; default TARGET.bad_rows.txt")
    add("--shard-records", type=int, default=1000, help="samples of a WebDataset shard")
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
    from mindsigma.data import BucketSampler, FeatureSet, Resolution, open_data
    from mindsigma.data.check import check_images
    from mindsigma.data.prepared import convert

    source = open_data(args.source, max_ratio=args.max_ratio, image_root=args.image_root, threads=args.threads)
    if isinstance(source, FeatureSet):
        if args.target or args.check or args.benchmark is None:
            raise MindSigmaError(f"{args.source}: a folder of features can only be read with --benchmark")
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
    if args.target:
        with bar(len(source), "write", "image") as done:
            convert(source, args.target, args.to, args.threads, args.shard_records, done.update)
        say(args.target)
    if args.benchmark is not None:
        benchmark(source, sampler, args)
    return 0


def report(records, args):
    """Print what was read and what is bad, and write the bad rows to a file."""
    from mindsigma.data.prepared import write_bad_rows

    say(f"layout: {records.layout}")
    say(f"rows {len(records) + len(records.bad)}, kept {len(records)}, bad {len(records.bad)}")
    for reason, count in records.bad_by_reason().most_common():
        say(f"  {reason}: {count}")
        for row in [row for row in records.bad if row.reason == reason][:SHOWN]:
            say(one_line(f"    {row.where}{': ' + row.detail if row.detail else ''}", 300))
    with_long = sum(bool(record.long_prompt) for record in records)
    with_both = sum(bool(record.long_prompt and record.prompt) for record in records)
    say(f"captions: {len(records) - with_long + with_both} short, {with_long} long, {with_both} both")
    if args.bad_rows is None and (args.target is None or not records.bad):
        return
    file = Path(args.bad_rows) if args.bad_rows else Path(f"{args.target.rstrip('/')}.bad_rows.txt")
    write_bad_rows(file, records.bad)
    say(f"bad rows: {file}")


def enlarged(sizes, resolution):
    """How many images of these sizes (n, 2) have fewer pixels along a side than the bucket they are cut to."""
    import numpy as np

    buckets = np.array([bucket[1:] for bucket in resolution.buckets()])
    return int((sizes < buckets[resolution.assign(sizes)]).any(1).sum())


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

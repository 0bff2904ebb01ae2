"""Store the VAE's moments and T5's states of a data set, so that training runs neither network.

python tools/extract_features.py scenes/ scenes-features/ --model sigma-mini --resolution 256
"""

import argparse
import time

from mindsigma import command_line
from mindsigma.commands.ranks import add_ranks, is_scheduler, rank_of
from mindsigma.errors import MindSigmaError, say
from mindsigma.progress import bar, duration
from mindsigma.training.condition_options import add_condition


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Extract features for training. Run again, it continues; run by several processes that see one "
        "folder, each with its rank, it shares the work, and the one that ends last writes the index.",
        "python tools/extract_features.py data features --model sigma-mini --max-length 40",
    )
    add = parser.add_argument
    add("data", help="any data set that tools/prepare_data.py reads")
    add("features", help="folder to write")
    add("--model", required=True, help="bundled or released name, hub id, or folder with VAE, T5 and tokenizer")
    add("--resolution", type=int, default=256, help="pixels: side of the square, or base of the buckets")
    add("--multi-scale", action=argparse.BooleanOptionalAction, default=False, help="cut to the nearest bucket")
    add("--table", choices=("training", "inference", "test"), default="training", help="whose table of buckets")
    add("--max-length", type=int, default=300, help="tokens at which captions are cut")
    add_condition(add)
    add("--max-ratio", type=float, default=4.5, help="leave out images whose sides differ by more than this factor")
    add("--image-root", metavar="FOLDER", help="what the image paths of a table are relative to, if not its folder")
    add("--strict", action="store_true", help="stop with an error if any row or image of the data is bad")
    add("--batch-size", type=int, default=4, help="images encoded at once")
    add("--states-dtype", choices=("fp16", "fp32"), default="fp16", help="in which T5's states are stored")
    add("--moments-dtype", choices=("fp16", "fp32"), default="fp32", help="in which the VAE's moments are stored")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="of the networks; default fp32 on the CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    layers = "T5 in memory, or read layer by layer for every batch: the same bits, slower, a larger --batch-size helps"
    add("--text-encoder-memory", choices=("whole", "layers"), default="whole", help=layers)
    add(
        "--shard-records",
        type=int,
        default=0,
        metavar="N",
        help="store N records in a shard instead of one in a file; 1000 is a good number where there are millions",
    )
    add("--threads", type=int, default=4, help="images decoded at once")
    add_ranks(add)
    return parser


def main():
    """Parse, extract, write the index; returns the exit code."""
    args = build_parser().parse_args()
    if is_scheduler():
        return 0
    rank, ranks = rank_of(args)
    from mindsigma.data import FeatureSet, Resolution, is_mixture, open_data
    from mindsigma.data.conditions import Condition
    from mindsigma.data.features import LEFT_OUT
    from mindsigma.runtime import set_device
    from mindsigma.training.extraction import Encoders, Extraction

    condition = Condition.of(args.condition, args.condition_folder)
    resolution = Resolution(args.resolution, args.multi_scale, args.table)
    options = {name: getattr(args, name) for name in ("max_ratio", "strict", "image_root", "threads")}
    records = open_data(args.data, **options)
    if is_mixture(args.data):
        raise MindSigmaError(f"{args.data}: is a mixture; extract each of its sets, and mix their features")
    if isinstance(records, FeatureSet):
        raise MindSigmaError(f"{args.data}: holds features already; give the images that they were made of")
    say(f"{args.data}: {len(records)} records, {len(records.bad)} rows left out ({records.layout} layout)")
    set_device(args.device)
    encoders = Encoders(args.model, args.dtype, args.text_encoder_memory)
    say(*encoders.memory())
    extraction = Extraction(
        records,
        args.features,
        encoders,
        resolution,
        args.max_length,
        args.batch_size,
        args.states_dtype,
        args.moments_dtype,
        args.threads,
        args.strict,
        args.shard_records,
        condition,
    )
    start = time.perf_counter()
    count = (extract_shards if args.shard_records else extract_files)(extraction, rank, ranks)
    seconds = time.perf_counter() - start
    if count:
        say(f"extracted {count} records in {duration(seconds)}, {count / seconds:.2f} a second")
    if extraction.cut:
        say(f"captions cut at {args.max_length} tokens: {extraction.cut}")
    absent = extraction.finish()
    if absent:
        what = "shards" if args.shard_records else "records"
        say(f"{absent} {what} of other ranks are not there yet; the rank that ends last completes {args.features}")
    else:
        if extraction.left_out:
            first = extraction.left_out[0]
            say(f"left out, as they cannot be read: {len(extraction.left_out)} images, all in {LEFT_OUT} there, e.g.")
            say(f"  {first.where}: {first.detail}")
        say(f"complete: {args.features}")
    return 0


def extract_files(extraction, rank, ranks):
    """Extract what a rank's share lacks, a file a record; returns how many records that were."""
    missing = extraction.missing(rank, ranks)
    share = len(range(rank, len(extraction.records), ranks))
    say(f"rank {rank} of {ranks}: {share} records, {share - len(missing)} are there already")
    with bar(len(missing), "extract", "record") as done:
        extraction.run(missing, done.update)
    return len(missing)


def extract_shards(extraction, rank, ranks):
    """Extract shards until none is left that nobody else writes; returns how many records that were."""
    missing = len(extraction.folder.missing)
    say(f"rank {rank} of {ranks}: {missing} records to extract, in {extraction.folder.count} shards over all ranks")
    with bar(missing, "extract", "record") as done:
        return extraction.run_shards(rank, ranks, done.update)


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

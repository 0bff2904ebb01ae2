"""Make pairs of noise and the latents that a teacher draws of it, for tools/distill.py --method dmd.

python tools/make_pairs.py FEATURES pairs/ --model sigma-mini
"""

import time

from mindsigma import command_line
from mindsigma.commands.generate import open_pipeline
from mindsigma.commands.ranks import add_ranks, is_scheduler, rank_of
from mindsigma.errors import MindSigmaError, say


def build_parser():
    """The options of this tool."""
    from mindsigma.sampling import SAMPLERS

    parser = command_line.parser(
        "Draw the captions of a folder of features. Run again, it continues; several processes share the work.",
        "python tools/make_pairs.py features pairs --model sigma-mini",
    )
    add = parser.add_argument
    add("features", help="folder of tools/extract_features.py")
    add("pairs", help="folder to write")
    add("--model", required=True, help="the teacher: released name, hub id, folder or weight file")
    add("--components", help="folder with VAE, T5 and tokenizer, if not --model's")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="adapters of the teacher")
    add("--sampler", choices=tuple(SAMPLERS), default="dpm", help="one that draws no noise of its own")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--guidance-scale", type=float, default=4.5)
    add("--seed", type=int, default=0, help="of the noise")
    add("--batch-size", type=int, default=4, help="images drawn at once")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on the CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    add_ranks(add)
    return parser


def main():
    """Parse, draw, write the index; returns the exit code."""
    args = build_parser().parse_args()
    if is_scheduler():
        return 0
    for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    from tqdm import tqdm

    from mindsigma.data import open_features
    from mindsigma.sampling.options import SamplingOptions
    from mindsigma.training.pairs import Pairs

    rank, ranks = rank_of(args)
    source = open_features(args.features)
    pipeline = open_pipeline(args)
    options = SamplingOptions(args.sampler, args.steps, args.guidance_scale)
    pairs = Pairs(source, args.pairs, pipeline, options, args.seed)
    missing = pairs.missing(rank, ranks)
    say(f"rank {rank} of {ranks}: {len(missing)} of {len(source)} pairs to draw")
    start = time.perf_counter()
    with tqdm(total=len(missing), desc="pairs", unit="pair") as bar:
        pairs.run(missing, args.batch_size, bar.update)
    if missing:
        seconds = time.perf_counter() - start
        say(f"drew {len(missing)} pairs in {seconds:.1f} s, {len(missing) / seconds:.2f} a second")
    absent = pairs.finish()
    say(f"{absent} pairs of other ranks are not there yet" if absent else f"complete: {args.pairs}")
    return 0


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

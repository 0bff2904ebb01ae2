"""What the subcommands of tools/evaluate.py share: processes, progress, a pipeline, drawing what is missing."""

import sys
from contextlib import contextmanager

from mindsigma.commands.generate import notes_on, open_pipeline
from mindsigma.commands.generate_options import judged
from mindsigma.distributed import Collectives, join_ranks
from mindsigma.errors import say
from mindsigma.runtime import DTYPES, resolve_dtype, set_device


def collectives_of(args):
    """Collectives of the processes that msrun started, on the device of --device."""
    set_device(args.device)
    return Collectives(join_ranks())


def teller(collectives):
    """`say` on the first process, nothing on the others."""
    return say if collectives.ranks.first else lambda *lines: None


@contextmanager
def progress(count, name, collectives):
    """A bar over `count` items of all processes, fed with the number done by the first; yields its function."""
    from tqdm import tqdm

    mine = len(range(collectives.ranks.rank, count, collectives.ranks.count))
    with tqdm(total=mine, desc=name, disable=not collectives.ranks.first or None, file=sys.stderr) as bar:
        yield bar.update


def settings_of(args, sampling, more):
    """dict of all that pictures follow from beside prompt and seed."""
    dtype = resolve_dtype(args.dtype)
    return {
        **more,
        "model": args.model,
        "components": args.components,
        "lora": list(args.lora),
        "negative_prompt": args.negative_prompt,
        "convention": args.convention,
        "dtype": next(name for name, value in DTYPES.items() if value == dtype),
        **{name: list(v) if isinstance(v, tuple) else v for name, v in sampling.as_arguments().items()},
    }


def draw_jobs(args, folder, jobs, collectives, more):
    """Draw what is missing of a list of Job into a folder, shared by the processes."""
    from mindsigma.evaluation.drawing import Folder, draw

    sampling, tell = judged(args), teller(collectives)
    pictures = Folder(folder, settings_of(args, sampling, more))
    missing = pictures.missing(jobs)
    collectives.barrier()  # before anyone draws, so that all share what is missing in one way
    tell(f"to draw: {len(missing)} of {len(jobs)}")
    if not missing:
        return
    pipeline = open_pipeline(args)
    pipeline.image_size(sampling.height, sampling.width, sampling.use_resolution_binning)
    tell(*notes_on(pipeline))
    if collectives.ranks.first:
        pictures.write_settings()
    with progress(len(missing), "draw", collectives) as done:
        mine = missing[collectives.ranks.rank :: collectives.ranks.count]
        cut = draw(pictures, mine, pipeline, sampling, args, done)
    (cut,) = collectives.total([cut])  # also waits for the others' pictures
    if cut:
        tell(f"batches with prompts cut at {sampling.max_sequence_length} tokens: {int(cut)}")

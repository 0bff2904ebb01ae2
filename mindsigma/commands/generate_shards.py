"""tools/generate.py --shard-prompts: the pictures of any number of prompts, as shards that data sets are read from.

drawing.json        how they were drawn
00000.tar           pictures (.png) and captions (.json) of the first N prompts; a WebDataset shard
00001.tar.growing   one that is being drawn
"""

import io
import json
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

from mindsigma.commands.generate import Album, Sizes, draw, encode_all, introduce, open_adapted, open_pipeline
from mindsigma.commands.generate_options import NOT_OF_PICTURES, check
from mindsigma.commands.prompt_lines import PromptLines
from mindsigma.commands.ranks import is_scheduler, rank_of
from mindsigma.commands.rows import batches_of, columns_of, jobs_of, row_of
from mindsigma.data.growing_tar import GrowingTar
from mindsigma.data.shares import claim, from_share
from mindsigma.errors import MindSigmaError, say
from mindsigma.foreign import load_json
from mindsigma.heartbeat import RUNNING, beat
from mindsigma.progress import bar

CLAIMS = ".building"  # folder of the locks of shards that are drawn
LARGEST_TEXT = 1 << 20  # bytes of a caption


def draw_shards(args, parser):
    """Draw the shards that nobody has drawn and nobody else draws; returns the exit code."""
    check(args, 2)
    if is_scheduler():
        return 0
    from mindsigma.pipeline.phases import PhaseClock

    beat(RUNNING, 0, "starting")
    rank, ranks = rank_of(args)
    prompts = PromptLines(args.prompts_file, columns_of(parser))
    out, count = Path(args.out), -(-len(prompts) // args.shard_prompts)
    say(f"rank {rank} of {ranks}: {len(prompts)} prompts in {count} shards over all ranks")
    clock, batches = PhaseClock(), 0
    with clock.phase("load"):
        pipeline = open_pipeline(args)
    introduce(pipeline, args, say)
    note_settings(out, args, pipeline, prompts)
    with bar(len(prompts), "draw", "prompt") as done:

        def drawn(count):
            nonlocal batches
            batches += 1
            beat(RUNNING, batches, f"drawing {number:05d}.tar")
            done.update(count)

        for number in from_share(count, rank, ranks):
            if shard_path(out, number).is_file():
                continue
            with claim(out / CLAIMS, f"{number:05d}") as mine:
                if mine and not shard_path(out, number).is_file():
                    first = number * args.shard_prompts
                    lines = prompts.rows(first, first + args.shard_prompts)
                    pictures = draw_shard(pipeline, args, shard_path(out, number), lines, first, clock, drawn)
                    say(f"{shard_path(out, number)}: {pictures} pictures")
    absent = sum(not shard_path(out, number).is_file() for number in range(count))
    if absent:
        say(f"{absent} shards of other processes are not there yet")
    else:
        shutil.rmtree(out / CLAIMS, ignore_errors=True)
        say(f"complete: {out}")
    if args.verbose:
        say(*clock.table().split("\n"))
    return 0


def shard_path(out, number):
    """Path of a shard."""
    return out / f"{number:05d}.tar"


def note_settings(out, args, pipeline, prompts):
    """Say in the folder how its pictures are drawn. Raises MindSigmaError if those there are drawn otherwise."""
    from mindsigma.evaluation.drawing import Folder

    options = {name: value for name, value in vars(args).items() if name not in NOT_OF_PICTURES and name != "prompt"}
    whole = {"prompts": prompts.digest, "shard_prompts": args.shard_prompts, "num_images": args.num_images}
    Folder(out, {**whole, **options, "dtype": pipeline.dtype_name}, "--out").write_settings()


def draw_shard(pipeline, args, path, lines, first, clock, progress):
    """Draw the prompts of one shard; returns the number of its pictures.

    Args:
        path: Path of the shard. lines: list of (where, dict) of its prompts; first: the number of the first.
        clock: PhaseClock. progress: called with the number of prompts that were drawn.
    """
    rows = [row_of(args, *line) for line in lines]
    check(args, 2, rows)
    for row in rows:
        row.judge()
    adapted, sizes = open_adapted(pipeline, rows, args), Sizes(pipeline, rows, args, lambda *lines: None)
    jobs = [replace(job, size=sizes.asked(job.row)) for job in jobs_of(rows)]
    names = [f"{first + i:09d}-{image:03d}" for i, row in enumerate(rows) for image in range(row.args.num_images)]
    with GrowingTar(path) as tar:
        album = ShardAlbum(args, pipeline, rows, tar, dict(zip(map(id, jobs), names)))
        begin = album.keep(jobs, [start for start, _ in batches_of(jobs, args.batch_size)])
        left = jobs[begin:]
        captions = encode_all(pipeline, list({id(job.row): job.row for job in left}.values())) if left else {}
        for start, stop in batches_of(left, args.batch_size):
            batch = left[start:stop]
            images = draw(pipeline, adapted, captions, batch, clock, progress=False)
            for place, (job, image) in enumerate(zip(batch, images), begin + start + 1):
                album.add(job, image, place, sizes.drawn(job.row))
            tar.sync()
            progress(sum(job.image == 0 for job in batch))
        tar.complete()
    return len(jobs)


class ShardAlbum(Album):
    """Writes pictures and captions into a shard.

    Args:
        tar: GrowingTar. names: dict from the id of a Job to the name of its members.
    """

    def __init__(self, args, pipeline, rows, tar, names):
        super().__init__(args, pipeline, rows, lambda *lines: None)
        self._tar, self._names = tar, names

    def keep(self, jobs, starts):
        """Keep what an earlier process drew of the jobs, as far as batches are whole; how many pictures that are.

        `starts`: list of the places at which batches begin.
        """
        members = iter(self._tar.members)
        count = sum(1 for _ in self._whole(jobs, members))
        count = count if count == len(jobs) else max(start for start in starts if start <= count)
        self._tar.keep(2 * count)
        return count

    def _whole(self, jobs, members):
        """Yield the jobs whose members are there, whole, from the first on."""
        for job, (png, offset, length), (text, place, size) in zip(jobs, members, members):
            name = self._names[id(job)]
            if (png, text) != (f"{name}.png", f"{name}.json") or size > LARGEST_TEXT:
                return
            try:
                told = load_json(self._tar.path, self._tar.read(place, size), "a caption")
            except MindSigmaError:
                return
            data = self._tar.read(offset, length)
            if (told.get("prompt"), told.get("seed"), told.get("crc32")) != (
                job.row.prompt.text,
                job.seed,
                zlib.crc32(data),
            ):
                return
            yield job

    def _put(self, job, image, name, told):
        from mindsigma.pipeline.pictures import png_texts

        file = io.BytesIO()
        image.save(file, "PNG", pnginfo=png_texts(told))
        data, name = file.getvalue(), self._names[id(job)]
        caption = {
            "prompt": job.row.prompt.text,
            "height": image.size[1],
            "width": image.size[0],
            "seed": job.seed,
            "crc32": zlib.crc32(data),
        }
        self._tar.add(f"{name}.png", data)
        self._tar.add(f"{name}.json", json.dumps(caption).encode())

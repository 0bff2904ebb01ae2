"""Many prompts to many files: what is missing is drawn, by any number of processes, and a stopped run goes on."""

import json
import warnings
from pathlib import Path
from typing import NamedTuple, Tuple

from PIL import Image

from mindsigma import __version__
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, open_regular, read_bytes
from mindsigma.pipeline.pictures import image_grid, save_png
from mindsigma.weights.formats.atomic import write_json

SETTINGS = "drawing.json"  # how the pictures of a folder were drawn
LARGEST_NOTE = 1 << 20  # bytes


class Job(NamedTuple):
    """A file to be drawn: its name below the folder, the prompt, the seeds of its images; several become a grid."""

    name: str
    prompt: str
    seeds: Tuple[int, ...]


class Folder:
    """Pictures of one way of drawing.

    Args:
        path: path of the folder.
        settings: dict of all that the pictures follow from beside prompt and seed; None for a folder that is only read.
        flag: the option that names the folder, for messages.

    Raises:
        MindSigmaError: the folder holds pictures of other settings.
    """

    def __init__(self, path, settings=None, flag="--output"):
        self.path, self.settings = Path(path), settings
        note = self.path / SETTINGS
        self.stored = load_json(note, read_bytes(note, LARGEST_NOTE), "the note of a drawing") if note.exists() else {}
        if settings is not None and self.stored:
            now = json.loads(json.dumps(settings))
            for name in sorted(set(self.stored) | set(now)):
                if self.stored.get(name) != now.get(name):
                    then, wanted = (one_line(repr(table.get(name)), 60) for table in (self.stored, now))
                    raise MindSigmaError(
                        f"{self.path}: holds pictures drawn with {one_line(name)} {then}, not {wanted}; use that, or "
                        f"another {flag}"
                    )

    def write_settings(self):
        """Say in the folder how its pictures are drawn; before the first of them."""
        if self.settings is not None and not self.stored:
            write_json(self.path / SETTINGS, self.settings)

    def missing(self, jobs):
        """Those of a list of Job whose picture is not there, or is one of another prompt or seed."""
        return [job for job in jobs if _told(self.path / job.name) != (job.prompt, _seeds_text(job))]

    def write(self, job, images, about):
        """Write the picture of a Job from its images; `about`: dict for its metadata."""
        image = images[0] if len(images) == 1 else image_grid(images)
        entries = {**about, "prompt": job.prompt, "seed": _seeds_text(job), "Software": f"mindsigma {__version__}"}
        save_png(image, self.path / job.name, entries)


def _seeds_text(job):
    return " ".join(map(str, job.seeds))


def _told(path):
    """(prompt, seed) that a PNG of `save_png` tells, or None; pixels are not read."""
    entries = texts_of_picture(path)
    return (entries["prompt"], entries["seed"]) if {"prompt", "seed"} <= entries.keys() else None


def texts_of_picture(path):
    """dict of the texts before the pixels of a PNG; empty of another file, or a damaged one."""
    try:
        with open_regular(path) as file, Image.open(file, formats=["PNG"]) as image:
            return {name: text for name, text in image.info.items() if isinstance(text, str)}  # nothing is decoded
    except (MindSigmaError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return {}


def draw(folder, jobs, pipeline, sampling, options, done=lambda count: None):
    """Draw the missing pictures of this process's jobs.

    Args:
        folder: Folder.
        jobs: list of Job, those that are missing.
        pipeline: PixArtSigmaPipeline.
        sampling: SamplingOptions.
        options: batch_size, negative_prompt.
        done: called with the number of pictures after each batch.

    Returns:
        number of prompts that were longer than `sampling.max_sequence_length`, and so were cut.
    """
    cut, about = 0, {**folder.settings, **sampling.metadata()}
    for batch in batches(jobs, options.batch_size):
        prompts = [job.prompt for job in batch for _ in job.seeds]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = pipeline(
                prompts,
                options.negative_prompt,
                seed=[seed for job in batch for seed in job.seeds],
                progress=False,
                **sampling.as_arguments(),
            )
        cut += sum("cut off" in str(one.message) for one in caught)
        images = iter(result.images)
        for job in batch:
            folder.write(job, [next(images) for _ in job.seeds], about)
        done(len(batch))
    return cut


def batches(jobs, size):
    """Lists of jobs that have at most `size` images together; one job at least."""
    batch, count = [], 0
    for job in jobs:
        if batch and count + len(job.seeds) > size:
            yield batch
            batch, count = [], 0
        batch.append(job)
        count += len(job.seeds)
    if batch:
        yield batch

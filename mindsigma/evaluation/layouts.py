"""Folders of pictures as the scorers of other benchmarks read them: which file gets which prompt.

Their scores need networks that exist in PyTorch only, so pictures are drawn here and scored there. The layouts are
those of the benchmarks' own code:

* GenEval (djghosh13/geneval): `00000/samples/00000.png`, four a prompt, and `00000/metadata.jsonl`, the prompt's line.
* DPG-Bench (TencentQQGYLab/ELLA): `NAME.png` for `NAME.txt`, a grid of 2 x 2 images.
* T2I-CompBench (Karine-Huang/T2I-CompBench): `samples/PROMPT_000000.png`, ten a prompt, numbered through.
* MJHQ-30K (playgroundai): `CATEGORY/ID.png` for an entry of meta_data.json.
* COCO-30K: `ID.png` for captions drawn by lot from captions_val2014.json.
"""

import json
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

from mindsigma.data.tables import entries
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.evaluation.drawing import Job
from mindsigma.evaluation.textatlas import is_picture_name
from mindsigma.foreign import load_json_value, read_bytes, read_text
from mindsigma.weights.formats.atomic import replacing

LARGEST_TABLE = 256 << 20  # bytes of a prompt file
COCO_COUNT = 30_000


class Layout(NamedTuple):
    """A benchmark.

    Attributes:
        images: images of each prompt.
        prompts: what its prompt file is.
        jobs: function of (path, images, seed) that gives the list of Job.
        scores: PixArt-Σ's published numbers, (what, number, source) each.
    """

    images: int
    prompts: str
    jobs: Callable
    scores: tuple


def geneval_jobs(path, images, seed):
    """Jobs of evaluation_metadata.jsonl."""
    jobs = []
    for number, (where, line) in enumerate(entries(path)):
        if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
            raise MindSigmaError(f"{where}: {line if isinstance(line, str) else 'lacks prompt'}; give GenEval's file")
        for i in range(images):
            jobs.append(Job(f"{number:05d}/samples/{i:05d}.png", line["prompt"], (seed + i,)))
    return jobs


def write_geneval_metadata(path, folder):
    """Put each prompt's line beside its images, as the scorer wants it."""
    for number, (_, line) in enumerate(entries(path)):
        place = Path(folder) / f"{number:05d}"
        place.mkdir(parents=True, exist_ok=True)
        with replacing(place / "metadata.jsonl") as file:
            file.write(json.dumps(line).encode())


def dpg_jobs(path, images, seed):
    """Jobs of a folder of prompts, NAME.txt each."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else []
    if not files:
        raise MindSigmaError(f"{path}: holds no .txt files; give DPG-Bench's folder dpg_bench/prompts")
    seeds = tuple(seed + i for i in range(images))
    return [Job(f"{file.stem}.png", read_text(file).strip(), seeds) for file in files]


def compbench_jobs(path, images, seed):
    """Jobs of a text file, a prompt a line, up to the first tab."""
    prompts = [line.split("\t")[0].strip() for line in read_text(path).splitlines()]
    jobs = []
    for prompt in filter(None, prompts):
        # The scorers take the prompt from the file's name, up to the first underscore.
        if "_" in prompt or not is_picture_name(f"{prompt}_000000.png") or "/" in prompt:
            raise MindSigmaError(f"{path}: the prompt '{one_line(prompt)}' is no file's name, as its scorer needs it")
        jobs += [Job(f"samples/{prompt}_{len(jobs) + i:06d}.png", prompt, (seed + i,)) for i in range(images)]
    return jobs


def mjhq_jobs(path, images, seed):
    """Jobs of meta_data.json: {id: {category, prompt}}."""
    table = _json(path)
    jobs = []
    for number, key in enumerate(sorted(table) if isinstance(table, dict) else ()):
        entry = table[key] if isinstance(table[key], dict) else {}
        prompt, name = entry.get("prompt"), f"{entry.get('category')}/{key}.png"
        if not isinstance(prompt, str) or not isinstance(entry.get("category"), str) or not is_picture_name(name):
            raise MindSigmaError(f"{path}: entry {one_line(key)} has no prompt and category; give MJHQ-30K's file")
        jobs.append(Job(name, prompt, (seed + number,)))
    return jobs


def coco_jobs(path, images, seed, count=COCO_COUNT):
    """Jobs of COCO's captions: `count` of them, chosen by the seed without repetition."""
    table = _json(path)
    captions = table.get("annotations") if isinstance(table, dict) else None
    if not isinstance(captions, list) or not all(
        isinstance(one, dict) and type(one.get("id")) is int and isinstance(one.get("caption"), str) for one in captions
    ):
        raise MindSigmaError(f"{path}: has no annotations with id and caption; give captions_val2014.json")
    captions = sorted(captions, key=lambda one: one["id"])
    chosen = np.random.default_rng(seed).permutation(len(captions))[:count]
    return [
        Job(f"{captions[i]['id']:012d}.png", " ".join(captions[i]["caption"].split()), (seed + place,))
        for place, i in enumerate(sorted(chosen.tolist()))
    ]


def _json(path):
    return load_json_value(path, read_bytes(path, LARGEST_TABLE), "the prompt file")


SANA = "Sana's README"
LAYOUTS = {
    "geneval": Layout(4, "evaluation_metadata.jsonl", geneval_jobs, (("1024 px", 0.54, SANA), ("512 px", 0.52, SANA))),
    "dpg-bench": Layout(4, "folder of .txt files", dpg_jobs, (("1024 px", 80.5, SANA), ("512 px", 79.5, SANA))),
    "t2i-compbench": Layout(10, "text file, a prompt a line", compbench_jobs, ()),
    "mjhq-30k": Layout(
        1,
        "meta_data.json",
        mjhq_jobs,
        (
            ("1024 px, FID", 6.15, SANA),
            ("1024 px, 100 x CLIP", 28.26, SANA),
            ("512 px, FID", 6.34, SANA),
            ("512 px, 100 x CLIP", 27.62, SANA),
        ),
    ),
    "coco-30k": Layout(1, "captions_val2014.json", coco_jobs, ()),
}


def jobs_of(name, path, images=None, seed=0):
    """List of Job of a benchmark's prompt file; each picture once. Raises MindSigmaError."""
    layout = LAYOUTS[name]
    jobs = layout.jobs(Path(path), images or layout.images, seed)
    if not jobs:
        raise MindSigmaError(f"{path}: holds no prompt; expected is the {layout.prompts} of {name}")
    empty = next((job for job in jobs if not job.prompt.strip()), None)
    if empty is not None:
        raise MindSigmaError(f"{path}: the prompt of {one_line(empty.name)} is empty")
    names = [job.name for job in jobs]
    if len(set(names)) < len(names):
        raise MindSigmaError(f"{path}: two prompts would get one file")
    return jobs


def published(name):
    """The published scores as Markdown, or a line that says that there are none."""
    rows = LAYOUTS[name].scores
    if not rows:
        return f"PixArt-Σ has no published number for {name} that could be checked."
    return "\n".join(
        [f"| PixArt-Σ on {name} | published | source |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]
    )

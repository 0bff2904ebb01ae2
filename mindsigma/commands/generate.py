"""Draw images from prompts.

python tools/generate.py "a penguin on a yellow background"
"""

import tempfile
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from mindsigma import command_line
from mindsigma.commands.generate_options import (
    NOT_OF_PICTURES,
    build_parser,  # noqa: F401, beside `main` as in every command
    check,
    is_png,
    parse,
    pictures_of,
)
from mindsigma.commands.picture_names import Names, fill
from mindsigma.commands.rows import batches_of, jobs_of, read_rows, shown
from mindsigma.errors import MindSigmaError, printable, say

OF_PIPELINE = (
    "model", "dtype", "device", "components", "convention", "lora", "parallel", "text_encoder_memory", "controlnet",
    "pe_interpolation", "input_size", "kv_compression",
)  # fmt: skip


def main():
    """Parse, draw, write; returns the exit code."""
    args, parser = parse()
    if args.shard_prompts is not None:
        from mindsigma.commands.generate_shards import draw_shards

        return draw_shards(args, parser)
    rows = read_rows(args, parser)
    jobs = jobs_of(rows)
    plain = check(args, len(jobs), rows)
    for row in rows:
        row.judge()

    from mindsigma.pipeline.phases import PhaseClock

    shapes, clock = shapes_of(args), PhaseClock()
    with clock.phase("load"):
        pipeline = open_pipeline(args)
    first = pipeline.parallel is None or pipeline.parallel.first  # the others draw, but neither tell nor write
    tell = say if first else lambda *_: None
    introduce(pipeline, args, tell)
    adapted = open_adapted(pipeline, rows, args)
    sizes = Sizes(pipeline, rows, args, tell)
    jobs = [replace(job, size=sizes.asked(job.row)) for job in jobs]
    if args.verbose:
        tell(*dict.fromkeys(line for row in rows for line in work(pipeline, row.args, row.sampling)))
    if args.parallel:
        for size, sampling in dict.fromkeys((sizes.drawn(row), row.sampling) for row in rows):
            sent = traffic(pipeline, size, min(args.batch_size, len(jobs)), args, sampling)
            if args.verbose:
                tell(sent)
    out = Path(args.out)
    make_folder(out)
    if shapes:
        with clock.phase("warm-up"):
            warm_up_all(pipeline, shapes, plain, args, tell)
    if jobs:
        if first:
            album = Album(args, pipeline, rows, tell)
        with clock.phase("text"):
            captions = encode_all(pipeline, rows)
        pipeline.release_text_encoder()
        for start, stop in batches_of(jobs, args.batch_size):
            batch, row = jobs[start:stop], jobs[start].row
            begin = time.perf_counter()
            images = draw(pipeline, adapted, captions, batch, clock)
            seconds = time.perf_counter() - begin
            if first:
                for number, (job, image) in enumerate(zip(batch, images), start + 1):
                    album.add(job, image, number, sizes.drawn(row))
            if args.verbose:
                height, width = sizes.drawn(row)
                tell(f"{len(batch)} image(s) of {height} x {width} in {seconds:.2f} s")
        if first and args.grid:
            album.add_grid()
    if args.verbose:
        tell(*clock.table().split("\n"))
    return 0


def open_pipeline(args, **changes):
    """The PixArtSigmaPipeline of a tool's arguments, as far as it has them; `changes` win."""
    from mindsigma.pipeline.pipeline import PixArtSigmaPipeline

    given = {**{name: getattr(args, name, None) for name in OF_PIPELINE}, **changes}
    pipeline = PixArtSigmaPipeline.from_pretrained(
        given.pop("model"), **{name: value for name, value in given.items() if value is not None}
    )
    pipeline.vae_tiling = getattr(args, "vae_tiling", None)
    return pipeline


def introduce(pipeline, args, tell):
    """Say which model it is, what was assumed about it, and what memory it takes."""
    if args.model == "sigma-mini":
        tell(
            "model: sigma-mini (bundled; draws emoji-like objects at 256 px). "
            "For the released PixArt-Sigma weights: --model FOLDER, see configs/README.md"
        )
    tell(*notes_on(pipeline))


def notes_on(pipeline):
    """Lines about what was assumed about a model, and what memory it takes."""
    from mindsigma.pipeline import memory

    return [*(f"note: {note}" for note in pipeline.notes), *memory.told(pipeline)]


def open_adapted(pipeline, rows, args):
    """dict adapters -> DiT with them, opened and checked, for all that the rows ask for."""
    adapted = {tuple(args.lora or ()): pipeline.components.opened("dit")}
    for row in rows:
        if row.lora not in adapted:
            with row.naming():
                adapted[row.lora] = pipeline.with_lora(row.lora)
    return adapted


def make_folder(out):
    """Create the folder of the pictures, so that a mistake there is told before the work."""
    if is_png(out) and out.is_dir():
        raise MindSigmaError(f"--out {out}: is a folder; give another name")
    folder = out.parent if is_png(out) else out
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise MindSigmaError(f"--out {out}: cannot be written ({error.strerror or error})") from None


class Sizes:
    """What size each row asks for and is drawn at; tells of each kind once where it is another than asked.

    Args:
        pipeline: PixArtSigmaPipeline. rows: list of Row; none: the arguments alone are judged.
    """

    def __init__(self, pipeline, rows, args, tell):
        self._pipeline, self._tell = pipeline, tell
        self._asked, self._drawn, kinds = {}, {}, {}
        for row in rows:
            with row.naming():
                asked = self._asked[id(row)] = self._size_of(row)
                key = asked, *pictures_of(row.args).items(), row.args.resolution_binning, row.args.image_fit
                if key not in kinds:
                    kinds[key] = self._drawn_size(row, asked)
            self._drawn[id(row)] = kinds[key]
        if not rows:
            pipeline.image_size(args.height, args.width, args.resolution_binning)

    def asked(self, row):
        """(height, width) in pixels that a row asks for; None is the default."""
        return self._asked[id(row)]

    def drawn(self, row):
        """(height, width) in pixels that the model works at."""
        return self._drawn[id(row)]

    def _size_of(self, row):
        prompt, binning = row.prompt, row.args.resolution_binning
        if prompt.size is None and prompt.ratio is None:
            return row.args.height, row.args.width
        try:
            size = prompt.size or self._pipeline.size_of_ratio(prompt.ratio, binning)
            self._pipeline.image_size(*size, binning)
        except MindSigmaError as error:
            raise MindSigmaError(f"the prompt '{shown(prompt)}': {error}") from None
        where = f"as the prompt's HEIGHT:WIDTH has it: {shown(prompt)}"
        self._tell(f"size: {size[0]} x {size[1]} (height x width), {where}")
        return size

    def _drawn_size(self, row, asked):
        pipeline, sources = self._pipeline, opened(row.args)
        if sources:
            options, source = replace(row.sampling, **dict(zip(("height", "width"), asked))), None
            if "image" in sources:
                source = pipeline.open_images(sources["image"], sources.get("mask"), options)
                self._tell(*source.told())
            pictures = pipeline.open_control_images(sources.get("control_image"), options, source)
            self._tell(*(line for given in pictures for line in given.told("control image")))
            return (source or pictures[0]).canvas
        size = pipeline.image_size(*asked, row.args.resolution_binning)
        if tuple(side or pipeline.default_size for side in asked) != size:
            text = "the nearest trained one, then resized and cropped"
            self._tell(f"size: drawn at {size[0]} x {size[1]} (height x width), {text}")
        return size


def opened(args):
    """--image, --mask and --control-image as arguments of the pipeline."""
    sources = {}
    if args.image is not None:
        sources["image"] = opened_file("image", args.image)
    if args.mask is not None:
        sources["mask"] = opened_file("mask", args.mask)
    if args.control_image:
        pictures = [opened_file("control_image", path) for path in args.control_image]
        sources["control_image"] = pictures if len(pictures) > 1 else pictures[0]
    return sources


@lru_cache(maxsize=4)
def opened_file(name, path):
    """PIL image of one of them; neighbours are drawn from the same ones, batch after batch."""
    from mindsigma.pipeline.given_image import open_mask, open_picture

    return open_mask(path) if name == "mask" else open_picture(name, path)


def work(pipeline, args, sampling):
    """Lines about guidance and strength, where they change what a step costs or which steps are run."""
    from mindsigma.sampling.shortcuts import cost

    solver = sampling.solver(args.convention)
    begin = sampling.first_step(solver, args.image is not None, args.mask is not None) or 0
    steps, lines = len(solver.table(sampling.num_inference_steps)), []
    if args.image is not None:
        strength = sampling.strength_of(args.mask is not None)
        lines.append(f"strength {strength:g}: the last {steps - begin} of {steps} steps")
    depth = pipeline.components.opened("dit").config.depth
    if args.controlnet:
        lines.append(control_work(pipeline, sampling, begin, steps, depth))
    pag = sampling.pag(depth)
    if pag is not None:
        rows = solver.table(sampling.num_inference_steps, begin)
        plan = pag.limit(sampling.shortcuts.plan(len(rows), sampling.guided, begin, True), rows)
        ratio = cost(plan, depth, pag.layers[0]) / cost([replace(how, perturbed=False) for how in plan], depth)
        layers = ", ".join(map(str, pag.layers))
        lines.append(f"perturbed attention in block {layers} of {depth}: {ratio:.2f} times as many block evaluations")
    return lines


def control_work(pipeline, sampling, begin, steps, depth):
    """A line about what ControlNets cost a trajectory, of which the first `begin` steps are left out."""
    from mindsigma.sampling.controls import acting

    pieces, more = [], 0
    for name, (scale, *span) in zip(pipeline.controlnets, sampling.of_controls(len(pipeline.controlnets))):
        count = sum(acting(scale, *span, i, steps) for i in range(begin, steps))
        pieces.append(f"{count} of {steps - begin}")
        copies = pipeline.components.opened(name).config.layers
        more += count * copies * (0.5 if sampling.guided and sampling.guess_mode else 1)
    ratio, number = 1 + more / (depth * (steps - begin)), len(pieces)
    what = "1 ControlNet" if number == 1 else f"{number} ControlNets"
    return f"{what} in {', '.join(pieces)} steps: {ratio:.2f} times as many block evaluations"


def shapes_of(args):
    """Shapes of --warm-up."""
    if not args.warm_up:
        return []
    from mindsigma.pipeline.warm_up import Shape

    return [Shape.parse(text, args.max_sequence_length) for text in args.warm_up]


def warm_up_all(pipeline, shapes, sampling, args, tell):
    """Compile the graphs of all shapes and say how many there were."""
    from mindsigma.pipeline.warm_up import warm_up

    for shape in shapes:
        begin = time.perf_counter()
        graphs = warm_up(pipeline, shape, sampling, args.image is not None, args.mask is not None)
        tell(
            f"warm-up: {shape.height} x {shape.width}, batch {shape.batch}, {shape.tokens} tokens: {graphs} graphs in "
            f"{time.perf_counter() - begin:.1f} s"
        )


def caption_key(row):
    """What decides how a row's texts are encoded."""
    return row.args.max_sequence_length, row.args.clean_caption


def encode_all(pipeline, rows):
    """dict of KeptCaptions by `caption_key`, with all prompts and the negative ones that guidance asks for."""
    from mindsigma.pipeline.kept_captions import KeptCaptions
    from mindsigma.progress import bar

    captions = {key: KeptCaptions(pipeline, *key) for key in dict.fromkeys(map(caption_key, rows))}
    first = pipeline.parallel is None or pipeline.parallel.first
    count = len({(caption_key(row), row.prompt.text) for row in rows})
    with bar(count, "text", "prompt", delay=2.0, disable=not first or count == 1) as done:
        for key, kept in captions.items():
            mine = [row for row in rows if caption_key(row) == key]
            kept.encode([row.prompt.text for row in mine], progress=done.update)
            # The official unconditional half looks at the negative prompt wherever the prompt has tokens.
            whole = kept.longest if pipeline.convention == "official" else 0
            kept.negative.encode([row.args.negative_prompt for row in mine if row.sampling.guided], whole)
    return captions


def draw(pipeline, adapted, captions, batch, clock=None, progress=True):
    """list of the pictures of Jobs that are drawn at once; adapted: what open_adapted gives."""
    pipeline.use(adapted[batch[0].row.lora])
    row, kept = batch[0].row, captions[caption_key(batch[0].row)]
    states, mask = kept.batch([job.row.prompt.text for job in batch])
    texts = {"prompt_embeds": states, "prompt_mask": mask}
    if row.sampling.guided:
        states, mask = kept.negative.batch([job.row.args.negative_prompt for job in batch])
        texts.update(negative_prompt_embeds=states, negative_prompt_mask=mask)
    height, width = batch[0].size
    return pipeline(
        **texts,
        seed=[job.seed for job in batch],
        **{**row.sampling.as_arguments(), "height": height, "width": width},
        **opened(row.args),
        clock=clock,
        progress=progress,
    ).images


def traffic(pipeline, size, images, args, sampling):
    """What the processes send each other, in a line."""
    sampler, pag = sampling.solver(args.convention), sampling.pag(pipeline.components.opened("dit").config.depth)
    perturbed = pag.layers if pag else ()
    how = sampling.guided, sampler.learned_variance, perturbed, sampling.guess_mode
    sent = pipeline.bytes_sent(*size, images, *how)
    return (
        f"parallel {args.parallel}: {pipeline.parallel.ranks.count} processes, each sends "
        f"{sum(sent.values()) / 1e6:.2f} MB a step ({sent['keys'] / 1e6:.2f} keys and values, "
        f"{sent['noise'] / 1e6:.2f} noise)"
    )


class Album:
    """Where the pictures go: writes each as it comes, with what it tells of its making.

    Args:
        rows: list of Row; the files that drew them are hashed from now on, beside the work.
    """

    def __init__(self, args, pipeline, rows, tell):
        from mindsigma.pipeline.metadata import read
        from mindsigma.weights.adapters.merging import parse_adapter
        from mindsigma.weights.digests import Digests
        from mindsigma.weights.locate import locate

        self.args, self.pipeline, self.tell = args, pipeline, tell
        self.out, self.names = Path(args.out), Names(args.overwrite)
        self.images, self.drawn = [], []
        adapters = dict.fromkeys(parse_adapter(text)[0] for row in rows for text in row.lora)
        given = dict.fromkeys(path for row in rows for path in pictures_of(row.args).values())
        paths = {**pipeline.files, **{f"lora: {path}": locate(path) for path in adapters}}
        paths.update((f"file: {path}", path) for path in given)
        self._digests = Digests(paths)
        self._recorded = read(args.like)[1] if args.like else {}

    def add(self, job, image, number, drawn):
        """Write a Job's picture. `number`: of the picture, from 1; drawn: (height, width) that the model worked at."""
        from mindsigma.pipeline.metadata import texts

        row, digests = job.row, self._digests_of(job.row)
        for name in differing(self._recorded, digests):
            self.tell(f"note: {name} is not what drew {self.args.like}, its SHA-256 is another; so is the picture")
        self._recorded = {}  # that is said once
        options, about = options_of(job, self.pipeline), about_of(row, self.pipeline)
        told = texts(
            row.prompt.text, row.args.negative_prompt, job.seed, row.sampling, image.size, drawn[::-1], about,
            digests, options,
        )  # fmt: skip
        numbers = {
            "seed": job.seed, "number": number, "image": job.image + 1, "width": image.size[0],
            "height": image.size[1], "steps": row.sampling.num_inference_steps,
            "guidance": row.sampling.guidance_scale,
        }  # fmt: skip
        model = self.args.model.rstrip("/").rpartition("/")[2]
        words = {"prompt": row.prompt.text, "model": model, "sampler": row.sampling.sampler}
        self._put(job, image, f"{fill(self.args.name_template, numbers, words)}.png", told)
        if self.args.grid:
            self.images.append(image)
            self.drawn.append(told)

    def add_grid(self):
        """Write all pictures as one."""
        from mindsigma.pipeline.metadata import KEY
        from mindsigma.pipeline.pictures import image_grid

        grid = image_grid(self.images)
        told = {name: text for name, text in self.drawn[0].items() if name not in ("prompt", "parameters", KEY)}
        told.update(prompts="\n".join(one["prompt"] for one in self.drawn), seed=self.drawn[0]["seed"])
        told["size"] = f"{grid.size[0]}x{grid.size[1]}"
        self._write(grid, "grid.png", told, self.out.parent if is_png(self.out) else self.out)

    def _put(self, job, image, name, told):
        """Write the picture of a Job, which may have this name, with what it tells."""
        self._write(image, name, told)

    def _write(self, image, name, told, folder=None):
        from mindsigma.pipeline.pictures import save_png

        wanted = folder / name if folder else self.out if is_png(self.out) else self.out / name
        path = self.names.free(wanted)
        while not save_png(image, path, told, new=not self.args.overwrite):  # somebody else was faster
            path = self.names.free(wanted)
        self.tell(path)

    def _digests_of(self, row):
        """dict part -> SHA-256 of what drew a row's pictures."""
        from mindsigma.weights.adapters.merging import parse_adapter

        found = self._digests.result()
        names = {**dict.fromkeys(self.pipeline.files), **{f"lora: {parse_adapter(text)[0]}": None for text in row.lora}}
        result = {name: found[name] for name in names if name in found}
        pictures = {name: f"file: {path}" for name, path in pictures_of(row.args).items()}
        return {**result, **{name: found[path] for name, path in pictures.items() if path in found}}


def differing(recorded, found):
    """Names of what a picture was drawn by, and is by now another file; of dicts name -> digest."""
    return [name for name, digest in recorded.items() if found.get(name, digest) != digest]


def about_of(row, pipeline):
    """dict of texts about the model and circumstances of a Row's pictures."""
    args = row.args
    return {
        "model": args.model,
        "components": pipeline.origin,
        "lora": ", ".join(args.lora or ()),
        "notes": "\n".join(pipeline.notes),
        "controlnet": ", ".join(args.controlnet or ()),
        **{name: printable(path) for name, path in pictures_of(args).items()},
        **({} if args.image is None else row.sampling.image_metadata(args.mask is not None)),
        **(row.sampling.control_metadata() if args.controlnet else {}),
        "vae_tiling": args.vae_tiling,
        "text_encoder_memory": None if args.text_encoder_memory == "whole" else args.text_encoder_memory,
        "convention": args.convention,
        "dtype": pipeline.dtype_name,
    }


def options_of(job, pipeline):
    """dict of JSON values: the options by which this tool draws a Job's picture again."""
    from mindsigma.pipeline.metadata import again
    from mindsigma.sampling.options import OPTION_NAMES

    row = job.row
    sampling = {OPTION_NAMES.get(name, name) for name in row.sampling.as_arguments()}
    others = {
        name: value
        for name, value in vars(row.args).items()
        if name not in NOT_OF_PICTURES and name not in sampling and name not in ("prompt", "seed")
    }
    height, width = job.size
    values = {**others, "height": height, "width": width, "dtype": pipeline.dtype_name}
    return again(row.sampling, row.prompt.text, job.seed, **values)


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

"""Draw images from prompts.

python tools/generate.py "a penguin on a yellow background"
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mindsigma import __version__, command_line
from mindsigma.commands.generate_options import build_parser, check, is_png, make_fast, read_prompts
from mindsigma.config_file import parse_with_config
from mindsigma.errors import MindSigmaError, one_line, printable, say

MAX_NAME_BYTES = 80


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


def file_names(jobs):
    """A file name for each (prompt, seed): its words and the seed, numbered where two would be the same."""
    names, taken = [], {}
    for prompt, seed in jobs:
        words = "".join(c if c.isalnum() else "-" for c in prompt.lower())
        words = "-".join(part for part in words.split("-") if part)
        words = words.encode("utf-8")[:MAX_NAME_BYTES].decode("utf-8", "ignore").rstrip("-")
        name = f"{words or 'image'}-{seed}"
        taken[name] = taken.get(name, 0) + 1
        names.append(f"{name}.png" if taken[name] == 1 else f"{name}-{taken[name]}.png")
    return names


def main():
    """Parse, draw, write; returns the exit code."""
    args = parse_with_config(build_parser())
    make_fast(args)
    asked = read_prompts(args)
    prompts = [prompt.text for prompt in asked]
    jobs = [(prompt, args.seed + i) for prompt in prompts for i in range(args.num_images)]
    sampling = check(args, len(jobs))
    shapes, sources = shapes_of(args), opened(args)

    from mindsigma.pipeline.phases import PhaseClock
    from mindsigma.pipeline.pictures import image_grid, save_png
    from mindsigma.pipeline.pipeline import PixArtSigmaPipeline

    clock = PhaseClock()
    config = {
        name: getattr(args, name)
        for name in ("pe_interpolation", "input_size", "kv_compression")
        if getattr(args, name) is not None
    }
    with clock.phase("load"):
        pipeline = PixArtSigmaPipeline.from_pretrained(
            args.model,
            args.dtype,
            args.device,
            args.components,
            args.convention,
            args.lora or (),
            args.parallel,
            args.text_encoder_memory,
            **config,
        )
    pipeline.vae_tiling = args.vae_tiling
    first = pipeline.parallel is None or pipeline.parallel.first  # the others draw, but neither tell nor write
    tell = say if first else lambda *_: None
    if args.model == "sigma-mini":
        tell(
            "model: sigma-mini (bundled; draws emoji-like objects at 256 px). "
            "For the released PixArt-Sigma weights: --model FOLDER, see configs/README.md"
        )
    for note in pipeline.notes:
        tell(f"note: {note}")
    each = [size_of(prompt, pipeline, args, tell) for prompt in asked]
    given = [size for size in each for _ in range(args.num_images)]
    kinds = dict.fromkeys(given or [(args.height, args.width)])
    sizes = {pair: drawn_size(pair, pipeline, args, sampling, sources, tell) for pair in kinds}
    if args.verbose:
        tell(*work(pipeline, args, sampling))
    if args.parallel:
        for size in dict.fromkeys(sizes.values()):
            sent = traffic(pipeline, size, prompts, args, sampling)
            if args.verbose:
                tell(sent)
    out = Path(args.out)
    make_folder(out)
    if shapes:
        with clock.phase("warm-up"):
            warm_up_all(pipeline, shapes, sampling, args, tell)
    if not jobs:
        if args.verbose:
            tell(*clock.table().split("\n"))
        return 0
    with clock.phase("text"):
        captions = encode_all(pipeline, prompts, args, sampling.guided)
    pipeline.release_text_encoder()

    images, names = [], file_names(jobs)
    for start, stop in batches_of(given, args.batch_size):
        batch, (height, width) = jobs[start:stop], given[start]
        size = sizes[height, width]
        rows = [prompts.index(prompt) for prompt, _ in batch]
        begin = time.perf_counter()
        result = pipeline(
            **captions.select(rows),
            seed=[seed for _, seed in batch],
            **{**sampling.as_arguments(), "height": height, "width": width},
            **sources,
            clock=clock,
        )
        seconds = time.perf_counter() - begin
        for (prompt, seed), name, image in zip(batch, names[start:], result.images):
            path = out if is_png(out) else out / name
            if first:
                about = metadata(args, sampling, size, image.size, pipeline.notes)
                save_png(image, path, {"prompt": prompt, "seed": seed, **about})
            tell(path)
        if args.verbose:
            tell(f"{len(batch)} image(s) of {size[0]} x {size[1]} in {seconds:.2f} s")
        images += result.images
    if args.grid and first:
        path = (out.parent if is_png(out) else out) / "grid.png"
        grid = image_grid(images)
        drawn = sizes[given[0]]
        about = metadata(args, sampling, drawn, grid.size, pipeline.notes)
        save_png(grid, path, {"prompts": "\n".join(prompts), "seed": args.seed, **about})
        tell(path)
    if args.verbose:
        tell(*clock.table().split("\n"))
    return 0


def size_of(prompt, pipeline, args, tell):
    """(height, width) in pixels of a Prompt's picture, as it has it or else the options; None is the default."""
    if prompt.size is None and prompt.ratio is None:
        return args.height, args.width
    shown = one_line(prompt.text, 60)
    try:
        size = prompt.size or pipeline.size_of_ratio(prompt.ratio, args.resolution_binning)
        pipeline.image_size(*size, args.resolution_binning)
    except MindSigmaError as error:
        raise MindSigmaError(f"the prompt '{shown}': {error}") from None
    tell(f"size: {size[0]} x {size[1]} (height x width), as the prompt's HEIGHT:WIDTH has it: {shown}")
    return size


def opened(args):
    """--image and --mask as arguments of the pipeline."""
    if args.image is None:
        return {}
    from mindsigma.pipeline.given_image import open_mask, open_picture

    sources = {"image": open_picture("image", args.image)}
    return sources if args.mask is None else {**sources, "mask": open_mask(args.mask)}


def drawn_size(asked, pipeline, args, sampling, sources, tell):
    """(height, width) that the model works at for what is asked; says so where it is another."""
    if sources:
        asked = dict(zip(("height", "width"), asked))
        given = pipeline.open_images(sources["image"], sources.get("mask"), replace(sampling, **asked))
        tell(*given.told())
        return given.canvas
    size = pipeline.image_size(*asked, args.resolution_binning)
    if tuple(side or pipeline.default_size for side in asked) != size:
        text = "the nearest trained one, then resized and cropped"
        tell(f"size: drawn at {size[0]} x {size[1]} (height x width), {text}")
    return size


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
    pag = sampling.pag(depth)
    if pag is not None:
        rows = solver.table(sampling.num_inference_steps, begin)
        plan = pag.limit(sampling.shortcuts.plan(len(rows), sampling.guided, begin, True), rows)
        ratio = cost(plan, depth, pag.layers[0]) / cost([replace(how, perturbed=False) for how in plan], depth)
        layers = ", ".join(map(str, pag.layers))
        lines.append(f"perturbed attention in block {layers} of {depth}: {ratio:.2f} times as many block evaluations")
    return lines


def batches_of(sizes, batch_size):
    """(start, stop) of the batches of pictures of these sizes: only neighbours of one size are drawn at once."""
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or sizes[stop] != sizes[start] or stop - start == batch_size:
            yield start, stop
            start = stop


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


class Captions:
    """T5 states of all prompts and of the negative prompt, so that T5 is gone before the DiT works."""

    def __init__(self, states, masks, negative):
        self.states, self.masks, self.negative = states, masks, negative

    def select(self, rows):
        """Arguments of the pipeline for the prompts of these rows."""
        chosen = {"prompt_embeds": self.states[rows], "prompt_mask": self.masks[rows]}
        if self.negative is not None:
            chosen["negative_prompt_embeds"] = self.negative[0]
            chosen["negative_prompt_mask"] = self.negative[1]
        return chosen


def encode_all(pipeline, prompts, args, guided):
    """Encode every prompt, and the negative one if guidance asks for it."""
    texts = prompts + ([args.negative_prompt] if guided else [])
    caption = pipeline.encode_prompts(texts, args.max_sequence_length, args.clean_caption)
    states, masks = caption.states.asnumpy(), caption.mask.asnumpy()
    count = len(prompts)
    return Captions(states[:count], masks[:count], (states[count:], masks[count:]) if guided else None)


def traffic(pipeline, size, prompts, args, sampling):
    """What the processes send each other, in a line."""
    images = min(args.batch_size, args.num_images * len(prompts))
    sampler, pag = sampling.solver(args.convention), sampling.pag(pipeline.components.opened("dit").config.depth)
    perturbed = pag.layers if pag else ()
    sent = pipeline.bytes_sent(*size, images, sampling.guided, sampler.learned_variance, perturbed)
    return (
        f"parallel {args.parallel}: {pipeline.parallel.ranks.count} processes, each sends "
        f"{sum(sent.values()) / 1e6:.2f} MB a step ({sent['keys'] / 1e6:.2f} keys and values, "
        f"{sent['noise'] / 1e6:.2f} noise)"
    )


def metadata(args, sampling, drawn, size, notes=()):
    """What the PNG says of its making beside prompt and seed.

    Args:
        sampling: SamplingOptions.
        drawn: (height, width) that the model worked at.
        size: (width, height) of the picture.
        notes: what was assumed about the weights, or left out of an adapter.
    """
    from mindsigma import runtime

    dtype = runtime.resolve_dtype(args.dtype)
    return {
        "Software": f"mindsigma {__version__}",
        "negative_prompt": args.negative_prompt,
        "model": args.model,
        "components": args.components or args.model,
        **({"lora": ", ".join(args.lora)} if args.lora else {}),
        **({"notes": "\n".join(notes)} if notes else {}),
        **sampling.metadata(),
        **({name: printable(getattr(args, name)) for name in ("image", "mask") if getattr(args, name) is not None}),
        **({} if args.image is None else sampling.image_metadata(args.mask is not None)),
        **({} if args.vae_tiling is None else {"vae_tiling": args.vae_tiling}),
        "convention": args.convention,
        "size": f"{size[0]}x{size[1]}",
        "drawn_size": f"{drawn[1]}x{drawn[0]}",
        "dtype": next(name for name, value in runtime.DTYPES.items() if value == dtype),
    }


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

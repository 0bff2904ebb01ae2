"""Draw the picture of mindsigma/sampling/README.md about perturbed attention and given images, and measure PAG's cost.

    OMP_NUM_THREADS=1 python tools/compare_guidance.py --figure guidance.png --repeats 5

Prints a Markdown table: block evaluations and processor seconds of denoising beside guidance alone, medians in turn.
"""

import statistics
import time
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError

PROMPT = "a penguin on a yellow background"
ANOTHER = "a red apple on a yellow background"
CELL = 128  # pixels a side of a picture in the figure

# What is measured, of the middle block unless it says otherwise: a name and arguments of the call.
PLAIN = "guidance alone"
CHOICES = {
    PLAIN: {},
    "PAG, middle block": {"pag_scale": 3.0},
    "PAG, last block": {"pag_scale": 3.0, "pag_layers": -1},
    "PAG, all blocks": {"pag_scale": 3.0, "pag_layers": "all"},
    "PAG, middle block, adaptive 0.006": {"pag_scale": 3.0, "pag_adaptive_scale": 0.006},
    "neither": {"guidance_scale": 1.0},
    "PAG without guidance, middle block": {"guidance_scale": 1.0, "pag_scale": 3.0},
}


def build_parser():
    """The options of this tool."""
    parser = command_line.parser("Cost of perturbed-attention guidance, and a picture of what it and given images do.")
    add = parser.add_argument
    add("--model", default="sigma-mini", help="as of tools/generate.py")
    add("--components", help="as of tools/generate.py")
    add("--steps", type=int, default=20)
    add("--seed", type=int, default=0)
    add("--repeats", type=int, default=3, help="times that each choice is measured; 0 measures nothing")
    add("--figure", metavar="FILE.png", help="write the picture")
    return parser


def with_layers(options, depth):
    """Arguments of a call, for a DiT of this depth."""
    layers = {-1: depth - 1, "all": list(range(depth))}
    given = options.get("pag_layers")
    return options if given is None else {**options, "pag_layers": layers[given]}


def measure(pipeline, args):
    """Lines of the table."""
    from mindsigma.sampling.options import SamplingOptions
    from mindsigma.sampling.shortcuts import cost

    depth, seconds, blocks = pipeline.dit.config.depth, {name: [] for name in CHOICES}, {}
    caption = pipeline.encode_prompts([PROMPT, ""])
    embeds = {"prompt_embeds": caption.states[:1], "prompt_mask": caption.mask[:1]}
    embeds.update(negative_prompt_embeds=caption.states[1:], negative_prompt_mask=caption.mask[1:])
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, choice in CHOICES.items():
            choice = with_layers(choice, depth)
            options = SamplingOptions(num_inference_steps=args.steps, **choice)
            plan, pag = options.shortcuts.plan(args.steps, options.guided, 0, options.perturbed), options.pag(depth)
            plan = plan if pag is None else pag.limit(plan, options.solver(pipeline.convention).table(args.steps))
            blocks[name] = cost(plan, depth, None if pag is None else pag.layers[0])
            begin = time.process_time()
            pipeline(**embeds, num_inference_steps=args.steps, seed=0, output_type="latent", progress=False, **choice)
            seconds[name] += [time.process_time() - begin] if repeat else []
    lines = ["| | blocks run | processor seconds | |", "|---|---|---|---|"]
    plain = statistics.median(seconds[PLAIN])
    for name in CHOICES:
        median = statistics.median(seconds[name])
        lines.append(f"| {name} | {blocks[name] / blocks[PLAIN]:.0%} | {median:.2f} | {median / plain:.2f} |")
    return lines


def figure(pipeline, args):
    """The picture: a row each of guidance, of strengths, of inpainting."""
    import numpy as np
    from PIL import Image

    from mindsigma.pipeline.pictures import image_grid

    def draw(prompt, **options):
        options = {"num_inference_steps": args.steps, "seed": args.seed, "progress": False, **options}
        return pipeline(prompt, **options).images[0]

    guidance = [{"guidance_scale": 1.0}, {"guidance_scale": 1.0, "pag_scale": 3.0}, {}, {"pag_scale": 3.0}]
    first = [draw(PROMPT, **options) for options in guidance]
    source = first[2]
    second = [source, *(draw(ANOTHER, image=source, strength=strength) for strength in (0.4, 0.6, 0.8))]
    mask = np.zeros(source.size[::-1], np.uint8)
    mask[: mask.shape[0] // 2] = 255
    under = [draw(ANOTHER, image=source, mask=mask, seed=args.seed + i) for i in range(2)]
    third = [source, Image.fromarray(mask).convert("RGB"), *under]
    small = [image.resize((CELL, CELL), Image.Resampling.LANCZOS) for image in first + second + third]
    return image_grid(small, 4)


def main():
    """Measure, print, draw; returns the exit code."""
    args = build_parser().parse_args()
    if args.repeats < 0 or args.steps < 2:
        raise MindSigmaError("--repeats must be at least 0, --steps at least 2")
    from mindsigma.pipeline.pictures import save_png
    from mindsigma.pipeline.pipeline import PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline.from_pretrained(args.model, components=args.components)
    if args.repeats:
        print("\n".join(measure(pipeline, args)), flush=True)
    if args.figure:
        save_png(figure(pipeline, args), Path(args.figure), {"model": args.model, "steps": args.steps})
    return 0


if __name__ == "__main__":
    command_line.run(main)

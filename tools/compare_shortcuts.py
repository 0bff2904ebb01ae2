"""Measure what the approximate speed-ups cost and gain, beside the exact image.

    python tools/compare_shortcuts.py --model sigma-mini --output outputs/shortcuts.json

Draws every prompt exactly and with each choice, in turn, from the same noise. Prints a Markdown table: relative error
of the latents and PSNR of the pictures against the exact ones, means over the prompts; seconds of denoising by the
clock and by the processor, which other work on the machine hardly changes, medians.
"""

import statistics
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.prompts import Prompt, read_lines

PROMPTS = (
    "a penguin on a yellow background",
    "a red apple",
    "a cat on a blue background",
    "a rocket on a purple background",
)
# --guidance-interval, --text-reuse, --block-reuse
CHOICES = (
    ((0.0, 0.75), 1.0, 1),
    ((0.0, 0.5), 1.0, 1),
    ((0.25, 1.0), 1.0, 1),
    ((0.0, 1.0), 0.5, 1),
    ((0.0, 1.0), 0.25, 1),
    ((0.0, 0.5), 0.5, 1),
    ((0.0, 1.0), 1.0, 2),
    ((0.0, 1.0), 1.0, 3),
    ((0.0, 0.5), 1.0, 2),
)


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Error and gain of the approximate speed-ups against the exact image.",
        "python tools/compare_shortcuts.py --model sigma-mini --output outputs/shortcuts.json",
    )
    add = parser.add_argument
    add("--model", default="sigma-mini", help="as of tools/generate.py")
    add("--components", help="as of tools/generate.py")
    add("--prompts-file", metavar="FILE", help="one prompt a line; default four that sigma-mini draws")
    add("--steps", type=int, default=20)
    add("--guidance-scale", type=float, default=4.5)
    add("--height", type=int)
    add("--width", type=int)
    add("--seed", type=int, default=0)
    add("--output", metavar="FILE", help="write the numbers as JSON")
    return parser


def name_of(interval, text, blocks):
    """A choice as options of tools/generate.py."""
    words = []
    if tuple(interval) != (0, 1):
        words.append(f"--guidance-interval {interval[0]:g} {interval[1]:g}")
    if text != 1:
        words.append(f"--text-reuse {text:g}")
    if blocks != 1:
        words.append(f"--block-reuse {blocks}")
    return " ".join(words)


def measure(pipeline, prompts, args):
    """For each choice, the exact one first: latents and images (float) of each prompt, seconds, processor seconds."""
    import mindspore as ms
    from mindspore import Tensor

    from mindsigma.pipeline.phases import PhaseClock

    choices = [((0.0, 1.0), 1.0, 1), *CHOICES]
    results = {choice: {"latents": [], "images": [], "seconds": [], "cpu": []} for choice in choices}

    def draw(choice, prompt, seed, steps):
        clock = PhaseClock()
        interval, text, blocks = choice
        latents = pipeline(
            prompt, height=args.height, width=args.width, num_inference_steps=steps, guidance_scale=args.guidance_scale,
            seed=seed, output_type="latent", progress=False, clock=clock, guidance_interval=interval, text_reuse=text,
            block_reuse=blocks,
        ).images  # fmt: skip
        return latents, clock.phases["denoise"]

    for choice in choices:
        draw(choice, prompts[0], args.seed, 4)  # compiles
    for i, prompt in enumerate(prompts):
        for choice in choices:
            latents, phase = draw(choice, prompt, args.seed + i, args.steps)
            result = results[choice]
            result["latents"].append(latents)
            result["images"].append(pipeline.decode(Tensor(latents, ms.float32)))
            result["seconds"].append(phase.seconds)
            result["cpu"].append(phase.processor)
    return results


def summary(results, depth, steps):
    """List of dicts, the exact one first."""
    import numpy as np

    from mindsigma.sampling.shortcuts import Shortcuts, cost

    (exact_choice, exact), *_ = results.items()
    whole = cost(Shortcuts(*exact_choice).plan(steps, True), depth)
    rows = []
    for choice, result in results.items():
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(result["latents"], exact["latents"])]
        squares = [float(np.mean((a - b) ** 2)) for a, b in zip(result["images"], exact["images"])]
        seconds, cpu = statistics.median(result["seconds"]), statistics.median(result["cpu"])
        rows.append(
            {
                "options": name_of(*choice),
                "latent_error": float(np.mean(errors)),
                "psnr_db": None if max(squares) == 0 else float(np.mean([-10 * np.log10(x) for x in squares])),
                "seconds": seconds,
                "gain": statistics.median(exact["seconds"]) / seconds,
                "cpu_seconds": cpu,
                "cpu_gain": statistics.median(exact["cpu"]) / cpu,
                "block_evaluations": cost(Shortcuts(*choice).plan(steps, True), depth) / whole,
            }
        )
    return rows


def markdown(rows):
    """The table."""
    lines = [
        "| options | error of the latents | PSNR | blocks run "
        "| denoising, s | exact / this | by the processor, s | exact / this |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        options = f"`{row['options']}`" if row["options"] else "exact"
        psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        lines.append(
            f"| {options} | {row['latent_error']:.3f} | {psnr} | {row['block_evaluations']:.0%} "
            f"| {row['seconds']:.2f} | {row['gain']:.2f} | {row['cpu_seconds']:.2f} | {row['cpu_gain']:.2f} |"
        )
    return "\n".join(lines)


def main():
    """Parse, draw, print; returns the exit code."""
    args = build_parser().parse_args()
    if args.guidance_scale <= 1:
        raise MindSigmaError("--guidance-scale must be above 1: the choices are about guidance, too")
    if args.steps < 4:
        raise MindSigmaError("--steps must be at least 4")
    prompts = PROMPTS
    if args.prompts_file:
        prompts = [Prompt.parse(line).text for line in read_lines(args.prompts_file)]  # all in one size
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.weights.formats.atomic import write_json

    pipeline = PixArtSigmaPipeline.from_pretrained(args.model, components=args.components)
    rows = summary(measure(pipeline, prompts, args), pipeline.dit.config.depth, args.steps)
    print(markdown(rows))
    if args.output:
        write_json(
            Path(args.output), {"model": args.model, "steps": args.steps, "prompts": list(prompts), "rows": rows}
        )
        print(args.output)
    return 0


if __name__ == "__main__":
    command_line.run(main)

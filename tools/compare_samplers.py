"""Draw one prompt by every sampler at several numbers of steps, from the same noise.

    python tools/compare_samplers.py --output mindsigma/sampling/samplers.png

Writes a picture with a row for each sampler, and prints the distance of its latents to the solution in 200 steps: the
norm of the difference over the norm of the solution. A sampler that adds noise draws another image and does not come
near it. lcm and one-step are meant for distilled models. With --cost it prints instead what a sampler's own step takes
beside the network's.
"""

from pathlib import Path

from mindsigma import command_line

STEPS = (4, 8, 14, 20, 50)
SOLUTION = {"sampler": "dpm", "num_inference_steps": 200}
ROWS = (
    {"sampler": "dpm"},
    {"sampler": "dpm", "karras": True},
    {"sampler": "unipc"},
    {"sampler": "ddim"},
    {"sampler": "euler"},
    {"sampler": "sa", "eta": 0.0},
    {"sampler": "sa"},
    {"sampler": "euler-ancestral"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "iddpm"},
    {"sampler": "lcm"},
    {"sampler": "one-step"},
)
LABEL = 104  # pixels beside and, a fifth of it, above the pictures


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        __doc__.splitlines()[0], "python tools/compare_samplers.py --output outputs/samplers.png"
    )
    add = parser.add_argument
    add("--model", default="sigma-mini", help="as of tools/generate.py")
    add("--components", help="as of tools/generate.py")
    add("--prompt", default="a penguin on a yellow background")
    add("--seed", type=int, default=0)
    add("--side", type=int, default=96, help="pixels a side of a picture in the figure")
    add("--cost", action="store_true", help="processor time of each sampler's own step, and nothing else")
    add("--output", metavar="FILE", default="outputs/samplers.png")
    return parser


def name_of(options):
    """Options of a row as those of tools/generate.py, without the sampler's flag."""
    words = [options["sampler"]]
    for name, value in options.items():
        if name != "sampler":
            words.append(f"--{name}" if value is True else f"--{name} {value:g}")
    return " ".join(words)


def measure(pipeline, args):
    """List of (name, list of (steps, picture, distance)), a sampler each."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from mindsigma.pipeline.pictures import to_pil

    def draw(**options):
        return pipeline(args.prompt, seed=args.seed, output_type="latent", progress=False, **options).images

    solution, results = draw(**SOLUTION), []
    for options in ROWS:
        row = []
        for steps in (1,) if options["sampler"] == "one-step" else STEPS:
            latents = draw(**options, num_inference_steps=steps)
            (picture,) = to_pil(pipeline.decode(Tensor(latents, ms.float32)))
            row.append((steps, picture, float(np.linalg.norm(latents - solution) / np.linalg.norm(solution))))
        results.append((name_of(options), row))
    return results


def cost(pipeline, args, steps=20, calls=40, repeats=5):
    """Milliseconds of the processor for a guided step with dpm, and list of (name, those of a sampler's own step)."""
    from statistics import median
    from time import process_time

    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from mindsigma.backends.cpu.sampler import accelerate_sampler
    from mindsigma.sampling.options import SamplingOptions

    def milliseconds(function):
        times = []
        for _ in range(repeats + 1):
            begin = process_time()
            count = function()
            times.append(1000 * (process_time() - begin) / count)
        return median(times[1:])

    def draw():
        pipeline(args.prompt, seed=args.seed, output_type="latent", progress=False, num_inference_steps=steps)
        return steps

    whole, results = milliseconds(draw), []
    side = pipeline.dit.config.input_size
    random = np.random.default_rng(0)
    latents, noise, fresh, variance = (
        Tensor(random.standard_normal((1, pipeline.dit.config.in_channels, side, side)), ms.float32) for _ in range(4)
    )
    for options in ROWS:
        sampler = accelerate_sampler(SamplingOptions.of_call(dict(options)).solver("diffusers"), pipeline.dit)
        table = sampler.table(1 if options["sampler"] == "one-step" else steps)
        history, numbers = sampler.start_history(latents.shape), table[len(table) // 2].numbers

        def step(sampler=sampler, history=history, numbers=numbers):
            for _ in range(calls):
                sampler(latents, history, numbers, noise, variance, fresh if sampler.draws else None)
            return calls

        results.append((name_of(options), milliseconds(step)))
    return whole, results


def figure(results, side):
    """One picture of all, with the names at the left, the steps above and the distances below."""
    from PIL import Image, ImageDraw

    height, top = side + 14, LABEL // 5
    sheet = Image.new("RGB", (LABEL + len(STEPS) * (side + 4), top + len(results) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, steps in enumerate(STEPS):
        draw.text((LABEL + i * (side + 4), 4), f"{steps} steps", "black")
    for i, (name, row) in enumerate(results):
        draw.text((4, top + i * height + side // 2 - 6), name.replace(" --", "\n--"), "black")
        for j, (steps, picture, distance) in enumerate(row):
            place = LABEL + j * (side + 4), top + i * height
            sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), place)
            told = f"{distance:.3f}" if steps > 1 else "1 step"
            draw.text((place[0], place[1] + side), told, "black")
    return sheet


def markdown(results):
    """The distances as a table."""
    lines = ["| sampler | " + " | ".join(map(str, STEPS)) + " |", "|---" * (1 + len(STEPS)) + "|"]
    for name, row in results:
        if len(row) == len(STEPS):
            lines.append(f"| `{name}` | " + " | ".join(f"{distance:.3f}" for _, _, distance in row) + " |")
    return "\n".join(lines)


def main():
    """Parse, draw, print; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.pipeline.pictures import save_png

    pipeline = PixArtSigmaPipeline.from_pretrained(args.model, components=args.components)
    if args.cost:
        whole, results = cost(pipeline, args)
        print(f"a guided step with dpm: {whole:.1f} ms of the processor; of it the sampler's own\n")
        print("| sampler | ms | % |\n|---|---|---|")
        print("\n".join(f"| `{name}` | {own:.2f} | {100 * own / whole:.2f} |" for name, own in results))
        return 0
    results = measure(pipeline, args)
    print(markdown(results))
    sheet = figure(results, args.side).quantize(256, dither=0)  # a palette: half the bytes
    about = {"prompt": args.prompt, "seed": args.seed, "model": args.model}
    save_png(sheet, Path(args.output), about)
    print(args.output)
    return 0


if __name__ == "__main__":
    command_line.run(main)

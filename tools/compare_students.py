"""How near a distilled network comes to its teacher, and how fast: a grid of pictures and a table.

    python tools/compare_students.py --student runs/lcm/checkpoints/step_00000025/adapter_ema.safetensors

Draws every prompt from the same noise by the teacher, with many steps and with few, and by the student. The table has,
against the teacher's pictures of many steps, means over the prompts: the root mean square of the pixels' difference
(0 ... 255); the relative difference of the teacher's tokens, after three quarters of its blocks, for the pictures
noised up to t = 100; and how often, of all prompts, the teacher denoises the picture best with the prompt that it was
drawn for.
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say
from mindsigma.pipeline.prompts import Prompt, read_lines

FEATURE_TIME = 100
CLASSIFIER_TIMES = (400, 600)
PROMPTS = (
    "a penguin on a yellow background",
    "a red apple",
    "two cats on a blue background",
    "a rocket",
    "three pizzas on a pink background",
    "a large sunflower",
    "a whale on a teal background",
    "a 3D emoji of a dragon, black background",
    "a small cactus on an orange background",
    "an octopus on a pink background",
    "a guitar on a white background",
    "a hamburger on a blue background",
    "a robot on a purple background",
    "a snowman on a green background",
    "an owl to the right of a crescent moon on a black background",
    "a sailboat",
    "four strawberries",
    "a bicycle on a gray background",
    "a fox on an orange background",
    "a castle on a teal background",
    "a clown face on a red background",
    "a bouquet on a brown background",
    "an airplane above a cloud on a blue background",
    "a frog on a yellow background",
)


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Pictures and numbers of a distilled network beside its teacher's.",
        "python tools/compare_students.py --student runs/lcm/checkpoints/step_00001000/adapter_ema.safetensors",
    )
    add = parser.add_argument
    add("--model", default="sigma-mini", help="the teacher")
    add("--components", help="as of tools/generate.py")
    add("--student", required=True, help="adapter of the teacher, or a network of its own")
    add("--sampler", choices=("lcm", "one-step"), default="lcm", help="of the student")
    add("--student-steps", type=int, nargs="+", help="default 4 2 1, of one-step 1")
    add(
        "--timestep",
        type=int,
        metavar="T",
        help="of a one-step student, --dmd-time; default what its file tells, or 400",
    )
    add("--steps", type=int, default=20, help="of the teacher")
    add("--guidance-scale", type=float, default=4.5, help="of the teacher")
    add("--prompts-file", metavar="FILE", help="one prompt a line; default 24 that sigma-mini draws")
    add("--shown", type=int, default=9, help="prompts in the picture")
    add("--seed", type=int, default=0)
    add("--output", default="outputs/students", help="folder of grid.png and students.json")
    return parser


class Judge:
    """The teacher's opinion of pictures.

    Args:
        pipeline: PixArtSigmaPipeline of the teacher.
        prompts: list of texts, that the pictures were drawn for.
    """

    def __init__(self, pipeline, prompts):
        import numpy as np

        self.dit, self.vae = pipeline.dit, pipeline.vae
        self.captions = pipeline.encode_prompts(prompts)
        self.null = pipeline.encode_prompts([""])
        config = self.vae.config
        side = pipeline.default_size // config.downsampling
        self.noise = np.random.default_rng(1).standard_normal((1, config.latent_channels, side, side), np.float32)

    def noised(self, images, time):
        """Tensor (N, c, h, w): latents of images (N, H, W, 3) in [0, 1], noised with one noise."""
        import numpy as np
        from mindspore import Tensor

        from mindsigma.sampling.schedule import alphas_cumprod

        config, latents = self.vae.config, []
        for image in images:
            pixels = np.ascontiguousarray(image.transpose(2, 0, 1)[None] * 2 - 1, np.float32)
            latents.append(np.split(self.vae.encode(Tensor(pixels)).asnumpy(), 2, 1)[0])
        clean = (np.concatenate(latents) - config.shift_factor) * config.scaling_factor
        product = alphas_cumprod()[time]
        return Tensor((product**0.5 * clean + (1 - product) ** 0.5 * self.noise).astype(np.float32))

    def tokens(self, images):
        """float32 (N, T, C) of the teacher's blocks."""
        import numpy as np
        from mindspore import Tensor

        dit, result = self.dit, []
        for latents in np.split(self.noised(images, FEATURE_TIME).asnumpy(), len(images)):
            latents = Tensor(latents)
            text_kv, p = dit.text_kv(self.null.states, self.null.mask), dit.config.patch_size
            modulations = dit.modulations(Tensor(np.array([FEATURE_TIME], np.float32)))
            x = dit.x_embedder(latents, dit.position(latents.shape))
            for i, block in enumerate(dit.blocks[: dit.config.depth * 3 // 4]):
                x, _ = block(x, modulations[i], *text_kv[i], latents.shape[2] // p, latents.shape[3] // p)
            result.append(x.asnumpy().copy())
        return np.concatenate(result)

    def recognised(self, images):
        """bool (N,): whether image i is denoised best with prompt i."""
        import numpy as np
        from mindspore import Tensor

        errors = np.zeros((len(images), len(images)))
        for time in CLASSIFIER_TIMES:
            noised = self.noised(images, time).asnumpy()
            times = Tensor(np.full(len(images), time, np.float32))
            for i, latents in enumerate(noised):
                rows = Tensor(np.repeat(latents[None], len(images), 0))
                output = self.dit(rows, times, self.captions.states, self.captions.mask).asnumpy()
                errors[i] += np.square(output[:, : latents.shape[0]] - self.noise).mean((1, 2, 3))
        return errors.argmin(1) == np.arange(len(images))


def draw(pipeline, prompts, seed, **options):
    """float32 (N, H, W, 3) in [0, 1], one picture after the other."""
    import numpy as np

    pictures = [
        pipeline([prompt], seed=seed + i, output_type="np", progress=False, **options).images
        for i, prompt in enumerate(prompts)
    ]
    return np.concatenate(pictures)


def student_of(args):
    """PixArtSigmaPipeline of --student."""
    from mindsigma import PixArtSigmaPipeline

    if Path(args.student).suffix == ".safetensors":
        return PixArtSigmaPipeline.from_pretrained(args.model, components=args.components, lora=[args.student])
    return PixArtSigmaPipeline.from_pretrained(args.student, components=args.components or args.model)


def main():
    """Parse, draw, judge, print; returns the exit code."""
    args = build_parser().parse_args()
    prompts = list(PROMPTS)
    if args.prompts_file:
        prompts = [Prompt.parse(line).text for line in read_lines(args.prompts_file)]
    one_step = args.sampler == "one-step"
    student_steps = args.student_steps or ([1] if one_step else [4, 2, 1])
    if args.timestep is not None and not one_step:
        raise MindSigmaError("--timestep is for --sampler one-step")
    if args.steps < 4 or min(student_steps) < 1 or args.shown < 1:
        raise MindSigmaError("--steps must be at least 4, --student-steps and --shown at least 1")
    import numpy as np

    from mindsigma import PixArtSigmaPipeline
    from mindsigma.pipeline.pictures import image_grid, save_png, to_pil
    from mindsigma.weights.formats.atomic import write_json

    teacher, student = PixArtSigmaPipeline.from_pretrained(args.model, components=args.components), student_of(args)
    guided = {"guidance_scale": args.guidance_scale}
    drawn = {
        f"teacher, {args.steps} steps": draw(teacher, prompts, args.seed, num_inference_steps=args.steps, **guided),
        "teacher, 4 steps": draw(teacher, prompts, args.seed, num_inference_steps=4, **guided),
    }
    for steps in student_steps:
        options = {"sampler": args.sampler, "num_inference_steps": steps, "guidance_scale": 1.0}
        if args.timestep is not None:
            options["timesteps"] = [args.timestep]
        drawn[f"student, {steps} step{'s' * (steps > 1)}"] = draw(student, prompts, args.seed, **options)
    other = draw(teacher, prompts, args.seed + 1000, num_inference_steps=args.steps, **guided)

    judge, rows = Judge(teacher, prompts), []
    reference, *_ = drawn.values()
    tokens = judge.tokens(reference)
    for name, images in {**drawn, f"teacher, {args.steps} steps, other noise": other}.items():
        found = judge.tokens(images)
        error = np.linalg.norm((found - tokens).reshape(len(found), -1), axis=1)
        error /= np.linalg.norm(tokens.reshape(len(found), -1), axis=1)
        pixels = np.sqrt(np.square(images - reference).mean((1, 2, 3))) * 255
        recognised = int(judge.recognised(images).sum())
        rows.append({"name": name, "pixels": float(pixels.mean()), "tokens": float(error.mean())})
        rows[-1]["recognised"] = recognised
    say("| | pixels | tokens | recognised |", "|---|---|---|---|")
    for row in rows:
        told = f"{row['recognised']} of {len(prompts)}"
        say(f"| {row['name']} | {row['pixels']:.1f} | {row['tokens']:.3f} | {told} |")
    shown = [image for images in drawn.values() for image in to_pil(images[: args.shown])]
    about = {"prompts": "\n".join(prompts[: args.shown]), "rows": "\n".join(drawn), "seed": args.seed}
    folder = Path(args.output)
    save_png(image_grid(shown, min(args.shown, len(prompts))), folder / "grid.png", about)
    write_json(folder / "students.json", {"student": args.student, "prompts": prompts, "rows": rows})
    say(folder / "grid.png")
    return 0


if __name__ == "__main__":
    command_line.run(main)

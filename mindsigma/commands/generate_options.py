"""Options of tools/generate.py and what is checked of them before a model is opened."""

import argparse
import os
from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.prompts import Prompt, read_lines
from mindsigma.sampling.options import SamplingOptions
from mindsigma.sampling.options import add_arguments as add_sampling_arguments

FAST = Path(__file__).resolve().parent.parent / "bundled" / "sigma-mini" / "lcm.safetensors"


def build_parser():
    """The options of this tool; `--config` may set any of them."""
    parser = command_line.parser(
        "Draw images from prompts with PixArt-Sigma.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add(
        "prompt",
        nargs="*",
        help="what to draw; several prompts draw several images; may hold --ar HEIGHT:WIDTH or --hw HEIGHT:WIDTH",
    )
    add("--config", metavar="FILE.yaml", help="options from a file (configs/infer/); flags override it")
    add("--prompts-file", metavar="FILE", help="one prompt a line")
    add("--model", default="sigma-mini", help="bundled name, folder, hub id, or DiT weight file")
    add("--components", help="folder or hub id with vae/, text_encoder/, tokenizer/, if --model is a weight file")
    add("--pe-interpolation", type=float, help="scale of the position grid, where the weight file does not tell")
    add("--input-size", type=int, help="latent side of the base resolution, where the weight file does not tell")
    add("--kv-compression", metavar="MODE:FACTOR:LAYERS", help="as in uniform:2:14-27, for modes without weights")
    add("--lora", action="append", metavar="FILE[:WEIGHT]", help="LoRA or DoRA to merge into the model; repeatable")
    add("--negative-prompt", default="", help="what to lead away from")
    add(
        "--image",
        metavar="FILE",
        help="draw from this picture, as far as --strength has it, instead of from noise alone",
    )
    add("--mask", metavar="FILE", help="of the size of --image: draw anew where it is white, keep the rest")
    fast = "sigma-mini alone: its bundled LCM-LoRA and sampler lcm, 4 steps without guidance"
    add("--fast", action=argparse.BooleanOptionalAction, default=False, help=fast)
    add_sampling_arguments(parser)
    add("--seed", type=int, default=0, help="image i of each prompt is drawn from seed + i")
    add("--num-images", type=int, default=1, help="images a prompt")
    add("--batch-size", type=int, default=1, help="images drawn at once")
    add("--convention", choices=("diffusers", "official"), default="diffusers", help="whose sampler to reproduce")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on the CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    add(
        "--text-encoder-memory",
        choices=("whole", "layers", "int8"),
        default="whole",
        help="T5 in memory, or read layer by layer for every text (exact, slower), or as int8 (approximate)",
    )
    add(
        "--vae-tiling",
        action=argparse.BooleanOptionalAction,
        help="decode in tiles, whose seams are blended, in less memory; default above 1024 px",
    )
    add(
        "--parallel",
        choices=("sequence", "cfg", "both"),
        help="how the processes of tools/launch/generate_*.sh share an image: bands of rows, halves of guidance, both",
    )
    add(
        "--warm-up",
        action="append",
        metavar="HEIGHTxWIDTH[:BATCH[:TOKENS]]",
        help="compile what images of this shape need, before the first prompt or without any; repeatable",
    )
    add("--out", default="outputs", help="folder, or the name of one .png file")
    add("--grid", action=argparse.BooleanOptionalAction, default=False, help="also write all images as one")
    add(
        "--verbose",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="print seconds, compiled graphs and peak memory of each phase",
    )
    return parser


def read_prompts(args):
    """List of Prompt of the command line and of --prompts-file."""
    prompts = list(args.prompt)
    if args.prompts_file:
        prompts += read_lines(args.prompts_file)
    if not prompts and not args.warm_up:
        raise MindSigmaError('nothing to draw; give a prompt, as in: tools/generate.py "a red apple"')
    for prompt in prompts:
        if not is_text(prompt):
            raise MindSigmaError(f"the prompt {prompt!r} is not UTF-8 text")
    return [Prompt.parse(prompt) for prompt in prompts]


def make_fast(args):
    """Make of --fast the options that it stands for."""
    if not args.fast:
        return
    if args.model != "sigma-mini":
        raise MindSigmaError(
            "--fast is for the bundled sigma-mini; for another model give an LCM-LoRA, as of tools/distill.py, with "
            "--lora FILE --sampler lcm"
        )
    if args.sampler not in (None, "lcm"):
        raise MindSigmaError(f"--fast draws with sampler lcm, not {args.sampler}: leave out one of the two")
    args.sampler = "lcm"
    args.lora = [str(FAST), *(args.lora or [])]


def is_text(value):
    """Whether an argument survived the terminal's encoding."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check(args, count):
    """SamplingOptions of the arguments; raises for option values that no model could take."""
    for name in ("steps", "num_images", "batch_size", "max_sequence_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    if args.seed < 0:
        raise MindSigmaError(f"--seed must be at least 0, not {args.seed}")
    from mindsigma.weights.released import default_sampler

    sampling = SamplingOptions.of_arguments(args, sampler=args.sampler or default_sampler(args.model))
    solver = sampling.solver(args.convention)
    solver.table(sampling.num_inference_steps)
    if args.mask is not None and args.image is None:
        raise MindSigmaError("--mask needs --image, the picture that it belongs to")
    sampling.first_step(solver, args.image is not None, args.mask is not None)
    if os.environ.get("MS_WORKER_NUM") and not args.parallel:
        raise MindSigmaError("msrun started this: give --parallel, or each of its processes would draw the same")
    out = Path(args.out)
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise MindSigmaError(f"--out {out}: pictures are written as .png")
    if is_png(out) and count > 1:
        raise MindSigmaError(f"--out {out}: one file for {count} images; give a folder")
    return sampling


def is_png(path):
    """Whether --out names one file rather than a folder."""
    return path.suffix.lower() == ".png"

"""Options of tools/generate.py and what is checked of them before a model is opened."""

import argparse
import os
from pathlib import Path

from mindsigma import command_line
from mindsigma.choices import FAST
from mindsigma.commands.picture_names import DEFAULT, FIELDS, check_template
from mindsigma.commands.ranks import add_ranks
from mindsigma.commands.rows import EACH_PICTURE
from mindsigma.config_file import Unnamed, convert_value, parse_with_config, require_model
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular
from mindsigma.sampling.options import CONTROL_NUMBERS, SamplingOptions, add_control_arguments
from mindsigma.sampling.options import add_arguments as add_sampling_arguments

# Options that no picture tells: they are of the machine, of the run, or of the files.
NOT_OF_PICTURES = (
    "config", "like", "prompts_file", "out", "name_template", "overwrite", "grid", "verbose", "device", "parallel",
    "warm_up", "batch_size", "num_images", "fast", "help", "version", "print_completion", "shard_prompts", "rank",
    "ranks",
)  # fmt: skip


def build_parser():
    """The options of this tool; `--config` may set any of them."""
    flag = argparse.BooleanOptionalAction
    parser = command_line.parser(
        "Draw images from prompts with PixArt-Sigma.",
        'python tools/generate.py "a penguin on a yellow background" --num-images 4 --grid',
        usage="%(prog)s [options] PROMPT ...",
    )
    add = parser.add_argument_group("what to draw").add_argument
    add(
        "prompt",
        nargs="*",
        help="what to draw; several prompts draw several images; may hold --ar HEIGHT:WIDTH or --hw HEIGHT:WIDTH",
    )
    add(
        "--prompts-file",
        metavar="FILE",
        help="a prompt a line, blank lines and # skipped; or .csv, .tsv, .jsonl with a column prompt and options",
    )
    add("--like", metavar="FILE.png", help="draw a picture again that was written here; flags override what it tells")
    add("--config", metavar="FILE.yaml", help="options from a file (configs/infer/); flags override it")

    group = parser.add_argument_group(EACH_PICTURE)
    add = group.add_argument
    add("--negative-prompt", default="", help="what to lead away from")
    add("--seed", type=int, default=0, help="image i of each prompt is drawn from seed + i")
    add("--num-images", type=int, default=1, help="images a prompt")
    add("--lora", action="append", metavar="FILE[:WEIGHT]", help="LoRA or DoRA to merge into the model; repeatable")
    add(
        "--image",
        metavar="FILE",
        help="draw from this picture, as far as --strength has it, instead of from noise alone",
    )
    add("--mask", metavar="FILE", help="of the size of --image: draw anew where it is white, keep the rest")
    add_control_arguments(group)
    add_sampling_arguments(group)

    add = parser.add_argument_group("the model").add_argument
    add("--model", default=Unnamed("sigma-mini"), help="bundled name, folder, hub id, or DiT weight file")
    fast = "sigma-mini alone: its bundled LCM-LoRA and sampler lcm, 4 steps without guidance"
    add("--fast", action=flag, default=False, help=fast)
    add("--components", help="folder or hub id with vae/, text_encoder/, tokenizer/, if --model is a weight file")
    add("--controlnet", action="append", metavar="FOLDER", help="ControlNet beside it, folder or file; repeatable")
    add("--pe-interpolation", type=float, help="scale of the position grid, where the weight file does not tell")
    add("--input-size", type=int, help="latent side of the base resolution, where the weight file does not tell")
    add("--kv-compression", metavar="MODE:FACTOR:LAYERS", help="as in uniform:2:14-27, for modes without weights")
    add("--convention", choices=("diffusers", "official"), default="diffusers", help="whose sampler to reproduce")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on the CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    add("--batch-size", type=int, default=1, help="images drawn at once")
    add_ranks(add)
    add(
        "--text-encoder-memory",
        choices=("whole", "layers", "int8"),
        default="whole",
        help="T5 in memory, or read layer by layer for every text (exact, slower), or as int8 (approximate)",
    )
    add(
        "--vae-tiling",
        action=flag,
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

    add = parser.add_argument_group("what is written").add_argument
    add("--out", default="outputs", metavar="FOLDER", help="folder, or the name of one .png file")
    add(
        "--name-template",
        default=DEFAULT,
        metavar="TEXT",
        help=f"names of the files, without .png; fields: {' '.join(f'{{{name}}}' for name in FIELDS)}",
    )
    add("--overwrite", action=flag, default=False, help="replace files of the same name; else a number is appended")
    add("--grid", action=flag, default=False, help="also write all images as one")
    add(
        "--shard-prompts",
        type=int,
        metavar="N",
        help="write shards of N prompts each, pictures and captions as WebDataset, for files of any number of prompts; "
        "the same command goes on, and any number of processes share the work",
    )
    add("--verbose", action=flag, default=False, help="print seconds, compiled graphs and peak memory of each phase")
    return parser


def parse(argv=None):
    """(namespace, parser) of the command line, of --config and of --like; the first wins over the second and third."""
    parser = build_parser()

    def like(first):
        return options_of_picture(first.like, parser, bool(first.prompts_file)) if first.like else {}

    args = parse_with_config(parser, argv, like)
    require_model(args)
    make_fast(args)
    return args, parser


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
    if FAST not in (args.lora or ()):  # a picture that is drawn again tells it
        args.lora = [FAST, *(args.lora or [])]


def options_of_picture(path, parser, without_prompt=False):
    """dict destination -> value: what the picture --like tells of its making. Raises MindSigmaError."""
    from mindsigma.pipeline.metadata import read

    try:
        options, _ = read(path)
    except MindSigmaError as error:
        raise MindSigmaError(f"--like {error}") from None
    if without_prompt:
        options.pop("prompt", None)
    actions = {action.dest: action for action in parser._actions}
    unknown = next((name for name in options if name not in actions or name in NOT_OF_PICTURES), None)
    if unknown is not None:
        raise MindSigmaError(f"--like {path}: tells an option '{one_line(unknown)}' that is not known here")
    return {
        name: convert_value(f"--like {path}: {name}", value, actions[name])
        for name, value in options.items()
        if value is not None
    }


def judged(args):
    """SamplingOptions of the arguments of one picture; raises for values that no model could take."""
    from mindsigma.weights.own_sampling import own_sampling

    sampling = SamplingOptions.of_arguments(args, own_sampling(args.model, args.lora or ()))
    solver = sampling.solver(args.convention)
    solver.table(sampling.num_inference_steps)
    sampling.first_step(solver, args.image is not None, args.mask is not None)
    networks = len(args.controlnet or ())
    if networks and (sampling.text_reuse < 1 or sampling.block_reuse > 1):
        raise MindSigmaError("--text-reuse and --block-reuse exclude --controlnet; leave out one of them")
    sampling.of_controls(networks)
    return sampling


def check_controls(args, drawn):
    """Raise unless what is of ControlNets has one and, where pictures are `drawn` by these, each has what it takes."""
    networks, pictures = len(args.controlnet or ()), len(args.control_image or ())
    if not networks:
        given = [name for name in ("control_image", *CONTROL_NUMBERS) if getattr(args, name)]
        given += ["guess_mode"] if args.guess_mode else []
        if given:
            raise MindSigmaError(f"--{given[0].replace('_', '-')} needs --controlnet, the folder of a ControlNet")
    elif drawn and not pictures:
        raise MindSigmaError("--controlnet needs --control-image, the picture that it takes")
    elif drawn and pictures != networks:
        raise MindSigmaError(
            f"--control-image is given {pictures} times for {networks} ControlNets; give one for each --controlnet"
        )


def check(args, count, rows=()):
    """SamplingOptions of the arguments. Raises for option values that cannot be meant, as far as that goes at once.

    Args:
        count: number of pictures. rows: list of Row, whose options are judged, too.
    """
    for one in [args, *(row.args for row in rows)]:
        where = next((f"{row.where}: " for row in rows if row.args is one and row.where), "")
        for name in ("steps", "num_images", "batch_size", "max_sequence_length"):
            if getattr(one, name) is not None and getattr(one, name) < 1:
                raise MindSigmaError(f"{where}--{name.replace('_', '-')} must be at least 1, not {getattr(one, name)}")
        if one.seed < 0:
            raise MindSigmaError(f"{where}--seed must be at least 0, not {one.seed}")
        if one.mask is not None and one.image is None:
            raise MindSigmaError(f"{where}--mask needs --image, the picture that it belongs to")
        try:
            check_controls(one, any(row.args is one for row in rows))
        except MindSigmaError as error:
            raise MindSigmaError(f"{where}{error}") from None
    if os.environ.get("MS_WORKER_NUM") and not args.parallel and args.shard_prompts is None:
        raise MindSigmaError(
            "msrun started this: give --parallel or --shard-prompts, or each of its processes would draw the same"
        )
    if args.shard_prompts is not None:
        check_shards(args)
    elif args.rank is not None or args.ranks is not None:
        raise MindSigmaError("--rank and --ranks are for --shard-prompts")
    check_template(args.name_template)
    out = Path(args.out)
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".gif"):
        raise MindSigmaError(f"--out {out}: pictures are written as .png")
    if is_png(out) and count > 1:
        raise MindSigmaError(f"--out {out}: one file for {count} images; give a folder")
    require_files(rows)
    return judged(args)


def check_shards(args):
    """Raise for options that have no meaning where shards are written."""
    if args.shard_prompts < 1:
        raise MindSigmaError(f"--shard-prompts must be at least 1, not {args.shard_prompts}")
    if args.prompt or not args.prompts_file:
        raise MindSigmaError("--shard-prompts draws the prompts of --prompts-file, and no others")
    for name in ("parallel", "grid", "overwrite", "like", "warm_up"):
        if getattr(args, name):
            raise MindSigmaError(f"--{name.replace('_', '-')} is not for --shard-prompts")
    if args.name_template != DEFAULT or is_png(Path(args.out)):
        raise MindSigmaError(
            "--shard-prompts names its files itself; --out is their folder, --name-template is not used"
        )


def require_files(rows):
    """Raise for pictures to draw from that are not there, before anything is computed."""
    for row in rows:
        for path in pictures_of(row.args).values():
            with row.naming():
                open_regular(path).close()


def pictures_of(args):
    """dict name -> path of the pictures that one is drawn from, by what a PNG calls their checksums."""
    named = {name: getattr(args, name) for name in ("image", "mask") if getattr(args, name) is not None}
    several = args.control_image or ()
    return {**named, **{f"control_image {k}" if k else "control_image": path for k, path in enumerate(several)}}


def is_png(path):
    """Whether --out names one file rather than a folder."""
    return path.suffix.lower() == ".png"

"""Translate checkpoints and adapters between this project, diffusers and the official PyTorch code, without PyTorch.

python tools/convert.py PixArt-Sigma-XL-2-1024-MS.pth models/1024-MS/dit --to mindspore --dtype fp16 --verify
python tools/convert.py style.safetensors style-peft --to peft
"""

import argparse
import time

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say
from mindsigma.progress import bar, duration

TARGETS = ("mindspore", "diffusers", "official", "peft", "kohya")
MOST_GIGABYTES = 1e6
MOST_SCALE = 1e4  # that a config may hold
SHOWN = 3  # names listed for each kind of change


class ListReleased(argparse.Action):
    """--list: print the released models and end, whatever else is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        from mindsigma.weights.released import listing

        say(*listing().split("\n"))
        parser.exit()


class Inspect(argparse.Action):
    """--inspect: say what a file or folder holds and end, whatever else is missing."""

    def __call__(self, parser, namespace, values, option_string=None):
        from mindsigma.conversion.inspection import inspect

        say(*inspect(values))
        parser.exit()


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Translate PixArt-Sigma checkpoints; the source tells what it is.",
        "python tools/convert.py PixArt-Sigma-XL-2-1024-MS.pth models/1024-MS/dit --to mindspore --dtype fp16",
    )
    add = parser.add_argument
    add("source", help="weight file, folder of a network or pipeline, bundled or released name, or hub id")
    add("target", help="folder; or one .ckpt, .safetensors (mindspore; adapters), .pth (official) file")
    add("--list", action=ListReleased, nargs=0, help="print names, files, sizes and configs of the released models")
    add(
        "--inspect",
        action=Inspect,
        metavar="FILE",
        help="say what a file or folder holds, and end",
    )
    add("--to", required=True, choices=TARGETS, help="whose format to write; peft, kohya: adapters")
    add(
        "--component",
        choices=("dit", "vae", "t5", "controlnet", "pipeline"),
        help="that part alone; default all there is",
    )
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default as in the source")
    add("--ema", action="store_true", help="averaged weights of an official training checkpoint")
    add("--shard-size", type=float, default=10.0, metavar="GB", help="largest safetensors file of a folder")
    add("--overwrite", action="store_true", help="replace what stands at the target")
    add("--drop-unsupported", action="store_true", help="leave out what the target cannot hold instead of stopping")
    add("--dry-run", action="store_true", help="check everything that a run would refuse, print the table")
    add("--verify", action="store_true", help="read the result back and compare every tensor's checksum")
    add("--lora", action="append", metavar="FILE[:WEIGHT]", help="merge a LoRA or DoRA into the DiT; repeatable")
    add("--base", metavar="MODEL", help="of a ControlNet: what --to official writes beside it; of its LoRA: its base")
    group = parser.add_argument_group("what a bare DiT file does not tell")
    group.add_argument("--num-heads", type=int)
    group.add_argument("--input-size", type=int, help="latent side of the base resolution")
    group.add_argument("--pe-interpolation", type=float, help="scale of the position grid")
    group = parser.add_argument_group("changes for training from weak to strong; recorded in the result")
    group.add_argument("--kv-compression", metavar="conv:2:14-27", help="add key-value compression (Conv Avg Init)")
    group.add_argument("--grow-to", type=int, metavar="PIXELS", help="move the base resolution and the position scale")
    group.add_argument("--vae-scaling-factor", type=float, help="set the VAE's scaling factor")
    group.add_argument("--null-caption", metavar="FOLDER", help="null caption from this folder's T5 and tokenizer")
    group.add_argument("--caption-length", type=int, default=300, metavar="TOKENS", help="length of --null-caption")
    group.add_argument("--merge", metavar="SOURCE", help="mix in another DiT")
    group.add_argument("--merge-weight", type=float, default=0.5, help="share of --merge")
    return parser


def change(component, args):
    """Apply the options that change a checkpoint to the component they are about."""
    from mindsigma.conversion import surgery
    from mindsigma.conversion.component import open_source
    from mindsigma.conversion.targets import NUMPY

    if component.kind == "dit":
        if args.lora:
            component = surgery.add_adapters(component, args.lora, NUMPY.get(args.dtype))
        if args.merge:
            if not 0 <= args.merge_weight <= 1:
                raise MindSigmaError(f"--merge-weight must lie in 0 ... 1, not {args.merge_weight}")
            other = open_source(args.merge, "dit", **known_config(args)).components[0]
            component = surgery.merge(component, other, args.merge_weight, NUMPY.get(args.dtype))
        if args.kv_compression:
            component = surgery.compress_keys(component, args.kv_compression)
        if args.grow_to:
            component = surgery.grow_resolution(component, args.grow_to)
        if args.null_caption:
            component = surgery.set_null_caption(component, empty_prompt(args.null_caption, args.caption_length))
    elif component.kind == "vae" and args.vae_scaling_factor is not None:
        component = surgery.swap_vae(component, args.vae_scaling_factor)
    return component


def empty_prompt(folder, length):
    """T5's states of the empty prompt, float32 (length, d_model)."""
    from mindsigma.pipeline.text import TextEncoder
    from mindsigma.weights.loading import open_t5
    from mindsigma.weights.locate import locate
    from mindsigma.weights.tokenizer import Tokenizer

    if length < 1:
        raise MindSigmaError(f"--caption-length must be at least 1, not {length}")
    path = locate(folder)
    encode = TextEncoder(Tokenizer(path / "tokenizer"), open_t5(path, "fp32").load())
    return encode.empty_prompt(length)[0]


def known_config(args):
    """DiTConfig fields given on the command line."""
    names = ("num_heads", "input_size", "pe_interpolation")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def check(args, kinds, adapted=False):
    """Raise for options that no component of the source is about; adapted: it is an adapter of a ControlNet."""
    if args.to in ("peft", "kohya"):
        raise MindSigmaError(f"--to {args.to} is for adapters, but {args.source} holds a network: {', '.join(kinds)}")
    about = {"dit": ("lora", "merge", "kv_compression", "grow_to", "null_caption"), "vae": ("vae_scaling_factor",)}
    for kind, names in about.items():
        for name in names:
            if getattr(args, name) is not None and kind not in kinds:
                raise MindSigmaError(f"--{name.replace('_', '-')} is about a {kind}, which {args.source} does not hold")
    if args.base is not None and not adapted and (args.to != "official" or kinds != ["controlnet"]):
        raise MindSigmaError(
            f"--base is for a ControlNet alone, with --to official; {args.source} has {', '.join(kinds)}"
        )
    if not 0 < args.shard_size <= MOST_GIGABYTES:
        raise MindSigmaError(f"--shard-size must be positive and at most {MOST_GIGABYTES:.0e}, not {args.shard_size}")
    factor = args.vae_scaling_factor
    if factor is not None and not 0 < factor <= MOST_SCALE:
        raise MindSigmaError(f"--vae-scaling-factor must be positive and at most {MOST_SCALE:.0e}, not {factor}")


def convert_adapter(args, path):
    """Translate an adapter instead of networks; returns the exit code."""
    from mindsigma.conversion import adapter_targets as adapters
    from mindsigma.conversion import writing as convert
    from mindsigma.weights.adapters.adapter_reader import open_adapter, ranks_text

    parser = build_parser()
    allowed = ("source", "target", "to", "dtype", "overwrite", "dry_run", "verify")
    for name, value in vars(args).items():
        if name not in allowed and value != parser.get_default(name):
            raise MindSigmaError(f"--{name.replace('_', '-')} is about networks, but {path} is an adapter")
    opened = open_adapter(path)
    convert.check_target(args.target, path)
    adapters.check_target(args.target, args.to, args.overwrite)
    adapter = adapters.prepare(opened.adapter, args.to, args.dtype)
    tensors = adapters.tensors_for(adapter, args.to)
    size = sum(array.nbytes for array in tensors.values())
    kind = ("DoRA" if adapter.dora else "LoRA") + (", rank-stabilised" if adapter.rslora else "")
    say(f"adapter: {path}")
    say(f"  kind     {kind}, {ranks_text(adapter)}, {len(adapter.entries)} modules")
    say(f"  mapped   {opened.tensors} tensors to {len(tensors)} names, {size / 1e6:.3f} MB")
    shown(("dropped", opened.dropped), ("left out", [f"header's {key}" for key in opened.texts]))
    for line in adapter.record:
        say(f"  changed  {line}")
    if args.dry_run:
        say("dry run: nothing written")
        return 0
    written = adapters.write(adapter, args.target, args.to, args.overwrite)
    if args.verify:
        say(f"verified {adapters.verify(adapter, written)} modules")
    say(args.target)
    return 0


def describe(output, size):
    """The table of one component: what was mapped, dropped, made, changed."""
    component = output.component
    made = set(component.made)
    mapped = sum(name not in made for name in component.view.names())
    say(f"{component.kind}: {component.path}")
    say(f"  mapped   {mapped} tensors to {len(output.view.names())} names, {size / 1e9:.3f} GB")
    shown(("dropped", component.dropped), ("made", component.made))
    for line in component.record:
        say(f"  changed  {line}")


def shown(*kinds):
    """Print the first names of each (word, names)."""
    for word, names in kinds:
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            say(f"  {word:<8} {len(names)}: {', '.join(names[:SHOWN])}{more}")


def main():
    """Parse, translate, verify; returns the exit code."""
    args = build_parser().parse_args()
    from mindsigma.conversion import writing as convert
    from mindsigma.conversion.component import FOLDERS, adapted_copies, open_source, with_base
    from mindsigma.conversion.targets import joined, prepare
    from mindsigma.weights.adapters.adapter_reader import is_adapter, is_controlnet_adapter
    from mindsigma.weights.locate import locate

    path = locate(args.source, FOLDERS.get(args.component))
    adapted = is_controlnet_adapter(path)
    if adapted:
        source = adapted_copies(path, args.base, **known_config(args))
    elif is_adapter(path):
        return convert_adapter(args, path)
    else:
        source = open_source(args.source, args.component, args.ema, **known_config(args))
    convert.check_target(args.target, source.path)
    check(args, [component.kind for component in source.components], adapted)
    components = source.components
    if args.base is not None and args.to == "official":
        components = with_base(components, args.base, **known_config(args))
    outputs = [prepare(change(component, args), args.to, args.dtype, args.drop_unsupported) for component in components]
    sizes = [convert.size_of(output.view) for output in outputs]
    for output, size in zip(outputs, sizes):
        describe(output, size)
    for line in source.left:
        say(f"left out: {line}")
    if args.to == "official":
        outputs = joined(outputs)
        sizes = [convert.size_of(output.view) for output in outputs]
    whole = args.component in (None, "pipeline")
    if any(output.component.kind == "t5" for output in outputs) and len(outputs) > 1 and source.tokenizer is None:
        say(f"no tokenizer in {source.path}: put T5's spiece.model or tokenizer.json into {args.target}/tokenizer")
    tokenizer = source.tokenizer if whole else None
    where = (outputs, args.target, args.to, tokenizer, args.overwrite, int(args.shard_size * 1e9))
    convert.check(*where)
    if args.dry_run:
        with bar(sum(sizes), "check", "B", unit_scale=True) as done:
            convert.check_values(outputs, done.update)
        say("dry run: nothing written")
        return 0
    start = time.perf_counter()
    with bar(sum(sizes), "write", "B", unit_scale=True) as done:
        written = convert.write(*where, done.update)
    seconds = time.perf_counter() - start
    say(f"wrote {sum(sizes) / 1e9:.3f} GB in {duration(seconds)} ({sum(sizes) / 1e6 / max(seconds, 1e-9):.0f} MB/s)")
    if args.verify:
        with bar(sum(sizes), "verify", "B", unit_scale=True) as done:
            count = sum(convert.verify(output, path, args.dtype, done.update) for output, path in zip(outputs, written))
        say(f"verified {count} tensors")
    say(args.target)
    return 0


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

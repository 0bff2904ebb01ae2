"""Options of tools/evaluate.py: of its subcommands, and of drawing, which several share."""

import argparse

from mindsigma import command_line
from mindsigma.errors import MindSigmaError
from mindsigma.sampling.options import add_arguments as add_sampling_arguments

COMMANDS = {
    "textatlas": "draw TextAtlasEval's prompts and count the words that can be read",
    "fid": "Fréchet distance of two folders by Inception's features",
    "kid": "kernel Inception distance of two folders",
    "cmmd": "maximum mean discrepancy of two folders by CLIP's features",
    "precision-recall": "improved precision and recall of two folders by Inception's features",
    "clip": "CLIP score of pictures and their prompts",
    "statistics": "store a folder's mean and covariance, and features if asked, for later comparisons",
    "draw": "draw another benchmark's prompts into the layout that its scorer reads",
}
ENGINES = ("rapidocr", "paddleocr", "tesseract")
RESIZES = ("pytorch-fid", "clean", "textatlas")
BENCHMARKS = ("geneval", "dpg-bench", "t2i-compbench", "mjhq-30k", "coco-30k")
CLIP = "openai/clip-vit-base-patch32"


def usage():
    """What is printed without a subcommand."""
    lines = [f"  {name:<17} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: evaluate.py COMMAND [options]; COMMAND --help lists its options", *lines])


def build_parser(command):
    """The parser of one subcommand; `--config` may set any of its options."""
    parser = command_line.parser(
        f"{COMMANDS[command][0].upper()}{COMMANDS[command][1:]}.",
        prog=f"evaluate.py {command}",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="options from a file (configs/evaluate/); flags override it"
    )
    {"textatlas": _textatlas, "clip": _clip, "statistics": _statistics, "draw": _draw}.get(command, _pair)(
        parser, command
    )
    parser.add_argument("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    return parser


def _textatlas(parser, command):
    add = parser.add_argument
    add("--data", required=True, metavar="PATH", help="TextAtlasEval's folder, file or hub id; or a JSON list")
    add("--output", required=True, metavar="FOLDER", help="pictures, measurements and results; run again, it goes on")
    add("--subset", nargs="+", default=[], metavar="NAME", help="default all")
    add("--limit", type=int, metavar="N", help="the first prompts of each subset alone")
    add("--images", metavar="FOLDER", help="score these pictures, SUBSET/image_path, instead of drawing")
    add("--reference", action="store_true", help="score the data's own pictures: what the OCR can reach")
    add("--vae", metavar="MODEL", help="with --reference: encoded and decoded by its VAE, the ceiling of its networks")
    add("--partial", action="store_true", help="score the pictures that are there, though some are missing")
    add("--name", metavar="TEXT", help="what the row is called; default the model or the folder")
    add("--ocr", choices=ENGINES, default="rapidocr")
    add("--ocr-setting", action="append", default=[], metavar="KEY=VALUE", help="of the engine; repeatable")
    add("--clip", metavar="MODEL", help=f"folder or hub id, as {CLIP}: also the CLIP score")
    add("--inception", metavar="FILE.pth", help="torchvision's Inception v3: also FID as TextAtlas computes it")
    add("--sheet", type=int, default=24, metavar="N", help="pictures on the contact sheet")
    _drawing(parser)


def _draw(parser, command):
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS)
    add("--prompts", required=True, metavar="PATH", help="the benchmark's prompt file or folder")
    add("--output", required=True, metavar="FOLDER", help="run again, it goes on")
    add("--limit", type=int, metavar="N", help="the first pictures alone")
    add("--images-per-prompt", type=int, metavar="N", help="default the benchmark's")
    _drawing(parser)


def _drawing(parser):
    group = parser.add_argument_group("drawing")
    add = group.add_argument
    add("--model", help="bundled name, folder, hub id, or DiT weight file")
    add("--components", help="folder or hub id with vae/, text_encoder/, tokenizer/, if --model is a weight file")
    add("--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="adapter to merge; repeatable")
    add("--negative-prompt", default="", help="what to lead away from")
    add("--seed", type=int, default=0, help="prompt i of a subset is drawn from seed + i")
    add("--batch-size", type=int, default=1, help="images drawn at once")
    add("--convention", choices=("diffusers", "official"), default="diffusers", help="whose sampler to reproduce")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on the CPU, fp16 on Ascend")
    add(
        "--text-encoder-memory",
        choices=("whole", "layers", "int8"),
        default="whole",
        help="T5 in memory, or read layer by layer for every text (exact, slower), or as int8 (approximate)",
    )
    add_sampling_arguments(parser)
    parser.set_defaults(image=None, mask=None, controlnet=None)  # nothing is drawn from pictures


def _pair(parser, command):
    add = parser.add_argument
    add("--images", required=True, metavar="PATH", help="folder of images, or .npz of `statistics`")
    add("--reference", required=True, metavar="PATH", help="the same, of what they are compared with")
    if command == "cmmd":
        add("--clip", default="openai/clip-vit-large-patch14-336", metavar="MODEL", help="folder or hub id")
    else:
        _inception(parser)
    if command == "kid":
        add("--subsets", type=int, default=100)
        add("--subset-size", type=int, default=1000)
        add("--seed", type=int, default=0)
    if command == "precision-recall":
        add("--neighbours", type=int, default=3)
    add("--batch-size", type=int, default=32)
    add("--json", metavar="FILE", help="also write the result there")


def _inception(parser):
    add = parser.add_argument
    add("--inception", metavar="FILE.pth", help="weights; needed unless both sides are .npz files")
    add("--resize", choices=RESIZES, default="pytorch-fid", help="textatlas takes torchvision's network")


def _statistics(parser, command):
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER")
    add("--output", required=True, metavar="FILE.npz", help="mu and sigma, as pytorch-fid and clean-fid read them")
    add("--features", action="store_true", help="store the features, too, which kid and precision-recall need")
    _inception(parser)
    add("--batch-size", type=int, default=32)


def _clip(parser, command):
    add = parser.add_argument
    add(
        "--images",
        required=True,
        metavar="FOLDER",
        help="pictures that hold their prompt, or have NAME.txt beside them",
    )
    add("--clip", default=CLIP, metavar="MODEL", help="folder or hub id")
    add("--batch-size", type=int, default=32)
    add("--json", metavar="FILE", help="also write the result there")


def check(args):
    """Raise for values that cannot be meant."""
    least = {"limit": 1, "batch_size": 1, "subsets": 1, "subset_size": 2, "neighbours": 1, "sheet": 0, "seed": 0}
    least.update(images_per_prompt=1, steps=1, max_sequence_length=1)
    for name, smallest in least.items():
        value = getattr(args, name, None)
        if value is not None and value < smallest:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least {smallest}, not {value}")

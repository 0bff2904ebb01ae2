"""Draw pictures on a web page.

python tools/web.py
"""

from pathlib import Path

from mindsigma import command_line
from mindsigma.errors import MindSigmaError, say

LOCAL = ("127.0.0.1", "localhost", "::1")


def build_parser():
    """The options of this tool."""
    parser = command_line.parser(
        "Draw pictures on a web page: prompts, samplers, adapters, drawing from a picture, painted masks.",
        "python tools/web.py --model sigma-mini",
    )
    add = parser.add_argument_group("the models").add_argument
    add("--config", metavar="FILE.yaml", help="options from a file; flags override it")
    add(
        "--model", action="append", metavar="MODEL", help="as of tools/generate.py; repeatable, the first is opened "
        "first; default sigma-mini",
    )  # fmt: skip
    add("--components", help="folder or hub id with vae/, text_encoder/, tokenizer/, for models without them")
    add("--lora", action="append", default=[], metavar="FILE", help="adapter that users may choose; repeatable")
    add(
        "--controlnet", action="append", default=[], metavar="FOLDER", help="ControlNet that users may choose; "
        "repeatable, each must fit all models",
    )  # fmt: skip
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="default fp32 on the CPU, fp16 on Ascend")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")
    add(
        "--text-encoder-memory", choices=("whole", "layers", "int8"), default="whole",
        help="T5 in memory, or read layer by layer for every text (exact, slower), or as int8 (approximate)",
    )  # fmt: skip
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others in, who then need no password")
    add("--port", type=int, default=7860, help="port to listen on")
    add("--waiting", type=int, default=16, help="drawings that may wait; more are refused")
    add("--pictures", type=int, default=8, help="pictures of one drawing at most")
    add("--steps", type=int, default=100, help="steps of one drawing at most")
    add("--pixels", type=int, default=4096 * 4096, help="pixels of a picture, drawn or uploaded, at most")
    add("--upload", type=int, default=20, metavar="MB", help="size of an uploaded file at most")
    add("--preview-every", type=int, default=1, metavar="N", help="steps between two previews; 0: none")
    return parser


def labels_of(paths):
    """dict label -> what was given: the last part of each path or name, numbered where two are the same."""
    labels = {}
    for path in paths:
        text = str(path).rstrip("/")
        label = name = Path(text).name if Path(text).exists() else text
        number = 1
        while label in labels:
            number += 1
            label = f"{name} ({number})"
        labels[label] = path
    return labels


def check(args):
    """Raise for option values that cannot be meant."""
    for name in ("waiting", "pictures", "steps", "pixels", "upload"):
        if getattr(args, name) < 1:
            raise MindSigmaError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not args.preview_every >= 0:
        raise MindSigmaError(f"--preview-every must be at least 0, not {args.preview_every}")
    if not 0 <= args.port < 65536:
        raise MindSigmaError(f"--port must be 0 ... 65535, not {args.port}")


def main():
    """Parse, open the first model, serve until Ctrl-C or SIGTERM; returns the exit code."""
    from mindsigma.config_file import parse_with_config

    args = parse_with_config(build_parser())
    check(args)
    try:
        import gradio  # noqa: F401, so that its absence is told before a model is opened
    except ImportError:
        raise MindSigmaError("the web page needs gradio: pip install 'mindsigma[web]'") from None
    asked = command_line.asked_to_end()  # before there are other threads, which then leave the signal to it
    from mindsigma.web.page import serve

    page = serve(args)
    say(*page.studio.needed(), f"open {page.address} in a browser; Ctrl-C ends")
    if args.host not in LOCAL:
        say("note: others can reach this page; it has no passwords and no encryption of its own (SECURITY.md)")
    page.wait(asked)
    return 0


def run():
    """`main` as a command: one line and exit code 2 for what the user can mend."""
    command_line.run(main)

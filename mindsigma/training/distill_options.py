"""Options of tools/distill.py: those of every run, and those of the methods of distillation."""

from mindsigma import command_line
from mindsigma.errors import MindSigmaError
from mindsigma.training.methods import DISTILLATIONS, method_class
from mindsigma.training.run_options import add_options


def build_parser():
    """The parser of tools/distill.py."""
    parser = command_line.parser("Distil PixArt-Sigma into a network that draws in a few steps, or in one.")
    parser.add_argument("--method", required=True, choices=DISTILLATIONS, help="latent consistency, or one step by DMD")
    add_options(parser)
    for name in DISTILLATIONS:
        method_class(name).add_options(parser.add_argument_group(f"--method {name}"))
    # What a method decides where the user does not.
    parser.set_defaults(**dict.fromkeys(method_class(DISTILLATIONS[0]).defaults), caption_dropout=0.0)
    return parser


def complete(args):
    """Give the options that were left out the method's values; raise MindSigmaError for options of the other one."""
    parser = build_parser()
    for other in DISTILLATIONS:
        prefix = f"{other}_"
        for name, value in vars(args).items():
            if name.startswith(prefix) and other != args.method and value != parser.get_default(name):
                raise MindSigmaError(f"--{name.replace('_', '-')} belongs to --method {other}, not to {args.method}")
    for name, value in method_class(args.method).defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args

"""Options of tools/distill.py: those of every run, and those of the methods of distillation."""

from mindsigma import command_line
from mindsigma.choices import DMD_REGRESSIONS, LCM_LOSSES, LCM_WEIGHTINGS
from mindsigma.errors import MindSigmaError
from mindsigma.training.methods import DISTILLATIONS
from mindsigma.training.run_options import add_options

# What a method decides where the user does not.
DEFAULTS = {
    "lcm": {"ema_decay": 0.95, "null_mask": "caption", "sample_sampler": "lcm"},
    "dmd": {"ema_decay": 0.0, "null_mask": "own", "sample_sampler": "one-step"},
}


def build_parser():
    """The parser of tools/distill.py."""
    parser = command_line.parser(
        "Distil PixArt-Sigma into a network that draws in a few steps, or in one.",
        "python tools/distill.py --config configs/train/distill-lcm-sigma-mini.yaml --data features --output runs/lcm",
        usage="%(prog)s [options] --method METHOD --data PATH --output FOLDER",
    )
    parser.add_argument("--method", required=True, choices=DISTILLATIONS, help="latent consistency, or one step by DMD")
    add_options(parser)
    _add_lcm(parser.add_argument_group("--method lcm").add_argument)
    _add_dmd(parser.add_argument_group("--method dmd").add_argument)
    parser.set_defaults(**dict.fromkeys(DEFAULTS["lcm"]), caption_dropout=0.0)
    return parser


def _add_lcm(add):
    guidance = "w of the teacher, a guidance scale of 1 + w; two: drawn between them for each sample"
    add("--lcm-guidance", type=float, nargs="+", default=[4.5], metavar="W", help=guidance)
    add("--lcm-loss", choices=LCM_LOSSES, default="huber")
    add("--lcm-huber", type=float, default=0.001, metavar="C", help="sqrt(x² + C²) - C")
    weighting = "multiply each sample's loss by its signal, so that the noisiest do not outweigh all others"
    add("--lcm-weighting", choices=LCM_WEIGHTINGS, default="none", help=weighting)
    add("--lcm-grid", type=int, default=50, metavar="N", help="points of the grid of times")
    add("--lcm-skip", type=int, default=1, metavar="N", help="points that the teacher goes back")
    add("--lcm-substeps", type=int, default=1, metavar="N", help="steps that it takes for that")


def _add_dmd(add):
    add("--dmd-time", type=int, default=400, metavar="T", help="time that the generator is told")
    add("--dmd-guidance", type=float, default=3.0, help="guidance scale of the teacher")
    add("--dmd-last", type=int, default=999, metavar="T", help="scores are compared at 1 ... T - 1")
    gamma = "weight the gradient by min(snr, G) / snr instead of by the teacher's error"
    add("--dmd-snr-gamma", type=float, metavar="G", help=gamma)
    regression = "to what the teacher drew of the same noise, as latents or, lpips, as pictures; --data is then what "
    regression += "tools/make_pairs.py wrote"
    add("--dmd-regression", choices=DMD_REGRESSIONS, default="none", help=regression)
    add("--dmd-regression-weight", type=float, default=0.25)
    files = "of --dmd-regression lpips: torchvision's VGG16 and the heads of the package lpips, in two files or in one"
    add("--lpips-weights", nargs="+", metavar="FILE", help=files)
    add("--dmd-fake-learning-rate", type=float, help="of the fake score; default the generator's")
    add("--dmd-fake-warmup", type=int, help="its steps of warm-up; default the generator's")


def complete(args):
    """Give the options that were left out the method's values; raise MindSigmaError for options of the other one."""
    parser = build_parser()
    for other in DISTILLATIONS:
        prefix = f"{other}_"
        for name, value in vars(args).items():
            if name.startswith(prefix) and other != args.method and value != parser.get_default(name):
                raise MindSigmaError(f"--{name.replace('_', '-')} belongs to --method {other}, not to {args.method}")
    if args.lpips_weights and args.dmd_regression != "lpips":
        raise MindSigmaError("--lpips-weights belongs to --method dmd --dmd-regression lpips")
    for name, value in DEFAULTS[args.method].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args

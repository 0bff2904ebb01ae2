"""Options of every training run, for the command line and for YAML files, and which of them cannot be meant."""

import math

from mindsigma import command_line
from mindsigma.choices import (
    INCOMPLETE,
    LORA_TARGETS,
    MAX_BAD_IMAGES,
    NULL_MASKS,
    OPTIMIZERS,
    TABLE_NAMES,
    WEIGHTINGS,
    ZERO_STAGES,
)
from mindsigma.config_file import Unnamed
from mindsigma.errors import MindSigmaError
from mindsigma.sampling import SAMPLERS
from mindsigma.training.condition_options import add_condition
from mindsigma.training.learning_rate import AUTO, SCHEDULES, learning_rate
from mindsigma.training.methods import method_of
from mindsigma.training.trackers import TRACKERS

# Options that may differ between a run and its continuation: they change what is reported or kept, or are compared as
# what they lead to: the global batch, the fingerprint of the data, the shapes of the weights.
FREE = (
    "data", "class_data", "model", "components", "batch_size", "accumulation",
    "config", "output", "steps", "save_every", "keep", "save_in_background",
    "log_every", "validate_every", "validation_data", "overwrite",
    "validation_points", "validation_batches", "prompts", "sample_every", "sample_sampler", "sample_steps",
    "sample_guidance", "sample_pag_scale", "sample_pag_layers", "threads",
    "sample_height", "sample_width", "tensorboard", "device", "max_skipped", "zero", "zero_group", "max_bad_images",
    "accept_new_data", "tracker",
    "evaluate", "evaluate_every",
    # What a method tells of these, see Method.identity.
    "controlnet_layers", "init_controlnet", "condition", "condition_folder", "condition_dropout", "control_images",
    "lpips_weights",
)  # fmt: skip

# Options that may change when a run goes on: the change is recorded in its checkpoints.
MAY_CHANGE = ("learning_rate", "auto_lr", "lr_schedule", "lr_final", "warmup")
PLANNED = ("steps", "save_every")  # free ones whose changes are recorded, too

# Why the others may not, by what they decide.
_BATCHES = "batches and noise follow from it, so the steps that are left would not be those of this run"
_STATES = "the optimiser's states and averages in the checkpoint belong to it"
_NETWORK = "the weights in the checkpoint are those of another network or adapter"
_LOSS = "the steps before and after would minimise different losses"
REASONS = {
    **dict.fromkeys(
        (
            "seed",
            "batch",
            "data",
            "class_data",
            "resolution",
            "multi_scale",
            "table",
            "incomplete",
            "flip",
            "max_length",
        ),
        _BATCHES,
    ),
    **dict.fromkeys(("real_prompt_ratio", "caption_dropout", "null_mask", "class_prompt", "class_count"), _BATCHES),
    **dict.fromkeys(("optimizer", "betas", "eps", "ema_decay", "weight_decay", "max_norm", "loss_scale"), _STATES),
    **dict.fromkeys(("fresh", "kv_compression", "kv_init", "grow_to", "position_scale", "input_size"), _NETWORK),
    **dict.fromkeys(("pe_interpolation", "lora_rank", "lora_alpha", "lora_targets", "rslora", "dora"), _NETWORK),
    **dict.fromkeys(("init_lora", "method", "base", "controlnet_layers", "init_controlnet"), _NETWORK),
    **dict.fromkeys(("condition", "condition_dropout"), _BATCHES),
    **dict.fromkeys(("snr_loss", "loss_weighting", "snr_gamma", "prior_weight", "lpips"), _LOSS),
    **dict.fromkeys(("dtype", "fp32_attention", "recompute"), "other roundings than an unbroken run's would follow"),
}

AT_LEAST_1 = (
    "steps", "batch_size", "accumulation", "max_length", "threads", "save_every", "keep", "log_every", "max_skipped",
    "validate_every", "validation_points", "validation_batches", "sample_every", "sample_steps",
    "evaluate_every", "controlnet_layers", "zero_group",
)  # fmt: skip
NOT_NEGATIVE = (
    "learning_rate",
    "warmup",
    "max_norm",
    "weight_decay",
    "loss_scale",
    "seed",
    "sample_guidance",
    "sample_pag_scale",
    "max_bad_images",
)


def build_parser():
    """The parser of tools/train.py."""
    parser = command_line.parser(
        "Train PixArt-Sigma from captioned images or from stored features.",
        "python tools/train.py --config configs/train/sigma-mini.yaml --data features --output runs/first",
        usage="%(prog)s [options] --data PATH --output FOLDER",
    )
    add_options(parser)
    add_denoising_options(parser)
    _add_controlnet_options(parser)
    return parser


def add_denoising_options(parser):
    """Add the options of the ordinary training."""
    add = parser.add_argument_group("loss").add_argument
    add("--snr-loss", action="store_true", help="compare clean latents up to timestep 249")
    add("--loss-weighting", choices=WEIGHTINGS, default="none")
    add("--snr-gamma", type=float, default=5.0, help="of min-snr")

    add = parser.add_argument_group("prior preservation (DreamBooth)").add_argument
    add("--class-data", metavar="PATH", help="images or features of the class, as many a step as of --data")
    add("--class-prompt", metavar="TEXT", help="draw what is missing of --class-count images, before the first step")
    add("--class-count", type=int, default=100, help="images of --class-prompt")
    add("--prior-weight", type=float, default=1.0, help="of the loss on the class's images")


def _add_controlnet_options(parser):
    add = parser.add_argument_group("ControlNet").add_argument
    add("--method", choices=("controlnet",), help="train a ControlNet beside --model, which is frozen, instead of it")
    add("--controlnet-layers", type=int, metavar="N", help="blocks that it copies; default 13 of 28, 3 of 8")
    add("--init-controlnet", metavar="FOLDER", help="go on from this one instead of a fresh one")
    add_condition(add, "; features hold theirs")
    add("--condition-dropout", type=float, default=0.0, help="share of conditions whose latents give way to zeros")
    add("--control-images", nargs="+", default=[], metavar="FILE", help="conditions of --prompts: one, or one for each")


def add_options(parser):
    """Add the options of every run, whatever the method."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file of these options; flags win")
    add("--output", required=True, metavar="FOLDER", help="folder of the run; one that holds checkpoints is resumed")
    add("--overwrite", action="store_true", help="start again although the folder holds a run")
    add("--device", choices=("CPU", "Ascend"), help="default what MindSpore finds")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", required=True, metavar="PATH", help="images of any layout, or a folder of tools/extract_features.py")
    new = "go on although records were added: from there on batches are drawn from all, so that the run is no more the "
    new += "one that an unbroken start would have been, bit for bit, and the current epoch is dealt anew"
    add("--accept-new-data", action="store_true", help=new)
    add("--resolution", type=int, default=256, help="pixels a side of the base size")
    add("--multi-scale", action="store_true", help="buckets of aspect ratios instead of squares")
    add("--table", choices=TABLE_NAMES, default="training", help="table of the buckets")
    add("--incomplete", choices=INCOMPLETE, default="repeat", help="last batch of a bucket")
    add("--real-prompt-ratio", type=float, default=0.5, help="share of short captions where there are long ones too")
    add("--caption-dropout", type=float, default=0.1, help="share of captions that give way to the null caption")
    add("--null-mask", choices=NULL_MASKS, default="caption", help="mask of a dropped caption")
    add("--max-length", type=int, default=300, help="tokens that captions are padded to")
    add("--flip", type=float, default=0.0, help="share of images mirrored; captions stay as they are")
    add("--threads", type=int, default=4, help="images read at once")
    bad = "images that may turn out bad, each process counting its own; others take their places. 0: stop at the first"
    add("--max-bad-images", type=int, default=MAX_BAD_IMAGES, metavar="N", help=bad)

    group = parser.add_argument_group("network")
    add = group.add_argument
    add(
        "--model", default=Unnamed("sigma-mini"), help="DiT to begin from: released name, folder, weight file or hub id"
    )
    add("--components", help="folder or hub id with VAE, T5 and tokenizer; default --model")
    add("--fresh", action="store_true", help="random weights of --model's shape")
    add("--input-size", type=int, help="latent side of the base resolution, where the file does not tell")
    add("--pe-interpolation", type=float, help="scale of the position grid, where the file does not tell")
    add("--kv-compression", metavar="conv:2:14-27", help="add key-value compression to the checkpoint")
    add("--kv-init", choices=("average", "random"), default="average", help="of its convolutions")
    add("--grow-to", type=int, metavar="PIXELS", help="move the base resolution")
    add("--position-scale", choices=("interpolate", "keep"), default="interpolate", help="position grid of --grow-to")

    group = parser.add_argument_group("adapter")
    add = group.add_argument
    add("--lora-rank", type=int, metavar="N", help="train a LoRA of this rank beside the network's weights")
    add("--lora-alpha", type=float, help="the change counts alpha / rank times; default the rank")
    add("--lora-targets", nargs="+", metavar="NAME", help=f"layers, such as {' '.join(LORA_TARGETS)} (the default)")
    add("--rslora", action="store_true", help="alpha / sqrt(rank) instead of alpha / rank")
    add("--dora", action="store_true", help="train magnitudes, too")
    add("--init-lora", metavar="FILE", help="go on from a LoRA or DoRA of any format instead; it tells rank and layers")

    group = parser.add_argument_group("step")
    add = group.add_argument
    add("--steps", type=int, default=1000, help="steps of the whole run")
    add("--batch-size", type=int, default=4, help="images of a micro-batch of one process")
    add("--accumulation", type=int, default=1, help="micro-batches a step")
    add("--optimizer", choices=tuple(OPTIMIZERS), default="came")
    add("--learning-rate", type=float, default=2e-5)
    add("--betas", type=float, nargs="+", help="default the optimiser's usual ones")
    add("--eps", type=float, nargs="+", help="default the optimiser's usual ones")
    add("--weight-decay", type=float, default=0.0)
    add("--auto-lr", choices=AUTO, default="none", help="scale the learning rate with the batch, of which 256 is 1")
    add("--lr-schedule", choices=SCHEDULES, default="constant")
    add("--lr-final", type=float, default=0.0, help="share of the learning rate that cosine and linear end at")
    add("--warmup", type=int, default=0, help="steps until the learning rate is reached")
    add("--max-norm", type=float, default=0.01, help="clip the gradient to this global norm; 0: never")
    add("--ema-decay", type=float, default=0.0, help="keep a moving average of the weights; 0: none")
    add("--dtype", choices=("fp32", "fp16", "bf16"), help="of activations; weights are fp32. Default fp32 on a CPU")
    add("--fp32-attention", action="store_true", help="self-attention in fp32 whatever the dtype")
    add("--loss-scale", type=float, help="first dynamic loss scale; default 65536 for fp16, else none")
    add("--recompute", action="store_true", help="compute each block again in the backward pass: less memory")
    divided = "what the processes divide (ZeRO): 1 the optimiser's states, 2 also gradients, 3 also weights (Ascend)"
    add("--zero", type=int, choices=ZERO_STAGES, default=0, help=divided)
    groups = "processes that divide among themselves, such as the cards of a server; default all (Ascend)"
    add("--zero-group", type=int, metavar="N", help=groups)
    add("--max-skipped", type=int, default=20, help="stop after so many steps in a row without finite gradients")
    add("--seed", type=int, default=43)

    group = parser.add_argument_group("what is kept and shown")
    add = group.add_argument
    add("--save-every", type=int, default=1000, help="steps between checkpoints")
    background = "go on training while a thread writes a copy of the checkpoint, which needs the memory for it"
    add("--save-in-background", action="store_true", help=background)
    add("--keep", type=int, default=3, help="latest checkpoints that are kept, besides the best")
    add("--log-every", type=int, default=10, help="steps between lines of the log")
    add("--validation-data", metavar="PATH", help="held-out images or features")
    add("--validate-every", type=int, default=500, help="steps between measurements of the held-out loss")
    add("--validation-points", type=int, default=4, help="timesteps a held-out image")
    add("--validation-batches", type=int, help="batches of held-out data; default all")
    add("--prompts", nargs="+", default=[], help="images of these are drawn while training")
    add("--sample-every", type=int, default=500, help="steps between them")
    add("--sample-sampler", choices=tuple(SAMPLERS), default="dpm", help="how to go from noise to the images")
    add("--sample-steps", type=int, help="sampling steps; default the sampler's own, 20 of dpm")
    add("--sample-guidance", type=float, help="guidance scale; default the sampler's own, 4.5 of dpm")
    add("--sample-pag-scale", type=float, default=0.0, help="of perturbed-attention guidance; 0 is none")
    add("--sample-pag-layers", metavar="LAYERS", help="its blocks, as in 14 or 3,13-15; default the middle one")
    add("--sample-height", type=int, help="default the base resolution")
    add("--sample-width", type=int, help="default the base resolution")
    add(
        "--evaluate",
        metavar="FILE.yaml",
        help="score the texts on pictures of fixed prompts; configs/evaluate/words.yaml",
    )
    add("--evaluate-every", type=int, default=500, help="steps between these scores")
    add("--tensorboard", action="store_true", help="write events for TensorBoard")
    add("--tracker", choices=TRACKERS, help="also report to Weights & Biases or SwanLab (extras: mindsigma[wandb])")


def check(args):
    """Raise for options that cannot be meant; what other parts check they are left to."""
    for name in AT_LEAST_1:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    for name in NOT_NEGATIVE:
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise MindSigmaError(f"--{name.replace('_', '-')} must be a number of at least 0, not {value}")
    if args.fresh and (args.kv_compression or args.grow_to):
        raise MindSigmaError("--fresh has no weights that --kv-compression or --grow-to could change")
    if args.zero_group is not None and not args.zero:
        raise MindSigmaError("--zero-group is of what --zero divides: give --zero 1, 2 or 3, too")
    if args.zero == 3 and not args.recompute:
        raise MindSigmaError("--zero 3 gathers the weights of a block again in its backward pass: give --recompute")
    if args.zero == 3 and args.evaluate:
        raise MindSigmaError("--zero 3 computes in all processes at once, --evaluate in each for itself: use --zero 2")
    _check_adapter(args)
    method_of(args).check(args)
    learning_rate(args.steps, 1.0, args.lr_schedule, args.warmup, args.steps)


def _check_adapter(args):
    """Raise for options of adapters and of prior preservation that do not go together."""
    alone = {"--lora-alpha": args.lora_alpha, "--lora-targets": args.lora_targets}
    alone.update({"--rslora": args.rslora, "--dora": args.dora})
    given = [flag for flag, value in alone.items() if value]
    if args.init_lora and (args.lora_rank is not None or given):
        raise MindSigmaError(f"--init-lora tells rank and layers itself: leave out {(given or ['--lora-rank'])[0]}")
    if given and args.lora_rank is None:
        raise MindSigmaError(f"{given[0]} belongs to an adapter: give --lora-rank, too")
    if args.lora_rank is not None or args.init_lora:
        if args.zero == 3:
            raise MindSigmaError("--zero 3 divides the weights that learn, of which an adapter has few: use --zero 2")
        for name in ("fresh", "kv_compression", "grow_to"):
            if getattr(args, name):
                raise MindSigmaError(
                    f"--{name.replace('_', '-')} changes the network, which an adapter's file does not hold; train the "
                    "network, or write the changed one first (tools/convert.py)"
                )

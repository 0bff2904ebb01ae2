"""What a config of tools/train.py asks of a card: the training step that tools/plan.py plans."""

from mindsigma.config_file import parse_with_config
from mindsigma.errors import MindSigmaError
from mindsigma.training.run_options import build_parser


def of_recipe(file):
    """dict of fields of a Request (parts.py): the training step of a config.

    Raises:
        MindSigmaError: for a file that tools/train.py would refuse.
    """
    args = parse_with_config(build_parser(), ["--config", file, "--data", "data", "--output", "run"])
    if args.method == "controlnet" and not args.controlnet_layers:
        raise MindSigmaError(f"{file}: leaves open how many blocks the ControlNet has; name controlnet-layers")
    return {
        "part": "train",
        "model": str(args.model),
        "height": args.resolution,
        "width": args.resolution,
        "batch": args.batch_size,
        "tokens": args.max_length,
        "dtype": args.dtype or "fp16",
        "kv_compression": args.kv_compression,
        "optimizer": args.optimizer,
        "recompute": args.recompute,
        "ema": args.ema_decay > 0,
        "fp32_attention": args.fp32_attention,
        "control_layers": args.controlnet_layers or 0,
    }

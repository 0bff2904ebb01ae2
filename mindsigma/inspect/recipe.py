"""What a config of tools/train.py or tools/distill.py asks of a card: the training step that tools/plan.py plans."""

from mindsigma.config_file import given_value, parse_with_config
from mindsigma.errors import MindSigmaError
from mindsigma.training import distill_options, run_options
from mindsigma.training.methods import DISTILLATIONS


def of_recipe(file):
    """dict of fields of a Request (parts.py): the training step of a config.

    Raises:
        MindSigmaError: for a file that the tool it is for would refuse.
    """
    distils = given_value(file, "method") in DISTILLATIONS
    options = distill_options if distils else run_options
    args = parse_with_config(options.build_parser(), ["--config", str(file), "--data", "data", "--output", "run"])
    if distils:
        args = distill_options.complete(args)
    if not distils and args.method == "controlnet" and not args.controlnet_layers:
        raise MindSigmaError(f"{file}: leaves open how many blocks the ControlNet has; name controlnet-layers")
    prior = not distils and (args.class_data or args.class_prompt)
    return {
        "part": "train",
        "model": str(args.model),
        "height": args.resolution,
        "width": args.resolution,
        "batch": args.batch_size,
        "accumulation": args.accumulation * (2 if prior else 1),
        "tokens": args.max_length,
        "dtype": args.dtype or "fp16",
        "kv_compression": args.kv_compression,
        "optimizer": args.optimizer,
        "recompute": args.recompute,
        "ema": args.ema_decay > 0,
        "fp32_attention": args.fp32_attention,
        "method": args.method if distils else "denoising",
        "control_layers": 0 if distils else args.controlnet_layers or 0,
        "lora_rank": args.lora_rank,
        "lora_targets": args.lora_targets,
        "dora": args.dora,
        "lcm_substeps": args.lcm_substeps if distils else 1,
        "dmd_regression": args.dmd_regression if distils else "huber",
    }

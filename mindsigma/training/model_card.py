"""The model card beside every checkpoint of a run: what it is, how it was made, how to use it."""

import json
from pathlib import Path

from mindsigma import __version__
from mindsigma.errors import one_line

HOW = (
    "resolution", "multi_scale", "optimizer", "learning_rate", "lr_schedule", "warmup", "weight_decay", "max_norm",
    "ema_decay", "condition", "condition_dropout", "caption_dropout", "flip", "loss_weighting", "snr_loss",
    "prior_weight", "dtype", "seed",
)  # fmt: skip

# What a checkpoint holds: its tag, and the words for it.
KINDS = {
    "dit": (None, "All weights of a diffusion transformer"),
    "adapter.safetensors": ("lora", "An adapter ({summary})"),
    "controlnet": ("controlnet", "A {summary}, made for the diffusion transformer"),
}


def model_card(args, step, product, identity, records, changes=(), held_out=None, summary="", sampling=None):
    """Text of a card.

    Args:
        args: namespace of the run. step: of the checkpoint.
        product: "dit", "adapter.safetensors" or "controlnet", what the checkpoint holds.
        identity: dict of the run's options, with `batch`. records: number of records that it is trained on.
        changes: dicts of what was changed when the run went on. held_out: validation loss, or None.
        summary: a line about an adapter or a ControlNet.
        sampling: fields of SamplingOptions that the checkpoint tells of itself, or None.
    """
    tag, kind = KINDS[product]
    base, name = _shown(args.model), Path(args.output).name
    title = f"{one_line(name, 60)}, step {step}"
    head = {
        "library_name": "mindsigma",
        "pipeline_tag": "text-to-image",
        "base_model": base,
        "tags": ["pixart-sigma", "mindspore", *([tag] if tag else [])],
    }
    kind = kind.format(summary=summary)
    fresh = "random weights of the shape of " if args.fresh else ""
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items()), "---", ""]
    lines += [f"# {title}", "", f"{kind} of PixArt-Σ, trained by mindsigma {__version__} from {fresh}`{base}`.", ""]
    lines += ["## Training", "", "| | |", "|---|---|", f"| steps | {step} of {args.steps} |"]
    lines.append(f"| data | `{_shown(args.data)}`, {records} records |")
    lines.append(f"| images a step | {identity['batch']} |")
    if held_out is not None:
        lines.append(f"| validation loss | {held_out:.5f} |")
    lines += [f"| {key.replace('_', ' ')} | {_cell(identity.get(key))} |" for key in HOW if identity.get(key)]
    for change in changes:
        name, then, now = (one_line(change.get(key), 60) for key in ("option", "from", "to"))
        lines.append(f"| changed after step {one_line(change.get('step'), 12)} | {name}: {then} to {now} |")
    if sampling:
        lines.append(f"| made for sampler | {_sampler(sampling)} |")
    lines += ["", "## Use", "", "```bash", *_commands(product, base, args), "```", ""]
    lines += [
        "## To be filled in", "",
        "* Licence: that of the weights it began from, and of the data.",
        "* What it is for, what it is not for, and what it does badly.",
        "* What the data show, and who agreed to it.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _commands(product, base, args):
    draw = f'python tools/generate.py "a prompt" --model {base}'
    if product == "adapter.safetensors":
        return [f"{draw} --lora THIS_FOLDER/adapter.safetensors"]
    if product == "controlnet":
        part = "controlnet_ema" if args.ema_decay else "controlnet"
        return [f"{draw} --controlnet THIS_FOLDER/{part} --control-image FILE"]
    part = "ema" if args.ema_decay else "dit"
    components = _shown(args.components or args.model)
    return [
        f'python tools/generate.py "a prompt" --model THIS_FOLDER/{part} --components {components}',
        f"python tools/convert.py THIS_FOLDER/{part} OUT --to diffusers",
    ]


def _sampler(sampling):
    """A distilled checkpoint's settings in words; tools/generate.py takes them from the file."""
    steps = sampling["num_inference_steps"]
    times = "".join(f", at timestep {time}" for time in sampling.get("timesteps", ()))
    guidance = "no guidance" if sampling["guidance_scale"] <= 1 else f"guidance {sampling['guidance_scale']:g}"
    return f"`{sampling['sampler']}`, {steps} step{'s' * (steps > 1)}{times}, {guidance}; taken by default"


def _shown(name):
    """A model's or data set's name as strangers may see it: of a path on this machine its last part."""
    text = str(name)
    return one_line(Path(text).name if Path(text).exists() else text, 100)


def _cell(value):
    return one_line(value, 60).replace("|", "\\|")

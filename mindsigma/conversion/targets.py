"""What a component becomes: names, dtypes and files of each target, and the refusal of what a target cannot hold."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Dict

from mindsigma import __version__
from mindsigma.conversion.component import Component
from mindsigma.conversion.foreign_configs import diffusers_config
from mindsigma.errors import MindSigmaError
from mindsigma.models.embeddings import position_embedding
from mindsigma.weights.names import controlnet_names
from mindsigma.weights.names.dit_names import DIFFUSERS, NULL_CAPTION
from mindsigma.weights.names.views import Cast, Extended, Foreign, Joined, Without
from mindsigma.weights.sampling_header import header_texts
from mindsigma.weights.saving import NUMPY, own_header, stored_config

CLASSES = {"dit": "DiT", "vae": "VAE", "t5": "T5Encoder", "controlnet": "ControlNet"}
SUBFOLDERS = {
    "mindspore": {"dit": "dit", "vae": "vae", "t5": "text_encoder", "controlnet": "controlnet"},
    "diffusers": {"dit": "transformer", "vae": "vae", "t5": "text_encoder", "controlnet": "controlnet"},
}
STEMS = {
    "mindspore": dict.fromkeys(CLASSES, "model"),
    "diffusers": {**dict.fromkeys(CLASSES, "diffusion_pytorch_model"), "t5": "model"},
}


@dataclass
class Output:
    """A component ready to be written.

    Attributes:
        component: what it was made from, in the target's dtype and without what the target cannot hold.
        view: its tensors under the target's names.
        config: config.json beside the weights, or None.
        metadata: texts for the header of a safetensors file.
        beside: Component of a further network in the same file, or None.
    """

    component: Component
    view: Any
    config: Any
    metadata: Dict[str, str]
    beside: Any = None


def prepare(component, target, dtype=None, drop_unsupported=False):
    """Bring a component into the form of a target.

    Args:
        dtype: "fp32", "fp16", "bf16" or None to keep what the source has.
        drop_unsupported: leave out what the target cannot hold instead of raising.
    """
    if dtype is not None:
        component = component.changed(f"dtype {dtype}", view=Cast(component.view, NUMPY[dtype]))
    if target == "mindspore":
        return Output(component, component.view, own_config(component), own_metadata(component))
    if target == "official":
        return _official(component)
    if component.kind == "controlnet":
        return _diffusers_controlnet(component)
    return _diffusers(component, drop_unsupported)


def joined(outputs):
    """Outputs of a DiT and a ControlNet for "official" as one: the official code keeps both in one file."""
    kinds = [output.component.kind for output in outputs]
    if "controlnet" not in kinds:
        return outputs
    if sorted(kinds) != ["controlnet", "dit"]:
        path = outputs[kinds.index("controlnet")].component.path
        raise MindSigmaError(
            f"{path}: the official code keeps a ControlNet in one file with its base; name the base (--base MODEL)"
        )
    base, control = (outputs[kinds.index(kind)] for kind in ("dit", "controlnet"))
    control.component.config.check_base(base.component.config)
    component = replace(control.component, inputs=[*control.component.inputs, *base.component.inputs])
    view = Joined({"base_model.": base.view, "": control.view})
    return [replace(control, component=component, view=view, beside=base.component)]


def own_config(component):
    """config.json of this project's format."""
    return stored_config(CLASSES[component.kind], component.config)


def own_metadata(component):
    """Header of this project's safetensors files: where the weights came from and what was done to them."""
    return own_header(
        own_config(component),
        version=__version__,
        kind=component.kind,
        source=component.path.name,
        record=json.dumps(component.record),
        **header_texts(component.sampling),
    )


def _official(component):
    if component.kind == "controlnet":
        return Output(component, Foreign(component.view, controlnet_names.OFFICIAL), None, {})
    if component.kind != "dit":
        raise MindSigmaError(
            f"--to official: the official code reads the {component.kind} from a diffusers folder; use --to diffusers, "
            "or --component dit"
        )
    config = component.config
    dtype = component.computed_dtype
    base = config.base_size
    position = position_embedding(base, base, config.hidden_size, base, config.pe_interpolation)
    view = Extended(component.view, {"pos_embed": position.astype(dtype)})
    made = [*component.made, "pos_embed"]
    return Output(component.changed("position embedding computed", made=made), view, None, {})


def _diffusers(component, drop_unsupported):
    if component.kind != "dit":
        view = component.view
        return Output(component, view, diffusers_config(component.kind, component.config), {"format": "pt"})
    foreign = Foreign(component.view, DIFFUSERS)
    # The null caption is T5 of the empty prompt, which a diffusers pipeline computes itself.
    left_out = [name for name in component.view.names() if name == NULL_CAPTION]
    unheld = [name for name in foreign.unmapped if name != NULL_CAPTION]
    unheld += [name for name in component.view.names() if ".q_norm." in name or ".k_norm." in name]
    compression = component.config.kv_compression
    if (unheld or compression) and not drop_unsupported:
        what = (
            f"tensor '{unheld[0]}' and {len(unheld) - 1} more" if unheld else f"kv_compression {compression.sampling}"
        )
        raise MindSigmaError(
            f"{component.path}: diffusers' PixArt transformer cannot hold {what}; "
            "--drop-unsupported leaves them out, and the model then needs fine-tuning"
        )
    kept = Without(component.view, left_out + unheld)
    config = component.config.override(kv_compression=None, qk_norm=False)
    dropped = [*component.dropped, *left_out, *unheld]
    component = component.changed("for diffusers", view=kept, config=config, dropped=dropped)
    return Output(component, Foreign(kept, DIFFUSERS), diffusers_config("dit", config), {"format": "pt"})


def _diffusers_controlnet(component):
    if component.config.kv_compression or component.config.qk_norm:
        raise MindSigmaError(
            f"{component.path}: the ControlNets of diffusers' PixArt pipelines have no KV compression and no q/k "
            "norms; this one has"
        )
    view = Foreign(component.view, controlnet_names.DIFFUSERS)
    return Output(component, view, diffusers_config("controlnet", component.config), {"format": "pt"})


def target_folder(root, target, kind, whole_pipeline):
    """Folder of one component below the target's root."""
    return Path(root) / SUBFOLDERS[target][kind] if whole_pipeline else Path(root)

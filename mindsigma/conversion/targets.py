"""What a component becomes: names, dtypes and files of each target, and the refusal of what a target cannot hold."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict

from mindsigma import __version__
from mindsigma.conversion.component import Component
from mindsigma.conversion.foreign_configs import diffusers_config
from mindsigma.errors import MindSigmaError
from mindsigma.models.embeddings import position_embedding
from mindsigma.weights.names.dit_names import DIFFUSERS, NULL_CAPTION
from mindsigma.weights.names.views import Cast, Extended, Foreign, Without
from mindsigma.weights.saving import NUMPY, own_header, stored_config

CLASSES = {"dit": "DiT", "vae": "VAE", "t5": "T5Encoder"}
SUBFOLDERS = {
    "mindspore": {"dit": "dit", "vae": "vae", "t5": "text_encoder"},
    "diffusers": {"dit": "transformer", "vae": "vae", "t5": "text_encoder"},
}
STEMS = {
    "mindspore": dict.fromkeys(CLASSES, "model"),
    "diffusers": {"dit": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "t5": "model"},
}


@dataclass
class Output:
    """A component ready to be written.

    Attributes:
        component: what it was made from, in the target's dtype and without what the target cannot hold.
        view: its tensors under the target's names.
        config: config.json beside the weights, or None.
        metadata: texts for the header of a safetensors file.
    """

    component: Component
    view: Any
    config: Any
    metadata: Dict[str, str]


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
    return _diffusers(component, drop_unsupported)


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
    )


def _official(component):
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


def target_folder(root, target, kind, whole_pipeline):
    """Folder of one component below the target's root."""
    return Path(root) / SUBFOLDERS[target][kind] if whole_pipeline else Path(root)

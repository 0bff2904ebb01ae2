"""Changes of a checkpoint on its way, for training from weak to strong (paper section 3.3); each leaves a record."""

from dataclasses import replace

import numpy as np

from mindsigma.checkpoints.dit_names import NULL_CAPTION
from mindsigma.checkpoints.tensor_stream import checksum
from mindsigma.checkpoints.views import Extended, Merged
from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import KVCompression


def compress_keys(component, text):
    """Add KV compression (`conv:2:14-27`): convolutions that average ("Conv Avg Init"), norms that are neutral."""
    _only(component, "dit", "--kv-compression")
    if component.config.kv_compression is not None:
        raise MindSigmaError(f"{component.path}: compresses keys already ({component.config.kv_compression})")
    compression = KVCompression.parse(text)
    config = component.config.override(kv_compression=compression)
    channels, r, made = config.hidden_size, compression.factor, {}
    dtype = component.view.dtype("x_embedder.proj.weight")
    for layer in range(config.depth):
        if config.layer_compression(layer) is not None and compression.sampling == "conv":
            name = f"blocks.{layer}.attn."
            made[f"{name}sr.weight"] = np.full((channels, 1, r, r), 1 / r**2, dtype)
            made[f"{name}sr.bias"] = np.zeros(channels, dtype)
            made[f"{name}norm.weight"] = np.ones(channels, dtype)
            made[f"{name}norm.bias"] = np.zeros(channels, dtype)
    return component.changed(
        f"kv_compression {text}", view=Extended(component.view, made), config=config, made=[*component.made, *made]
    )


def grow_resolution(component, input_size):
    """Move the base resolution to a latent side; the position grid's scale grows with it, so that its range stays."""
    _only(component, "dit", "--grow-to")
    old = component.config
    scale = old.pe_interpolation * input_size / old.input_size
    config = old.override(input_size=input_size, pe_interpolation=scale)
    return component.changed(
        f"resolution: input_size {old.input_size} to {input_size}, pe_interpolation {old.pe_interpolation} to {scale}",
        config=config,
    )


def swap_vae(component, scaling_factor):
    """Set the VAE's scaling factor."""
    _only(component, "vae", "--vae-scaling-factor")
    config = replace(component.config, scaling_factor=scaling_factor)
    text = f"scaling_factor {component.config.scaling_factor} to {scaling_factor}"
    return component.changed(text, config=config)


def set_null_caption(component, states):
    """Replace the null caption by T5's states of the empty prompt, (tokens, caption_channels), of any length."""
    _only(component, "dit", "--null-caption")
    width = component.config.caption_channels
    if states.ndim != 2 or states.shape[1] != width:
        raise MindSigmaError(f"--null-caption: states of shape {states.shape} do not fit caption_channels {width}")
    states = states.astype(component.view.dtype("x_embedder.proj.weight"))
    config = component.config.override(model_max_length=states.shape[0])
    text = (
        f"null caption: T5 of the empty prompt, {states.shape[0]} tokens (was {component.config.model_max_length}), "
        f"crc32 {checksum(states):08x}"
    )
    view = Extended(component.view, {NULL_CAPTION: states})
    return component.changed(text, view=view, config=config, made=[*component.made, NULL_CAPTION])


def merge(component, other, weight):
    """(1 - weight) of this DiT and weight of another of the same shape."""
    _only(component, "dit", "--merge")
    return component.changed(
        f"merged: {1 - weight:g} of {component.path.name}, {weight:g} of {other.path.name}",
        view=Merged(component.view, other.view, weight),
        inputs=[*component.inputs, *other.inputs],
    )


def _only(component, kind, flag):
    if component.kind != kind:
        raise MindSigmaError(
            f"{flag} changes a {kind}, but {component.path} is a {component.kind}; use --component {kind}"
        )

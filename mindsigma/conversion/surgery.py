"""Changes of a checkpoint on its way, for training from weak to strong (paper section 3.3); each leaves a record."""

from dataclasses import replace

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import KVCompression
from mindsigma.weights.adapters.adapter_reader import ranks_text
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.adapters.merging import notes_of, open_adapters
from mindsigma.weights.formats.tensor_stream import checksum
from mindsigma.weights.names.dit_names import NULL_CAPTION
from mindsigma.weights.names.views import Extended, Merged


def compress_keys(component, text, init="average", seed=0):
    """Add KV compression (`conv:2:14-27`): convolutions that average ("Conv Avg Init"), norms that are neutral.

    `init` "random" draws the convolutions from the uniform distribution that PyTorch's start with instead, to compare.
    """
    _only(component, "dit", "--kv-compression")
    if component.config.kv_compression is not None:
        raise MindSigmaError(f"{component.path}: compresses keys already ({component.config.kv_compression})")
    compression = KVCompression.parse(text)
    config = component.config.override(kv_compression=compression)
    channels, r, made = config.hidden_size, compression.factor, {}
    dtype = component.computed_dtype
    for layer in range(config.depth):
        if config.layer_compression(layer) is not None and compression.sampling == "conv":
            name = f"blocks.{layer}.attn."
            shape = (channels, 1, r, r)
            weight = np.full(shape, 1 / r**2)
            if init == "random":
                weight = np.random.default_rng([seed, layer]).uniform(-1 / r, 1 / r, shape)  # fan-in is r²
            made[f"{name}sr.weight"] = weight.astype(dtype)
            made[f"{name}sr.bias"] = np.zeros(channels, dtype)
            made[f"{name}norm.weight"] = np.ones(channels, dtype)
            made[f"{name}norm.bias"] = np.zeros(channels, dtype)
    return component.changed(
        f"kv_compression {text}" + (f", {init} init" if compression.sampling == "conv" else ""),
        view=Extended(component.view, made),
        config=config,
        made=[*component.made, *made],
    )


def grow_resolution(component, pixels, interpolate=True):
    """Move the base resolution to `pixels` a side, a multiple of 64.

    The position grid's scale grows with it, so that its range stays.
    Without `interpolate` the scale stays and the range grows: positions that the network never saw, to compare.
    """
    _only(component, "dit", "--grow-to")
    if pixels < 64 or pixels % 64:
        raise MindSigmaError(f"--grow-to must be a multiple of 64 pixels, not {pixels}")
    old, input_size = component.config, pixels // 8
    scale = old.pe_interpolation * (input_size / old.input_size if interpolate else 1.0)
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
    states = states.astype(component.computed_dtype)
    config = component.config.override(model_max_length=states.shape[0])
    text = (
        f"null caption: T5 of the empty prompt, {states.shape[0]} tokens (was {component.config.model_max_length}), "
        f"crc32 {checksum(states):08x}"
    )
    view = Extended(component.view, {NULL_CAPTION: states})
    return component.changed(text, view=view, config=config, made=[*component.made, NULL_CAPTION])


def merge(component, other, weight, dtype=None):
    """(1 - weight) of this DiT and weight of another of the same shape.

    `dtype`: NumPy dtype of the result, so that it is rounded once; None for what this DiT has.
    """
    _only(component, "dit", "--merge")
    _can_hold(component, "--merge", dtype)
    return component.changed(
        f"merged: {1 - weight:g} of {component.path.name}, {weight:g} of {other.path.name}",
        view=Merged(component.view, other.view, weight, dtype),
        inputs=[*component.inputs, *other.inputs],
    )


def add_adapters(component, adapters, dtype=None):
    """This DiT with LoRA or DoRA adapters (`FILE[:WEIGHT]`) merged into its weights, in their order.

    `dtype`: NumPy dtype of the weights that change, so that they are rounded once; None for what they have.
    """
    _only(component, "dit", "--lora")
    _can_hold(component, "--lora", dtype)
    opened = open_adapters(adapters)
    for one, weight in opened:
        component = component.changed(
            f"adapter added: {one.adapter.path.name}, weight {weight:g}, "
            f"{len(one.adapter.entries)} modules, {ranks_text(one.adapter)}",
            inputs=[*component.inputs, one.adapter.path],
            sampling=one.adapter.sampling or component.sampling,
        )
        for note in notes_of(one):
            component = component.changed(note)
    return replace(component, view=Adapted(component.view, [(one.adapter, weight) for one, weight in opened], dtype))


def _only(component, kind, flag):
    if component.kind != kind:
        raise MindSigmaError(
            f"{flag} changes a {kind}, but {component.path} is a {component.kind}; use --component {kind}"
        )


def _can_hold(component, flag, dtype):
    if dtype is None and component.float8:
        raise MindSigmaError(f"{component.path}: {flag} would be lost in float8 weights; give --dtype, too")

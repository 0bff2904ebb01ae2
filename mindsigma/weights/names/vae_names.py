"""Names of a VAE's tensors: ours are diffusers' present ones; its old and LDM's are mapped."""

import re

from mindsigma.weights.names.name_map import MappedSource, rules

_RESNET = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
_MID_RESNETS = tuple(f"mid_block.resnets.{{}}.{part}" for part in _RESNET)
_ENDS = ("conv_in", "conv_norm_out", "conv_out")
_QUANT = ("quant_conv", "post_quant_conv")
_ATTENTION = "mid_block.attentions.0."


def _diffusers():
    names = list(_QUANT)
    for side, level in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
        names += [f"{side}.{name}" for name in _ENDS + _MID_RESNETS]
        names += [f"{side}.{level}.{{}}.resnets.{{}}.{part}" for part in _RESNET]
        names.append(f"{side}.{_ATTENTION}group_norm")
    names += ["encoder.down_blocks.{}.downsamplers.0.conv", "decoder.up_blocks.{}.upsamplers.0.conv"]
    return rules(*((name, name) for name in names))


def _attention(theirs):
    """Rules for the attention of both sides; `theirs` names its q, k, v and output projections."""
    ours = ("to_q", "to_k", "to_v", "to_out.0")
    return rules(
        *(
            (f"{side}.{_ATTENTION}{a}", f"{side}.{_ATTENTION}{b}")
            for side in ("encoder", "decoder")
            for a, b in zip(ours, theirs)
        ),
        squeeze=True,
    )


DIFFUSERS = _diffusers() + _attention(("to_q", "to_k", "to_v", "to_out.0"))
DIFFUSERS_OLD = _diffusers() + _attention(("query", "key", "value", "proj_attn"))


def _ldm(levels):
    """LDM numbers the decoder's levels from the last to the first, so its rules are written out level by level."""
    resnet = tuple((part, "nin_shortcut" if part == "conv_shortcut" else part) for part in _RESNET)
    pairs = [(name, name) for name in _QUANT]
    attention = []
    for side in ("encoder", "decoder"):
        pairs += [
            (f"{side}.{ours}", f"{side}.{theirs}") for ours, theirs in zip(_ENDS, ("conv_in", "norm_out", "conv_out"))
        ]
        pairs += [
            (f"{side}.mid_block.resnets.{i}.{ours}", f"{side}.mid.block_{i + 1}.{theirs}")
            for i in range(2)
            for ours, theirs in resnet
        ]
        pairs.append((f"{side}.{_ATTENTION}group_norm", f"{side}.mid.attn_1.norm"))
        attention += [
            (f"{side}.{_ATTENTION}{ours}", f"{side}.mid.attn_1.{theirs}")
            for ours, theirs in zip(("to_q", "to_k", "to_v", "to_out.0"), ("q", "k", "v", "proj_out"))
        ]
    for level in range(levels):
        up = levels - 1 - level
        pairs += [
            (f"encoder.down_blocks.{level}.resnets.{{}}.{a}", f"encoder.down.{level}.block.{{}}.{b}") for a, b in resnet
        ]
        pairs += [(f"decoder.up_blocks.{up}.resnets.{{}}.{a}", f"decoder.up.{level}.block.{{}}.{b}") for a, b in resnet]
        pairs.append((f"encoder.down_blocks.{level}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"))
        pairs.append((f"decoder.up_blocks.{up}.upsamplers.0.conv", f"decoder.up.{level}.upsample.conv"))

    return rules(*pairs) + rules(*attention, squeeze=True)


def map_vae(source):
    """See the VAE of a TensorSource, with LDM, old or present diffusers names, under ours."""
    source = source.part("vae")
    levels = [re.match(r"encoder\.down\.([0-9]{1,2})\.", name) for name in source.names()]
    found = {int(match[1]) for match in levels if match}
    if found:
        return MappedSource(source, _ldm(max(found) + 1))
    old = f"encoder.{_ATTENTION}query.weight" in source
    return MappedSource(source, DIFFUSERS_OLD if old else DIFFUSERS)

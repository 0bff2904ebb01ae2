"""The config of a network: from config.json beside its weights, else from what the tensors' names and shapes tell."""

from dataclasses import fields as fields_of

import numpy as np

from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json
from mindsigma.models.controlnet import ControlNetConfig, within
from mindsigma.models.dit import DiTConfig, KVCompression
from mindsigma.models.dit_config import canonical_fields
from mindsigma.models.t5 import T5Config
from mindsigma.models.vae_config import VAEConfig
from mindsigma.weights.formats.weight_files import file_in_folder
from mindsigma.weights.locate import read_json
from mindsigma.weights.names.dit_names import stored_null_caption
from mindsigma.weights.released import check_release
from mindsigma.weights.stored_config import checked


def stored_dit_fields(path, tensors, release=None):
    """What config.json beside the weights, or the header of our own files, tells, as DiTConfig fields.

    An interpolation_scale that a diffusers config leaves open is that of `release`, else diffusers' own default.
    """
    stored = _stored(path, tensors)
    name = stored.get("_class_name")
    if name == "DiT":
        return canonical_fields({key: value for key, value in stored.items() if not key.startswith("_")})
    # Transformer2DModel: what diffusers called it before 0.30, and the folders of that time still do.
    if name == "PixArtTransformer2DModel" or (
        name == "Transformer2DModel" and stored.get("norm_type") == "ada_norm_single"
    ):
        side = stored.get("sample_size") or 128
        scale = stored.get("interpolation_scale") or (release and release.config.pe_interpolation)
        if not scale:
            scale = max(side // 64, 1) if isinstance(side, int) else 1.0
        return {
            "num_heads": stored.get("num_attention_heads", 16),
            "input_size": side,
            "pe_interpolation": scale,
        }
    if stored and path.is_dir():
        raise MindSigmaError(f"{path / 'config.json'}: _class_name {name!r} is not a PixArt transformer")
    return {}


def _stored(path, tensors, *classes):
    """The config, as a dict, that the header of one of our own files or config.json beside the weights holds, or {}.

    `classes`: what it may call itself, where a file may hold several networks and the config be that of another.
    """
    if "config" in tensors.metadata:
        config = load_json(path, tensors.metadata["config"], "the config in its header")
    else:
        folder = path if path.is_dir() else path.parent
        config = read_json(file_in_folder(folder, "config.json")) if (folder / "config.json").is_file() else {}
    architectures = config.get("architectures")
    own = config.get("_class_name") or (architectures[0] if isinstance(architectures, list) and architectures else None)
    return {} if classes and path.is_file() and own is not None and own not in classes else config


def dit_config(tensors, stored, overrides, release=None):
    """Work out a DiTConfig: overrides win over the stored config, which wins over what the tensors' shapes tell.

    What none of them tells is taken from the Release that the file is called after, which the tensors must fit.
    """
    told = _config_from_shapes(tensors)
    if "hidden_size" in stored:  # a file of this project tells all, and may have been changed since
        release = None
    if release is not None:
        check_release(release, tensors, told, stored, overrides)
    known = {**told, **stored, **overrides}
    if release is not None:
        rule = {"input_size", "pe_interpolation"}  # one given, the other follows below
        given = rule & known.keys()
        known = {**{k: v for k, v in release.told().items() if not given or k not in rule}, **known}
    checked(tensors.path, DiTConfig, known, len(tensors.names()))
    if "input_size" not in known and "pe_interpolation" in known:
        known["input_size"] = int(64 * known["pe_interpolation"])
    if "pe_interpolation" not in known and "input_size" in known:
        known["pe_interpolation"] = known["input_size"] / 64  # holds for every PixArt-Σ model
    absent = [name for name in ("num_heads", "input_size", "pe_interpolation") if name not in known]
    if absent:
        raise MindSigmaError(
            f"{tensors.path}: the file does not tell {' and '.join(absent)}; give "
            f"{', '.join(f'{name}=...' for name in absent)} (--input-size at the command line; XL/2 of 1024 px: 128)"
        )
    return DiTConfig(**known)


def _config_from_shapes(tensors):
    """DiTConfig fields that the tensors' names, shapes and position embedding determine."""
    needed = ("x_embedder.proj.weight", "final_layer.linear.weight", "y_embedder.y_proj.fc1.weight")
    for name in needed:
        if name not in tensors:
            raise MindSigmaError(f"{tensors.path}: tensor '{name}' is missing; this is not a PixArt transformer")
    hidden, channels, patch, _ = _shape(tensors, needed[0], 4)
    names = tensors.names()
    blocks = [int(name.split(".")[1]) for name in names if name.startswith("blocks.")]
    depth = max(blocks) + 1 if blocks else 0
    fields = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": depth,
        "caption_channels": _shape(tensors, needed[2], 2)[1],
        "learn_sigma": _shape(tensors, needed[1], 2)[0] == 2 * channels * patch**2,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "micro_condition": "csize_embedder.mlp.0.weight" in tensors,
    }
    if hidden % 72 == 0:
        fields["num_heads"] = hidden // 72
    if "blocks.0.mlp.fc1.weight" in tensors:
        fields["mlp_ratio"] = _shape(tensors, "blocks.0.mlp.fc1.weight", 2)[0] / hidden
    return {**fields, **_conv_compression(tensors, depth), **_config_from_buffers(tensors.source, patch)}


def _conv_compression(tensors, depth):
    """dict with the kv_compression whose weights `depth` blocks hold, or empty."""
    compressed = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in tensors]
    if not compressed:
        return {}
    factor = _shape(tensors, f"blocks.{compressed[0]}.attn.sr.weight", 4)[-1]
    return {"kv_compression": KVCompression("conv", factor, tuple(compressed))}


def _shape(tensors, name, ndim):
    shape = tensors.shape(name)
    if len(shape) != ndim:
        raise MindSigmaError(f"{tensors.path}: tensor '{name}' has shape {shape}, expected {ndim} axes")
    return shape


def _config_from_buffers(source, patch):
    """What the buffers of an official checkpoint tell: caption length, base size and scale of the position grid."""
    fields = {}
    null_caption = stored_null_caption(source)
    if null_caption is not None:
        shape = source.shape(null_caption)
        if len(shape) != 2:
            raise MindSigmaError(f"{source.path}: tensor '{null_caption}' has shape {shape}, expected 2 axes")
        fields["model_max_length"] = shape[0]
    if "pos_embed" in source and len(source.shape("pos_embed")) == 3:
        _, tokens, channels = source.shape("pos_embed")
        side = int(round(tokens**0.5))
        if side * side == tokens and side > 1:
            fields["input_size"] = side * patch
            # Token 1 is at column 1 / scale; its first frequency is 1, stored as [sin | cos].
            row = np.asarray(source.read("pos_embed")[0, 1], np.float64)
            sine, cosine = row[0], row[channels // 4]
            if abs(np.hypot(sine, cosine) - 1.0) < 1e-2:
                scale = 1.0 / float(np.arctan2(sine, cosine) % (2 * np.pi))
                nearest = round(scale * 4) / 4  # half precision leaves 3 digits, and scales are multiples of 1/4
                fields["pe_interpolation"] = nearest if abs(scale - nearest) < 0.01 * scale else scale
    return fields


def controlnet_config(path, tensors, base=None, **overrides):
    """ControlNetConfig of a folder with config.json, or of a weight file that stands alone.

    Args:
        base: DiTConfig of the model that it will stand beside, or None; what tensors do not tell is as there.
        overrides: fields that win over what the files tell.
    """
    stored = _stored(path, tensors, "ControlNet", "PixArtControlNetAdapterModel")
    if stored.get("_class_name") == "ControlNet":
        told = {key: value for key, value in stored.items() if not key.startswith("_")}
    else:
        told = _controlnet_from_shapes(tensors)
        heads = stored.get("num_attention_heads", told.get("num_heads"))  # of SimpleTuner's config
        told.update({} if heads is None else {"num_heads": heads})
        if base is not None:
            told.setdefault("kv_compression", within(base.kv_compression, told["layers"]))
            told.setdefault("num_heads", base.num_heads)
    told = checked(tensors.path, ControlNetConfig, {**told, **overrides}, len(tensors.names()))
    if "num_heads" not in told:
        raise MindSigmaError(f"{tensors.path}: the file does not tell num_heads; give num_heads=...")
    for name in told.keys() - {field.name for field in fields_of(ControlNetConfig)}:
        raise MindSigmaError(f"unknown ControlNet option {name!r}")
    return ControlNetConfig(**told)


def _controlnet_from_shapes(tensors):
    """ControlNetConfig fields that the tensors' names and shapes determine."""
    needed = ("before_proj.weight", "after_proj.0.weight", "blocks.0.mlp.fc1.weight")
    for name in needed:
        if name not in tensors:
            raise MindSigmaError(
                f"{tensors.path}: tensor '{name}' is missing; this is not a ControlNet of a PixArt model"
            )
    hidden = _shape(tensors, needed[0], 2)[0]
    layers = max(int(name.split(".")[1]) for name in tensors.names() if name.startswith("blocks.")) + 1
    told = {
        "layers": layers,
        "hidden_size": hidden,
        "mlp_ratio": _shape(tensors, needed[2], 2)[0] / hidden,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        **_conv_compression(tensors, layers),
    }
    if hidden % 72 == 0:
        told["num_heads"] = hidden // 72
    return told


def vae_config(path, tensors):
    """VAEConfig of a folder with config.json, or of a weight file that stands alone.

    A file alone does not tell the number of groups and the scaling factor: SDXL's are taken.
    """
    stored = _stored(path, tensors, "AutoencoderKL", "VAE")
    if stored:
        return VAEConfig.from_dict(checked(tensors.path, VAEConfig, stored, len(tensors.names())))
    names = tensors.names()
    widths, layers = {}, 0
    for name in names:
        parts = name.split(".")
        if name.startswith("encoder.down_blocks.") and name.endswith("conv1.weight"):
            widths[int(parts[2])] = _shape(tensors, name, 4)[0]
            layers = max(layers, int(parts[4]) + 1)
    if not widths or "decoder.conv_in.weight" not in tensors:
        raise MindSigmaError(f"{tensors.path}: holds no VAE")
    return VAEConfig(
        latent_channels=_shape(tensors, "decoder.conv_in.weight", 4)[1],
        block_out_channels=tuple(widths[level] for level in sorted(widths)),
        layers_per_block=layers,
        mid_block_add_attention="encoder.mid_block.attentions.0.to_q.weight" in tensors,
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
    )


def t5_config(path, tensors):
    """T5Config of a folder with config.json, or of a weight file that stands alone."""
    stored = _stored(path, tensors, "T5EncoderModel", "T5Encoder", "T5ForConditionalGeneration", "T5Model")
    if stored:
        return T5Config.from_dict(checked(tensors.path, T5Config, stored, len(tensors.names())))
    first = "encoder.block.0.layer."
    needed = (
        "shared.weight",
        f"{first}0.SelfAttention.relative_attention_bias.weight",
        f"{first}0.SelfAttention.q.weight",
        f"{first}1.DenseReluDense.wi_0.weight",
    )
    for name in needed:
        if name not in tensors:
            raise MindSigmaError(f"{tensors.path}: tensor '{name}' is missing; this is not a T5 v1.1 encoder")
    vocab_size, d_model = _shape(tensors, needed[0], 2)
    buckets, heads = _shape(tensors, needed[1], 2)
    layers = [int(name.split(".")[2]) for name in tensors.names() if name.startswith("encoder.block.")]
    return T5Config(
        vocab_size=vocab_size,
        d_model=d_model,
        d_kv=_shape(tensors, needed[2], 2)[0] // heads,
        d_ff=_shape(tensors, needed[3], 2)[0],
        num_layers=max(layers) + 1,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )

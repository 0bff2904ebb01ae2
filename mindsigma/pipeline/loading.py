"""From a path to a network with weights: finds files, works out the config, accounts for every tensor."""

import json
from dataclasses import asdict

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore.nn.utils import no_init_parameters

from mindsigma.checkpoints import open_checkpoint
from mindsigma.checkpoints.dit_names import map_dit
from mindsigma.checkpoints.t5_names import map_t5
from mindsigma.checkpoints.vae_names import map_vae
from mindsigma.errors import MindSigmaError
from mindsigma.models.dit import DiT, DiTConfig, KVCompression
from mindsigma.models.dit.config import canonical_fields
from mindsigma.models.t5 import T5Config, T5Encoder
from mindsigma.models.vae import VAE, VAEConfig
from mindsigma.pipeline.locate import component_folder, read_json
from mindsigma.runtime import resolve_dtype

SHOWN_NAMES = 4


def load_dit(path, dtype=None, ema=False, kernels=None, **config_overrides):
    """Load a DiT from an official or diffusers checkpoint or from a folder of this project.

    Args:
        path: bundled name, hub id, weight file, or folder (of the transformer or of a whole pipeline).
        dtype: "fp32", "fp16", "bf16" or None for the device's default.
        ema: take the averaged weights of an official training checkpoint.
        kernels: "math" or "fused"; by default what the device target offers.
        config_overrides: DiTConfig fields that the file does not tell, such as num_heads, pe_interpolation, input_size
            or kv_compression ("uniform:2:14-27"); they win over config.json.

    Raises:
        MindSigmaError: the file is absent or damaged, or a tensor is missing, unexpected or of the wrong shape.
    """
    return open_dit(path, dtype, ema, kernels, **config_overrides).load()


def open_dit(path, dtype=None, ema=False, kernels=None, **config_overrides):
    """`load_dit` up to the reading of the weights: everything is checked, returns a Pending cell."""
    path = component_folder(path, ("dit", "transformer"))
    tensors = map_dit(open_checkpoint(path, ema=ema))
    config = dit_config(tensors, _stored_dit_config(path), canonical_fields(config_overrides))
    return Pending(tensors, lambda: DiT(config, _dtype(dtype), kernels))


def open_vae(path, dtype=None, kernels=None):
    """Open the VAE of a pipeline folder, or of a folder that holds config.json and weights, as a Pending cell.

    In fp16 a VAE whose config does not say `force_upcast: false` is kept in fp32: SDXL's own overflows.
    """
    folder = component_folder(path, ("vae",))
    config = VAEConfig.from_dict(read_json(folder / "config.json"))
    dtype = _dtype(dtype)
    if dtype == ms.float16 and config.force_upcast:
        dtype = ms.float32
    return Pending(map_vae(open_checkpoint(folder)), lambda: VAE(config, dtype, kernels))


def open_t5(path, dtype=None, kernels=None):
    """Open the T5 encoder of a pipeline folder, or of a folder with config.json and weights, as a Pending cell."""
    folder = component_folder(path, ("text_encoder",))
    config = T5Config.from_dict(read_json(folder / "config.json"))
    return Pending(map_t5(open_checkpoint(folder)), lambda: T5Encoder(config, _dtype(dtype), kernels))


def _dtype(name):
    return resolve_dtype(name, ms.get_context("device_target"))


class Pending:
    """A network whose weights are checked but not read.

    Args:
        tensors: MappedSource.
        build: makes the cell.
    """

    def __init__(self, tensors, build):
        self.tensors = tensors
        self._build = build
        self.config = account(self._empty(), tensors).config

    def _empty(self):
        with no_init_parameters():
            return self._build()

    def load(self):
        """Return the cell with its weights; each call reads them anew."""
        network = self._empty()
        for parameter in network.get_parameters():
            parameter.set_data(_tensor(self.tensors.read(parameter.name), parameter.dtype))
        return network


def account(network, tensors):
    """Raise unless a MappedSource holds exactly the parameters of a cell, in their shapes. Returns the cell."""
    parameters = {parameter.name: parameter for parameter in network.get_parameters()}
    missing = [name for name in parameters if name not in tensors]
    unexpected = tensors.unexpected + [name for name in tensors.names() if name not in parameters]
    for problem, names in (("is missing", missing), ("is not part of the model", unexpected)):
        if names:
            more = f" (and {len(names) - 1} more: {', '.join(names[1:SHOWN_NAMES])} ...)" if len(names) > 1 else ""
            raise MindSigmaError(
                f"{tensors.path}: tensor '{names[0]}' {problem}{more}; "
                f"the file does not fit the config of this {type(network).__name__}"
            )
    for name, parameter in parameters.items():
        if tensors.shape(name) != tuple(parameter.shape):
            raise MindSigmaError(
                f"{tensors.path}: tensor '{name}' has shape {tensors.shape(name)}, the model needs "
                f"{tuple(parameter.shape)}"
            )
    return network


def _tensor(array, dtype):
    if dtype == ms.bfloat16:
        return Tensor(np.asarray(array, np.float32)).astype(dtype)
    # Not Tensor.from_numpy: sharing memory with NumPy ends in heap corruption when the process exits (MindSpore 2.7.1).
    return Tensor(np.ascontiguousarray(array, ms.dtype_to_nptype(dtype)))


def _stored_dit_config(path):
    """What config.json beside the weights tells, as DiTConfig fields; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return {}
    stored = read_json(file)
    if stored.get("_class_name") == "DiT":
        return canonical_fields({name: value for name, value in stored.items() if name[0] != "_"})
    if stored.get("_class_name") == "PixArtTransformer2DModel":
        side = stored.get("sample_size") or 128
        return {
            "num_heads": stored.get("num_attention_heads", 16),
            "input_size": side,
            "pe_interpolation": stored.get("interpolation_scale") or max(side // 64, 1),
        }
    if path.is_dir():
        raise MindSigmaError(f"{file}: _class_name {stored.get('_class_name')!r} is not a PixArt transformer")
    return {}


def dit_config(tensors, stored, overrides):
    """Work out a DiTConfig: overrides win over the stored config, which wins over what the tensors' shapes tell."""
    known = {**_config_from_shapes(tensors), **stored, **overrides}
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
    compressed = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in tensors]
    if compressed:
        factor = _shape(tensors, f"blocks.{compressed[0]}.attn.sr.weight", 4)[-1]
        fields["kv_compression"] = KVCompression("conv", factor, tuple(compressed))
    return {**fields, **_config_from_buffers(tensors.source, patch)}


def _shape(tensors, name, ndim):
    shape = tensors.shape(name)
    if len(shape) != ndim:
        raise MindSigmaError(f"{tensors.path}: tensor '{name}' has shape {shape}, expected {ndim} axes")
    return shape


def _config_from_buffers(source, patch):
    """What the buffers of an official checkpoint tell: caption length, base size and scale of the position grid."""
    fields = {}
    if "y_embedder.y_embedding" in source:
        fields["model_max_length"] = source.shape("y_embedder.y_embedding")[0]
    if "pos_embed" in source and len(source.shape("pos_embed")) == 3:
        _, tokens, channels = source.shape("pos_embed")
        side = int(round(tokens**0.5))
        if side * side == tokens and side > 1:
            fields["input_size"] = side * patch
            # Token 1 is at column 1 / scale; its first frequency is 1, stored as [sin | cos].
            row = np.asarray(source.read("pos_embed")[0, 1], np.float64)
            sine, cosine = row[0], row[channels // 4]
            if abs(np.hypot(sine, cosine) - 1.0) < 1e-2:
                fields["pe_interpolation"] = round(1.0 / float(np.arctan2(sine, cosine) % (2 * np.pi)), 3)
    return fields


def stored_config(network):
    """config.json of a cell, as a dict."""
    return {"_class_name": type(network).__name__, **json.loads(json.dumps(asdict(network.config)))}

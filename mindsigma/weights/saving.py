"""The project's own model folders: config.json and model.safetensors a network, names and shapes as in memory."""

import json
from dataclasses import asdict

import ml_dtypes
import numpy as np

from mindsigma.arguments import one_of
from mindsigma.backends.ascend import published_shapes
from mindsigma.errors import MindSigmaError
from mindsigma.models.controlnet import ControlNet
from mindsigma.models.dit import DiT
from mindsigma.models.t5 import T5Encoder
from mindsigma.models.vae import VAE
from mindsigma.weights.formats.atomic import copy_file, write_json
from mindsigma.weights.formats.folder_writer import replacing_files
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.names.views import rounded
from mindsigma.weights.tokenizer import TOKENIZER_FILES

FORMAT = {"format": "mindsigma", "format_version": "1"}
NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def stored_config(class_name, config):
    """config.json of a network, as a dict."""
    return {"_class_name": class_name, **json.loads(json.dumps(asdict(config)))}


def own_header(config, **texts):
    """Metadata of this project's safetensors files: the config as `stored_config` has it, and further texts."""
    return {**FORMAT, **texts, "config": json.dumps(config, separators=(",", ":"))}


def write_own_folder(folder, config, specs, read, **texts):
    """Write config.json and model.safetensors of a network into a folder (Path), which is made if it is absent.

    Args:
        config: of `stored_config`.
        specs, read: of write_safetensors.
        texts: further ones for the header.
    """
    write_json(folder / "config.json", config)
    write_safetensors(folder / "model.safetensors", specs, read, own_header(config, **texts))


def save_network(network, folder, dtype="fp16"):
    """Write config.json and model.safetensors of a cell into a folder (Path); both are replaced, or none."""
    _check(dtype)
    with replacing_files(folder) as place:
        _write(network, place, dtype)


def save_pipeline(pipeline, folder, dtype="fp16"):
    """Write all parts of a PixArtSigmaPipeline into a folder (Path); all are replaced, or none."""
    _check(dtype)
    encoder = pipeline.text_encoder.encoder
    if not isinstance(encoder, T5Encoder):
        raise MindSigmaError("to save a pipeline, open it with text_encoder_memory='whole'")
    tokenizer = pipeline.tokenizer.path
    with replacing_files(folder, leaving=stale_tokenizers([tokenizer.name])) as place:
        with published_shapes(pipeline.dit) as dit:
            _write(dit, place / "dit", dtype)
        _write(pipeline.vae, place / "vae", dtype)
        _write(encoder, place / "text_encoder", dtype)
        copy_file(tokenizer, place / "tokenizer" / tokenizer.name)


def stale_tokenizers(written):
    """Places in a pipeline's folder that a Tokenizer would read in place of the files `written` into its tokenizer/."""
    first = TOKENIZER_FILES.index(written[0]) if written else 0
    return [f"tokenizer/{name}" for name in TOKENIZER_FILES[:first]]


def _check(dtype):
    one_of("dtype of the weights", dtype, tuple(NUMPY))


def _write(network, folder, dtype):
    kind = NUMPY[dtype]
    # Not parameter.name, which a parent cell prefixes.
    parameters = dict(network.parameters_and_names())
    specs = [TensorSpec(name, kind, tuple(parameter.shape)) for name, parameter in parameters.items()]
    # An accelerated network is of a subclass.
    name = next(kind.__name__ for kind in (DiT, VAE, T5Encoder, ControlNet) if isinstance(network, kind))
    config = stored_config(name, network.config)
    write_own_folder(
        folder, config, specs, lambda name: rounded(folder, name, parameters[name].asnumpy(), kind), dtype=dtype
    )

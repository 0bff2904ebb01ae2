"""The project's own model folders: config.json and model.safetensors a network, names and shapes as in memory."""

import json
from dataclasses import asdict

import ml_dtypes
import numpy as np

from mindsigma.checkpoints.atomic import copy_file, naming, write_json
from mindsigma.checkpoints.safetensors_writer import write_safetensors
from mindsigma.checkpoints.tensor_stream import TensorSpec
from mindsigma.errors import MindSigmaError
from mindsigma.models.t5 import T5Encoder
from mindsigma.pipeline.arguments import one_of

FORMAT = {"format": "mindsigma", "format_version": "1"}
NUMPY = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def stored_config(class_name, config):
    """config.json of a network, as a dict."""
    return {"_class_name": class_name, **json.loads(json.dumps(asdict(config)))}


def save_network(network, folder, dtype="fp16"):
    """Write config.json and model.safetensors of a cell into a folder (Path); each is replaced whole or not at all."""
    kind = NUMPY[one_of("dtype of the weights", dtype, tuple(NUMPY))]
    # Not parameter.name, which a parent cell prefixes.
    parameters = dict(network.parameters_and_names())
    specs = [TensorSpec(name, kind, tuple(parameter.shape)) for name, parameter in parameters.items()]
    config = stored_config(type(network).__name__, network.config)
    metadata = {**FORMAT, "dtype": dtype, "config": json.dumps(config)}
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        folder / "model.safetensors", specs, lambda name: parameters[name].asnumpy().astype(kind), metadata
    )
    write_json(folder / "config.json", config)


def save_pipeline(pipeline, folder, dtype="fp16"):
    """Write all parts of a PixArtSigmaPipeline into a folder (Path)."""
    encoder = pipeline.text_encoder.encoder
    if not isinstance(encoder, T5Encoder):
        raise MindSigmaError("to save a pipeline, open it with text_encoder_memory='whole'")
    with pipeline.dit.published_shapes() as dit:
        save_network(dit, folder / "dit", dtype)
    save_network(pipeline.vae, folder / "vae", dtype)
    save_network(encoder, folder / "text_encoder", dtype)
    copy_file(pipeline.tokenizer.path, folder / "tokenizer" / "spiece.model")

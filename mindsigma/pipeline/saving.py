"""The project's own model folders: config.json and model.safetensors a network, names and shapes as in memory."""

import json
import os
import shutil

import numpy as np
from safetensors.numpy import save_file

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.loading import stored_config

FORMAT = {"format": "mindsigma", "format_version": "1"}
_NUMPY = {"fp32": np.float32, "fp16": np.float16}


def save_network(network, folder, dtype="fp16"):
    """Write config.json and model.safetensors of a cell into a folder; each is replaced whole or not at all."""
    if dtype not in _NUMPY:
        raise MindSigmaError(f"dtype {dtype!r}: weights are written as {' or '.join(_NUMPY)}")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: np.ascontiguousarray(parameter.asnumpy().astype(_NUMPY[dtype]))
        for name, parameter in network.parameters_and_names()  # not parameter.name, which a parent cell prefixes
    }
    partial = folder / f".model.safetensors.{os.getpid()}.part"
    save_file(tensors, str(partial), metadata={**FORMAT, "dtype": dtype})
    os.replace(partial, folder / "model.safetensors")
    _write_json(folder / "config.json", stored_config(network))


def _write_json(file, value):
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def save_pipeline(pipeline, folder, dtype="fp16"):
    """Write all parts of a PixArtSigmaPipeline."""
    save_network(pipeline.dit, folder / "dit", dtype)
    save_network(pipeline.vae, folder / "vae", dtype)
    save_network(pipeline.text_encoder.encoder, folder / "text_encoder", dtype)
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copyfile(pipeline.tokenizer.path, folder / "tokenizer" / "spiece.model")

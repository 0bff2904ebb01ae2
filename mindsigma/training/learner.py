"""What a run trains and leaves behind: all weights of a DiT, as a folder, or an adapter of it, as a file."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.training.lora import attach
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_file import read_adapter, tensors_of, write_adapter
from mindsigma.weights.adapters.adapter_reader import ranks_text
from mindsigma.weights.formats.finite import finite
from mindsigma.weights.formats.reader import TensorSource
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.names.dit_names import NULL_CAPTION
from mindsigma.weights.sampling_header import header_texts
from mindsigma.weights.saving import stored_config, write_own_folder

FP32 = np.dtype(np.float32)


class WholeLearner:
    """Trains every weight of a DiT.

    Args:
        dit: DiT with fp32 weights.
        null_caption: float32 (tokens, caption_channels), stored with the weights.
        record: list of texts, what was changed on the way to this network.
    """

    product = "dit"
    average = "ema"
    sampling = {}  # how what is written wants to be sampled: fields of SamplingOptions

    def __init__(self, dit, null_caption, record=()):
        self.dit = dit
        self.null_caption = null_caption
        self.record = list(record)
        # Not Parameter.name, which a parent cell prefixes.
        self.named = {name: parameter for name, parameter in dit.parameters_and_names() if parameter.requires_grad}

    @property
    def parameters(self):
        """list of the Parameters that learn."""
        return list(self.named.values())

    def summary(self):
        """A line that tells its size."""
        return f"all weights, {sum(parameter.size for parameter in self.parameters):,} numbers"

    def write(self, folder, values=None):
        """Write a network folder of this project's format.

        Args:
            folder: Path that exists.
            values: dict name -> Parameter instead of the network's own, such as their averages.
        """
        values = values or self.named
        config = stored_config("DiT", self.dit.config)
        specs = [TensorSpec(name, FP32, tuple(value.shape)) for name, value in values.items()]
        specs.append(TensorSpec(NULL_CAPTION, FP32, self.null_caption.shape))

        def read(name):
            return self.null_caption if name == NULL_CAPTION else values[name].asnumpy()

        texts = {"record": json.dumps(self.record), **header_texts(self.sampling)}
        write_own_folder(folder, config, specs, read, dtype="fp32", kind="dit", **texts)

    def read(self, folder, values=None):
        """Set the network's Parameters, or others of the same names, from what `write` wrote."""
        set_from(open_checkpoint(Path(folder)), values or self.named)


class ControlNetLearner(WholeLearner):
    """Trains every weight of a ControlNet, beside a frozen DiT.

    Args:
        controlnet: ControlNet with fp32 weights. Its Parameters are renamed, as those of the DiT beside it have the
            same names.
    """

    product = "controlnet"
    average = "controlnet_ema"

    def __init__(self, controlnet):
        self.controlnet, self.named = controlnet, {}
        for name, parameter in controlnet.parameters_and_names():
            parameter.name = f"{self.product}.{name}"
            self.named[parameter.name] = parameter

    def summary(self):
        """A line that tells its size."""
        numbers = sum(parameter.size for parameter in self.parameters)
        return f"ControlNet of {self.controlnet.config.layers} blocks, {numbers:,} numbers"

    def write(self, folder, values=None):
        """Write a network folder of this project's format; `values` as for WholeLearner."""
        values = self._own_names(values or self.named)
        config = stored_config("ControlNet", self.controlnet.config)
        specs = [TensorSpec(name, FP32, tuple(value.shape)) for name, value in values.items()]
        write_own_folder(
            folder, config, specs, lambda name: values[name].asnumpy(), dtype="fp32", kind=self.product
        )  # fmt: skip

    def read(self, folder, values=None):
        """See WholeLearner."""
        set_from(open_checkpoint(Path(folder)), self._own_names(values or self.named))

    def _own_names(self, values):
        return {name.removeprefix(f"{self.product}."): value for name, value in values.items()}


class AdapterLearner:
    """Trains an adapter beside the frozen weights of a DiT.

    Args:
        dit: DiT; from now on it computes with the adapter.
        adapter: Adapter to begin with.
    """

    product = "adapter.safetensors"
    average = "adapter_ema.safetensors"
    sampling = {}  # see WholeLearner

    def __init__(self, dit, adapter):
        self.adapter = adapter
        self.named = attach(dit, adapter)

    @property
    def parameters(self):
        """list of the Parameters that learn."""
        return list(self.named.values())

    def summary(self):
        """A line that tells its size."""
        numbers = sum(parameter.size for parameter in self.parameters)
        kind = "DoRA" if self.adapter.dora else "rsLoRA" if self.adapter.rslora else "LoRA"
        return f"{kind} of {ranks_text(self.adapter)} for {len(self.adapter.entries)} layers, {numbers:,} numbers"

    def write(self, path, values=None):
        """Write an adapter file of this project's format; `values` as for WholeLearner."""
        values, entries = values or self.named, {}
        for name, entry in self.adapter.entries.items():
            arrays = {role: values[f"{name}.{role}"].asnumpy() for role in ("lora_A", "lora_B")}
            magnitude = None if entry.magnitude is None else values[f"{name}.magnitude"].asnumpy()
            entries[name] = replace(entry, a=arrays["lora_A"], b=arrays["lora_B"], magnitude=magnitude)
        write_adapter(path, replace(self.adapter, entries=entries, sampling=self.sampling))

    def read(self, path, values=None):
        """Set the adapter's Parameters, or others of the same names, from what `write` wrote."""
        entries = read_adapter(path).entries
        for name, entry in self.adapter.entries.items():
            if name in entries and entries[name].scale != entry.scale:
                raise MindSigmaError(
                    f"{path}: the adapter's '{name}' has scale {entries[name].scale:g}, the run's {entry.scale:g}; "
                    "resume with the options that the run was started with"
                )
        arrays = {key: array for name, entry in entries.items() for key, array in tensors_of(name, entry).items()}
        set_from(TensorSource(Path(path), arrays), values or self.named)


def set_from(source, parameters):
    """Set each Parameter of a dict from the tensor of its name.

    Args:
        source: TensorSource.
        parameters: dict name -> Parameter.
    """
    for name, parameter in parameters.items():
        if name not in source or source.shape(name) != tuple(parameter.shape):
            found = source.shape(name) if name in source else "absent"
            raise MindSigmaError(
                f"{source.path}: tensor '{name}' is {found}, the run needs {tuple(parameter.shape)}; "
                "resume with the options that the run was started with"
            )
        parameter.set_data(Tensor(np.ascontiguousarray(finite(source.path, name, source.read(name)), np.float32)))

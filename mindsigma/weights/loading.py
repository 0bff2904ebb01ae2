"""From a path to a network with weights: finds files, works out the config, accounts for every tensor."""

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore.nn.utils import no_init_parameters

from mindsigma.arguments import flag, one_of, path_like
from mindsigma.backends.ascend import align_heads
from mindsigma.backends.cpu import accelerate, is_accelerated
from mindsigma.errors import MindSigmaError
from mindsigma.models.controlnet import ControlNet, ControlNetConfig, base_digest
from mindsigma.models.dit import DiT
from mindsigma.models.dit_config import canonical_fields
from mindsigma.models.t5 import T5Encoder
from mindsigma.models.t5_streamed import StreamedT5Encoder
from mindsigma.models.vae import VAE
from mindsigma.progress import DELAY_SECONDS, bar
from mindsigma.runtime import resolve_dtype
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_reader import is_controlnet_adapter
from mindsigma.weights.adapters.adapter_view import Adapted
from mindsigma.weights.adapters.controlnet_adapter import AdaptedCopies
from mindsigma.weights.adapters.merging import notes_of, open_adapters, with_adapters
from mindsigma.weights.configs import controlnet_config, dit_config, stored_dit_fields, t5_config, vae_config
from mindsigma.weights.formats.floats import is_float
from mindsigma.weights.formats.tensor_stream import release
from mindsigma.weights.locate import EMA_FOLDERS, component_folder, dit_folders, locate
from mindsigma.weights.names.controlnet_names import map_controlnet
from mindsigma.weights.names.dit_names import map_dit
from mindsigma.weights.names.prefixes import kinds_in
from mindsigma.weights.names.t5_names import map_t5
from mindsigma.weights.names.vae_names import map_vae
from mindsigma.weights.released import release_of, size_note
from mindsigma.weights.sampling_header import told_by
from mindsigma.weights.stored_config import config_of
from mindsigma.weights.tensors import weight_tensor
from mindsigma.weights.text_memory import MEMORY, FromDisk, Int8

SHOWN_NAMES = 4
WORTH_A_BAR = 1e9  # bytes of weights


def load_dit(path, dtype=None, ema=False, lora=(), **config_overrides):
    """Load a DiT from an official or diffusers checkpoint or from a folder of this project.

    Args:
        path: bundled or released name, hub id, weight file, or folder (of the transformer or of a whole pipeline).
        dtype: "fp32", "fp16", "bf16" or None for the device's default.
        ema: take the averaged weights of an official training checkpoint.
        lora: adapters to merge into the weights, each `FILE[:WEIGHT]` or (path, weight).
        config_overrides: DiTConfig fields that the file does not tell, such as num_heads, pe_interpolation, input_size
            or kv_compression ("uniform:2:14-27"); they win over config.json.

    Raises:
        MindSigmaError: the file is absent or damaged, or a tensor is missing, unexpected, of the wrong shape, or not
            finite.
    """
    return open_dit(path, dtype, ema, lora, **config_overrides).load()


def open_dit(path, dtype=None, ema=False, lora=(), sampling=False, **config_overrides):
    """`load_dit` up to the reading of the weights: everything is checked, returns a Pending cell.

    `sampling`: the weights will not be trained, so their shapes may become those of the device (backends/ascend.py).
    """
    given, path = path, component_folder(path_like("path", path), dit_folders(flag("ema", ema)))
    released = release_of(path)
    try:
        source = open_checkpoint(path, ema=ema)
        kinds = kinds_in(source.names())
        tensors = map_dit(source, ema)
    except MindSigmaError as error:
        raise MindSigmaError(f"{error}{size_note(released, path)}") from error
    if kinds == ["controlnet"]:
        raise MindSigmaError(f"{path}: is a ControlNet: give it as --controlnet, the model beside it as --model")
    with config_of(path):
        stored = stored_dit_fields(path, tensors, released)
        config = dit_config(tensors, stored, canonical_fields(config_overrides), released)
    pending = Pending(tensors, lambda: DiT(config, _dtype(dtype)), prepared_for_sampling if sampling else accelerate)
    if path.name in EMA_FOLDERS and not ema and path != Path(given):
        pending.notes.append(f"only averaged (EMA) weights are there: {path.name}")
    if "controlnet" in kinds:
        pending.notes.append(f"{path}: holds a ControlNet, too, which --controlnet {path} draws with")
    adapters = open_adapters(lora)
    pending.tensors = with_adapters(tensors, adapters, np.float32)
    pending.notes += [note for one, _ in adapters for note in notes_of(one)]
    told = [told_by(source), *(one.adapter.sampling for one, _ in adapters)]
    pending.sampling = next((one for one in reversed(told) if one), {})
    return pending


def open_controlnet(path, dtype=None, base=None, sampling=False, **config_overrides):
    """Open the ControlNet of a folder, or of a file with official or diffusers names, as a Pending cell.

    Args:
        base: the DiT that it will stand beside, Pending or a cell, or None.
        sampling: see open_dit.
        config_overrides: ControlNetConfig fields that the file does not tell, such as num_heads.

    An adapter of a ControlNet (weights/adapters/controlnet_adapter.py) is read, too, beside a Pending base.

    Raises:
        MindSigmaError: as load_dit, or it does not fit beside `base`.
    """
    prepare = prepared_for_sampling if sampling else accelerate
    given, path = path, locate(path_like("controlnet", path), ("controlnet",))
    if is_controlnet_adapter(path):
        return _of_adapter(path, dtype, base, prepare)
    path = component_folder(given, ("controlnet",))
    source = open_checkpoint(path)
    tensors = map_controlnet(source)
    with config_of(path):
        config = controlnet_config(path, tensors, base and base.config, **config_overrides)
        if "dit" in kinds_in(source.names()):  # of its base, in one file as the official code saves them
            config = replace(config, base_digest=digest_of_base(map_dit(source)))
        if base is not None:
            config.check_base(base.config)
    pending = Pending(tensors, lambda: ControlNet(config, _dtype(dtype)), prepare)
    if config.base_digest and isinstance(base, Pending) and digest_of_base(base.tensors) != config.base_digest:
        pending.notes.append(f"{path}: this ControlNet was trained beside another model, or one of another precision")
    return pending


def _of_adapter(path, dtype, base, prepare):
    """Pending ControlNet of an adapter and a Pending base, whose own adapters it was not trained beside."""
    if not isinstance(base, Pending):
        raise MindSigmaError(
            f"{path}: an adapter of a ControlNet, which has only what was learnt: merge it into the copies of its base "
            "with tools/convert.py --to mindspore --base MODEL"
        )
    of_base = base.tensors.base if isinstance(base.tensors, Adapted) else base.tensors
    tensors = AdaptedCopies(path, of_base)
    config = ControlNetConfig.of(base.config, tensors.layers, digest_of_base(of_base))
    return Pending(tensors, lambda: ControlNet(config, _dtype(dtype)), prepare)


def digest_of_base(tensors):
    """`base_digest` of a DiT's MappedSource or View."""
    return base_digest(*(tensors.read(f"x_embedder.proj.{part}") for part in ("weight", "bias")))


def load_controlnet(path, dtype=None, base=None, **config_overrides):
    """Load a ControlNet; arguments as of open_controlnet."""
    return open_controlnet(path, dtype, base, **config_overrides).load()


def open_vae(path, dtype=None):
    """Open the VAE of a pipeline folder, a folder with config.json and weights, or a file, as a Pending cell.

    In fp16 a VAE whose config does not say `force_upcast: false` is kept in fp32: SDXL's own overflows.
    """
    path = component_folder(path, ("vae",))
    tensors = map_vae(open_checkpoint(path))
    with config_of(path):
        config = vae_config(path, tensors)
    dtype = _dtype(dtype)
    if dtype == ms.float16 and config.force_upcast:
        dtype = ms.float32
    return Pending(tensors, lambda: VAE(config, dtype))


def open_t5(path, dtype=None, memory="whole"):
    """Open the T5 encoder of a pipeline folder, a folder with config.json and weights, or a file, as a Pending cell.

    `memory`: "whole": a T5Encoder; else a StreamedT5Encoder, whose weights are read from the files layer by layer for
    every text ("layers", bit for bit the same states) or are held as int8 ("int8", approximate).
    """
    one_of("text_encoder_memory", memory, MEMORY)
    path = component_folder(path, ("text_encoder",))
    tensors = map_t5(open_checkpoint(path))
    with config_of(path):
        config = t5_config(path, tensors)
    pending = Pending(tensors, lambda: T5Encoder(config, _dtype(dtype)))
    return pending if memory == "whole" else PendingStreamed(pending, FromDisk if memory == "layers" else Int8)


def prepared_for_sampling(dit):
    """A DiT or a ControlNet with its weights, made fast for the device it is on."""
    return dit if is_accelerated(accelerate(dit)) else align_heads(dit)


def kinds_in_file(path):
    """set of the kinds of network, "dit", "vae", "t5", in a weight file; empty of a folder, and of what is damaged."""
    try:
        return set(kinds_in(open_checkpoint(path).names())) if path.is_file() else set()
    except MindSigmaError:
        return set()  # who opens it as a network says what is wrong


def _dtype(name):
    return resolve_dtype(name)


class Pending:
    """A network whose weights are checked but not read.

    Args:
        tensors: MappedSource.
        build: makes the cell.
        prepare: called with the cell once it has its weights.

    Attributes:
        config, dtype: of the cell.
        notes: list[str], what was assumed or left out on the way.
        sampling: fields of SamplingOptions that the files tell of themselves, or {}.
    """

    sampling = {}

    def __init__(self, tensors, build, prepare=accelerate):
        self.tensors = tensors
        self._build, self._prepare = build, prepare
        self.notes = list(tensors.notes)
        network = account(self._empty(), tensors)
        self.config, self.dtype = network.config, network.dtype

    def _empty(self):
        with no_init_parameters():
            return self._build()

    def load(self):
        """Return the cell with its weights; each call reads them anew."""
        network = self._empty()
        parameters = list(network.get_parameters())
        total = sum(parameter.size * parameter.itemsize for parameter in parameters)
        what = f"load {type(network).__name__}"
        with bar(total, what, "B", unit_scale=True, delay=DELAY_SECONDS, disable=total < WORTH_A_BAR) as done:
            for parameter in parameters:
                array = self.tensors.read(parameter.name)
                parameter.set_data(weight_tensor(self.tensors.path, parameter.name, array, parameter.dtype))
                release(array)  # else the file counts as resident beside its copy
                done.update(parameter.size * parameter.itemsize)
        return self._prepare(network)


class PendingStreamed:
    """A StreamedT5Encoder whose weights are checked but not read.

    Args:
        pending: Pending T5Encoder.
        hold: class of weights/text_memory.py that reads, or holds, the weights.
    """

    def __init__(self, pending, hold):
        self.tensors, self.config, self.dtype = pending.tensors, pending.config, pending.dtype
        self.notes, self._hold = pending.notes, hold

    @property
    def held(self):
        """Bytes of weights that are in memory at once: those of one layer, or the matrices of all as int8."""
        numbers = {name: prod(self.tensors.shape(name)) for name in self.tensors.names()}
        layers = sum(count for name, count in numbers.items() if name.startswith("encoder.block"))
        return (
            layers if self._hold is Int8 else layers * (4 if self.dtype == ms.float32 else 2) // self.config.num_layers
        )

    def load(self):
        """Return the encoder; of int8 weights each call reads the files anew."""
        numbers = sum(prod(self.tensors.shape(name)) for name in self.tensors.names())
        return StreamedT5Encoder(
            self.config, self.dtype, self._hold(self.tensors), accelerate,
            partial(_layers, disable=numbers < WORTH_A_BAR / 4),
        )  # fmt: skip


def _layers(count, disable):
    """The numbers of T5's layers, with a bar."""
    with bar(count, "T5", "layer", delay=DELAY_SECONDS, disable=disable) as done:
        for number in range(count):
            yield number
            done.update()


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
        if not is_float(tensors.dtype(name)):
            raise MindSigmaError(
                f"{tensors.path}: tensor '{name}' holds {tensors.dtype(name)}, not floating-point numbers; "
                "quantised weights are not read but as float8: use the fp32, fp16 or bf16 file of the model"
            )
    return network

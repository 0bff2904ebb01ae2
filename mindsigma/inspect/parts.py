"""The graphs that an NPU runs for a model: denoising step, caption keys, VAE, T5, training step, with their inputs."""

from dataclasses import dataclass, replace
from typing import List, Optional

import mindspore as ms
import numpy as np
from mindspore.nn.utils import no_init_parameters

from mindsigma.backends.ascend import align_heads
from mindsigma.choices import DMD_REGRESSIONS
from mindsigma.errors import MindSigmaError
from mindsigma.inspect.export import export_graph
from mindsigma.inspect.flat import FlatInputs, like, zeros
from mindsigma.models.controlnet import ControlNet, ControlNetConfig
from mindsigma.models.dit import DiT, KVCompression
from mindsigma.models.dit_config import PRESETS
from mindsigma.models.t5 import T5Config, T5Encoder
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig
from mindsigma.ops.operators import composing_for
from mindsigma.runtime import DTYPES
from mindsigma.sampling.controls import ControlSum
from mindsigma.sampling.denoising import GuidedStep, TextKV
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.options import SamplingOptions
from mindsigma.training.methods import DISTILLATIONS
from mindsigma.weights.loading import Pending, open_dit, open_t5, open_vae
from mindsigma.weights.locate import bundled_names
from mindsigma.weights.released import release_named

PARTS = ("step", "caption", "vae-decode", "vae-encode", "t5", "train")


@dataclass(frozen=True)
class Request:
    """What to export.

    Attributes:
        model: a preset or released name (the architecture alone), a bundled name, folder or weight file.
        part: one of PARTS.
        height, width: of the image, in pixels; None is the model's base resolution.
        batch: images; guidance doubles what the DiT sees.
        dtype: "fp16" or "bf16" ("fp32" for comparison).
        tokens: length of the caption; None is the model's longest.
        guided: two captions an image.
        depth: blocks, where the architecture alone is exported; None is all.
        kv_compression: "conv:2:14-27" instead of the model's own, "none" for none, None for the model's.
        optimizer: of the training step.
        recompute: the training step recomputes the blocks' activations.
        ema: the training step keeps a moving average of the weights.
        fp32_attention: self-attention of the training step is in fp32.
        weights: read the weights where the model has any.
        device: whose kernels the graph holds: "Ascend" or "CPU".
        sampler: of the step.
        pag_layers: of the step: "14" or "3,13-15", blocks whose self-attention is perturbed; None for no such guidance.
        inpaint: the step sets to a given image what a mask keeps.
        control_layers: so many blocks has the ControlNet beside the step, or which the training step trains; 0: none.
        method: of the training step: "denoising", or one of DISTILLATIONS.
        accumulation: micro-batches of a training step; more than one keep their sums.
        lora_rank: of an adapter that the training step trains instead of the network; None for the network.
        lora_targets: its layers; None for the usual ones.
        dora: it has magnitudes.
        lcm_substeps: steps of the teacher in latent consistency distillation.
        dmd_regression: of distribution matching distillation, one of DMD_REGRESSIONS.
    """

    model: str
    part: str = "step"
    height: Optional[int] = None
    width: Optional[int] = None
    batch: int = 1
    dtype: str = "fp16"
    tokens: Optional[int] = None
    guided: bool = True
    depth: Optional[int] = None
    kv_compression: Optional[str] = None
    optimizer: str = "came"
    recompute: bool = False
    ema: bool = False
    fp32_attention: bool = False
    weights: bool = True
    device: str = "Ascend"
    sampler: str = "dpm"
    pag_layers: Optional[str] = None
    inpaint: bool = False
    control_layers: int = 0
    method: str = "denoising"
    accumulation: int = 1
    lora_rank: Optional[int] = None
    lora_targets: Optional[List[str]] = None
    dora: bool = False
    lcm_substeps: int = 1
    dmd_regression: str = "huber"

    def __post_init__(self):
        if self.part not in PARTS:
            raise MindSigmaError(f"--part must be one of {', '.join(PARTS)}, not {self.part!r}")
        if self.dtype not in DTYPES:
            raise MindSigmaError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if self.method not in ("denoising", *DISTILLATIONS):
            raise MindSigmaError(f"--method must be one of {', '.join(DISTILLATIONS)}, not {self.method!r}")
        if self.dmd_regression not in DMD_REGRESSIONS:
            raise MindSigmaError(
                f"--dmd-regression must be one of {', '.join(DMD_REGRESSIONS)}, not {self.dmd_regression!r}"
            )
        for name in ("height", "width", "batch", "tokens", "depth", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise MindSigmaError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.control_layers < 0:
            raise MindSigmaError(f"--control-layers must be at least 0, not {self.control_layers}")
        if self.control_layers and self.part not in ("step", "train"):
            raise MindSigmaError(f"--control-layers is of --part step and train, not of {self.part}")

    def has_weights(self):
        """Whether the export reads weights."""
        return self.weights and not is_architecture(self.model)


def is_architecture(model):
    """Whether a model's name stands for its config alone."""
    return str(model) not in bundled_names() and (str(model) in PRESETS or release_named(model) is not None)


def export_part(request, out=None):
    """Graph of a Request, and the Request with everything that it left open decided.

    Args:
        out: Path of the .mindir file, or None.
    """
    with composing_for(request.device):
        cell, request = build_part(request)
        return export_graph(cell, out, request.has_weights()), request


def build_part(request, ranks=None, zero=0, zero_group=0):
    """FlatInputs cell of a Request, whose `inputs` it is called with, and the Request with everything decided.

    `ranks`, `zero`, `zero_group`: Ranks that train together, the stage of ZeRO and the number of those that divide
    among themselves (0: all), of a training step.
    """
    if request.part == "train":
        from mindsigma.inspect.training_parts import training_step

        return training_step(request, ranks, zero, zero_group)
    return _BUILDERS[request.part](request)


def _network(request, pending):
    """The network in the request's dtype, with weights if asked for, without any initial values otherwise."""
    build, opened = pending
    if opened is not None and request.has_weights():
        return Pending(opened.tensors, build, prepare=lambda network: network).load()
    with no_init_parameters():
        return build()


def _open(request, opener, **config):
    # In fp32, which every host can name; the network itself is built in the request's dtype.
    return None if is_architecture(request.model) else opener(request.model, "fp32", **config)


def config_of(request):
    """DiTConfig of a Request with all its blocks, and its weights as they are opened, or None."""
    changes = {}
    if request.kv_compression is not None:
        changes["kv_compression"] = None if request.kv_compression == "none" else request.kv_compression
    opened = _open(request, open_dit, **changes)
    if opened is not None:
        return opened.config, opened
    release = release_named(request.model)
    if release is not None and release.config is None:
        raise MindSigmaError(f"--model {request.model}: holds no DiT, only T5 and a VAE")
    return (release.config if release else PRESETS[request.model]).override(**changes), None


def fewer_blocks(request, depth):
    """The Request of a network of so many blocks, of which the same share is compressed or has a ControlNet."""
    config, _ = config_of(request)
    compression, changes = config.kv_compression, {}
    if compression is not None:
        first = depth - round(len(compression.layers) * depth / config.depth)
        layers = f"{first}-{depth - 1}" if first < depth else None
        changes["kv_compression"] = f"{compression.sampling}:{compression.factor}:{layers}" if layers else "none"
    if request.control_layers:
        changes["control_layers"] = max(round(request.control_layers * depth / config.depth), 1)
    return replace(request, depth=depth, weights=False, **changes)


def network_of(request, **options):
    """DiT of a Request and the request with size, caption length and depth filled in."""
    config, opened = config_of(request)
    if request.depth is not None:
        if request.has_weights():
            raise MindSigmaError("--depth cuts an architecture; give --no-weights with it, or a preset's name")
        config = shallow(config, request.depth)
    side = config.input_size * 8
    request = replace(
        request,
        height=request.height or side,
        width=request.width or side,
        tokens=request.tokens or config.model_max_length,
        depth=config.depth,
    )
    _check_sides(request, 8 * config.patch_size)
    dtype = DTYPES[request.dtype]
    return _network(request, (lambda: DiT(config, dtype, **options), opened)), request


def shallow(config, depth):
    """A DiTConfig cut to its first blocks; of compressed layers at least the last stays compressed."""
    compression = config.kv_compression
    if compression is not None and depth < config.depth:
        layers = tuple(layer for layer in compression.layers if layer < depth) or (depth - 1,)
        compression = KVCompression(compression.sampling, compression.factor, layers)
    return replace(config, depth=depth, kv_compression=compression)


def _check_sides(request, unit):
    for name, side in (("height", request.height), ("width", request.width)):
        if side % unit:
            raise MindSigmaError(f"--{name} {side} is not a multiple of {unit}, which this part needs")


def _captions(request, dit):
    """States and mask of the captions that the DiT sees at once."""
    rows = request.batch * (2 if request.guided else 1)
    states = zeros(((rows, request.tokens, dit.config.caption_channels), ms.float32))
    return states, zeros(((rows, request.tokens), ms.int32))


def _for_sampling(request, network):
    """The network as it samples: with aligned heads, for which the weights that change their shape need values."""
    if not request.has_weights():
        for name, parameter in network.parameters_and_names():
            if "attn" in name:
                parameter.set_data(zeros((parameter.shape, parameter.dtype)))
    return align_heads(network)


def _caption_cell(request, dit):
    text_kv = TextKV(dit)
    return FlatInputs(text_kv, text_kv, _captions(request, dit))


def _caption(request):
    dit, request = network_of(request)
    _for_sampling(request, dit)
    return _caption_cell(request, dit), request


def _step(request):
    dit, request = network_of(request)
    _for_sampling(request, dit)
    # What the step takes from the caption is what the caption's graph gives.
    text_kv = like(export_graph(_caption_cell(request, dit)).results)
    options = SamplingOptions(
        sampler=request.sampler, pag_scale=0.0 if request.pag_layers is None else 1.0, pag_layers=request.pag_layers
    )
    pag, sampler, scale = options.pag(dit.config.depth), options.solver("diffusers"), zeros(((), ms.float32))
    latents = (request.batch, dit.config.in_channels, request.height // 8, request.width // 8)
    if request.inpaint:
        given = np.zeros(latents, np.float32)
        sampler = Inpainting(sampler, given, given, given)
    step = GuidedStep(dit, sampler, request.guided, perturbed=pag.layers if pag else ())
    if request.control_layers:
        step.control, given = _control(request, dit, text_kv)
    if pag:
        scale = scale, zeros(((), ms.float32))
        text_kv = tuple(
            _more_images(pair, request.batch if i >= pag.layers[0] else 0) for i, pair in enumerate(text_kv)
        )
    arguments = [
        zeros((latents, ms.float32)),
        sampler.start_history(latents),
        zeros(((len(sampler.table(sampler.steps)[0].numbers),), ms.float32)),
        scale,
        text_kv,
        # What the timestep and the size alone decide is made before the first step.
        zeros(((1, 6 * dit.config.depth + 2, dit.config.hidden_size), dit.dtype)),
        zeros(((1, latents[2] * latents[3] // dit.config.patch_size**2, dit.config.hidden_size), dit.dtype)),
    ]
    fresh = zeros((latents, ms.float32)) if sampler.draws else None
    if request.control_layers:
        arguments += [fresh, None, given]
    elif sampler.draws:
        arguments.append(fresh)
    return FlatInputs(step, step, arguments), request


def _control(request, dit, text_kv):
    """ControlSum of one ControlNet of no training beside a DiT, and what it takes in a step: of zeros."""
    layers, channels = request.control_layers, dit.config.hidden_size
    with no_init_parameters():
        controlnet = ControlNet(ControlNetConfig.of(dit.config, layers), dit.dtype)
    if request.has_weights():
        controlnet.init_parameters_data()
    _for_sampling(request, controlnet)
    for name, parameter in controlnet.parameters_and_names():  # which the base has, too, and a file not twice
        parameter.name = f"controlnet.{name}"
    tokens = request.height * request.width // (8 * dit.config.patch_size) ** 2
    rows = request.batch * (2 if request.guided and request.batch > 1 else 1)
    hint, modulation = (zeros((shape, dit.dtype)) for shape in ((rows, tokens, channels), (1, 6 * layers, channels)))
    return ControlSum((controlnet,)), ((hint, modulation, text_kv[:layers], zeros(((layers,), ms.float32))),)


def _more_images(tensors, count):
    """Tensors of zeros like these, of `count` more images."""
    return tuple(zeros(((tensor.shape[0] + count, *tensor.shape[1:]), tensor.dtype)) for tensor in tensors)


def vae_of(request):
    """VAE of a Request, and the request with its size and the VAE's dtype."""
    opened = _open(request, open_vae)
    config = VAEConfig() if opened is None else opened.config
    request = replace(request, height=request.height or 1024, width=request.width or 1024)
    _check_sides(request, config.downsampling)
    dtype = DTYPES[request.dtype]
    if dtype == ms.float16 and config.force_upcast:  # as when it is loaded to draw
        request, dtype = replace(request, dtype="fp32"), ms.float32
    return _network(request, (lambda: VAE(config, dtype), opened)), request


def _vae_decode(request):
    vae, request = vae_of(request)
    scale, channels = vae.config.downsampling, vae.config.latent_channels
    latents = zeros(((request.batch, channels, request.height // scale, request.width // scale), ms.float32))
    return FlatInputs(vae, vae, [latents]), request


def _vae_encode(request):
    vae, request = vae_of(request)
    images = zeros(((request.batch, vae.config.in_channels, request.height, request.width), ms.float32))
    return FlatInputs(vae.encode, vae, [images]), request


def _t5(request):
    opened = _open(request, open_t5)
    config = T5Config() if opened is None else opened.config
    if request.depth is not None:
        if request.has_weights():
            raise MindSigmaError("--depth cuts an architecture; give --no-weights with it, or a preset's name")
        config = replace(config, num_layers=request.depth)
    request = replace(request, tokens=request.tokens or 300, depth=config.num_layers)
    dtype = DTYPES[request.dtype]
    t5 = _network(request, (lambda: T5Encoder(config, dtype), opened))
    ids = zeros(((request.batch, request.tokens), ms.int32))
    return FlatInputs(t5, t5, [ids, ids]), request


_BUILDERS = {
    "step": _step, "caption": _caption, "vae-decode": _vae_decode, "vae-encode": _vae_encode, "t5": _t5,
}  # fmt: skip

"""ControlNet for the DiT: a picture beside the prompt tells where things are (PixArt-δ, arXiv 2401.05252, section 4).

The first blocks of a base are copied. A copy stands beside the base's next block: it takes what the base's tokens are
after block 0, together with the condition, and what it makes of them is added to the base's tokens before that block.
Linear maps at both ends start at zero, so a fresh ControlNet changes nothing. Embeddings, positions, caption and
timestep are the base's. Shapes as in dit.py.
"""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Optional

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from mindsigma.errors import MindSigmaError
from mindsigma.models.checks import check_condition, check_timestep
from mindsigma.models.dit import DiTBlock
from mindsigma.models.dit_config import KVCompression
from mindsigma.models.linear import Linear
from mindsigma.ops.operators import narrow, unstack

OF_BASE = ("hidden_size", "num_heads", "mlp_ratio", "qk_norm", "kv_compression")


@dataclass(frozen=True)
class ControlNetConfig:
    """Shape of a ControlNet: how many blocks it copies, and what these are in its base.

    Attributes:
        layers: number of copies, of the base's blocks 0 ... layers - 1.
        hidden_size, num_heads, mlp_ratio, qk_norm: of DiTConfig.
        kv_compression: the base's, in the copied layers; None if it has none there.
        base_digest: of `base_digest`, of the base that it was trained beside; "" if that is not known.
    """

    layers: int = 13
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    kv_compression: Optional[KVCompression] = None
    base_digest: str = ""

    def __post_init__(self):
        object.__setattr__(self, "kv_compression", KVCompression.parse(self.kv_compression))
        for name in ("layers", "hidden_size", "num_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MindSigmaError(f"{name} of a ControlNet must be a whole number of at least 1, not {value!r}")
        if self.hidden_size % self.num_heads:
            raise MindSigmaError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")

    @classmethod
    def of(cls, config, layers, digest=""):
        """Of a base's DiTConfig. Raises MindSigmaError if it has too few blocks."""
        if isinstance(layers, bool) or not isinstance(layers, int) or not 1 <= layers < config.depth:
            raise MindSigmaError(
                f"a ControlNet of {layers!r} layers: a base of {config.depth} blocks takes 1 ... {config.depth - 1}"
            )
        same = {name: getattr(config, name) for name in OF_BASE}
        return cls(layers, **{**same, "kv_compression": within(config.kv_compression, layers)}, base_digest=digest)

    def layer_compression(self, layer):
        """See DiTConfig."""
        return KVCompression.in_layer(self.kv_compression, layer)

    def check_base(self, config):
        """Raise MindSigmaError unless the copies fit beside the blocks of a base with this DiTConfig."""
        wanted = ControlNetConfig.of(config, self.layers, self.base_digest)
        for field in fields(self):
            own, other = getattr(self, field.name), getattr(wanted, field.name)
            if own != other:
                raise MindSigmaError(
                    f"the ControlNet is for a model with {field.name} {own}, this one has {other}; give the model that "
                    "it was trained beside"
                )


def within(compression, layers):
    """KVCompression in the first `layers` blocks, or None if it does nothing there."""
    acting = tuple(i for i in range(layers) if KVCompression.in_layer(compression, i) is not None)
    return replace(compression, layers=acting) if acting else None


def base_digest(weight, bias):
    """SHA-256, hexadecimal, by which a base is known: of its patch embedding in fp16, through which conditions pass.

    Args:
        weight, bias: of `x_embedder.proj`, ndarrays; the same in fp32 and fp16.
    """
    whole = b"".join(np.ascontiguousarray(np.asarray(array, np.float16)).tobytes() for array in (weight, bias))
    return hashlib.sha256(whole).hexdigest()


class ControlNet(nn.Cell):
    """The copies and the linear maps that hang them on a base.

    Args:
        config: ControlNetConfig.
        dtype, parameter_dtype, fp32_attention: as of DiT.
    """

    def __init__(self, config, dtype=ms.float32, parameter_dtype=None, fp32_attention=False):
        super().__init__()
        self.config, self.dtype = config, dtype
        dtype, channels, layers = parameter_dtype or dtype, config.hidden_size, range(config.layers)
        self.blocks = nn.CellList([DiTBlock(config, layer, dtype, fp32_attention) for layer in layers])
        self.before_proj = Linear(channels, channels, "zeros", dtype=dtype)
        self.after_proj = nn.CellList([Linear(channels, channels, "zeros", dtype=dtype) for _ in layers])

    @classmethod
    def from_dit(cls, dit, layers, parameter_dtype=ms.float32, fp32_attention=False):
        """A fresh one beside a DiT, which must have its weights in the shapes of checkpoints (backends/ascend.py)."""
        embedding = dit.x_embedder.proj
        weight, bias = embedding.weight.float().asnumpy(), embedding.bias.float().asnumpy()
        with no_init_parameters():
            made = cls(
                ControlNetConfig.of(dit.config, layers, base_digest(weight, bias)),
                dit.dtype,
                parameter_dtype,
                fp32_attention,
            )
        originals = dict(dit.blocks.parameters_and_names())
        for name, parameter in made.blocks.parameters_and_names():
            parameter.set_data(Tensor(originals[name].float().asnumpy(), parameter.dtype))
        made.init_parameters_data()  # of the linear maps
        return made

    def hint(self, tokens):
        """What the first copy takes of the embedded condition (N, T, C), the same at every timestep: (N, T, C)."""
        return self.before_proj(tokens)

    def text_kv(self, caption, caption_mask=None):
        """What the copies take of an embedded caption (N, L, C) (`DiT.embed_caption`): a tuple, one pair a block."""
        pairs = ()
        for block in self.blocks:
            pairs += (block.text_kv(caption, caption_mask),)
        return pairs

    def modulations(self, t6):
        """What the copies take of timesteps, of the second result of `DiT.embed_timestep`: a tuple of (N, 6, C)."""
        rows = ()
        for block in self.blocks:
            rows += (block.modulation(t6),)
        return rows

    def split_modulation(self, modulation):
        """`modulations` of themselves side by side, (N, 6 * layers, C)."""
        rows = ()
        for i in range(self.config.layers):
            rows += (narrow(modulation, 1, 6 * i, 6),)
        return rows

    def construct(self, x, hint, modulations, text_kv, height, width, scales=None, gather=None):
        """What is added to the base's tokens before its blocks 1 ... layers: a tuple of (N, T, C).

        Args:
            x: (N, T, C), the base's tokens after its block 0.
            hint, modulations, text_kv: of the methods of these names; the hint of all or (1, T, C).
            height, width, gather: of DiTBlock.
            scales: fp32 (layers,), the weight of what each copy adds; None: 1 each. Zeros give the base, exactly.
        """
        c, added = x + hint, ()
        weights = None if scales is None else unstack(scales.astype(x.dtype), 0)
        for i, block in enumerate(self.blocks):
            c, _ = block(c, modulations[i], text_kv[i][0], text_kv[i][1], height, width, gather)
            change = self.after_proj[i](c)
            added += (change if weights is None else change * weights[i],)
        return added


class ControlledDiT(nn.Cell):
    """A DiT with a ControlNet beside it, as training calls them.

    Args:
        dit: DiT.
        controlnet: ControlNet.
    """

    def __init__(self, dit, controlnet):
        super().__init__(auto_prefix=False)  # parameters keep their names
        controlnet.config.check_base(dit.config)
        self.dit, self.controlnet = dit, controlnet
        self.config, self.dtype = dit.config, dit.dtype

    def construct(
        self, latents, condition, timestep, caption, caption_mask=None, image_size=None, aspect_ratio=None
    ):  # fmt: skip
        """Predict noise and variance; arguments and result of DiT.construct.

        `condition`: latents of the condition, like `latents`: scaled, of a picture of the same size in [-1, 1].
        """
        dit, controlnet = self.dit, self.controlnet
        position = dit.position(latents.shape)
        check_condition(latents.shape, condition.shape)
        has_conditions = image_size is not None and aspect_ratio is not None
        check_timestep(dit.config, timestep.shape, latents.shape[0], has_conditions)
        p = dit.config.patch_size
        height, width = latents.shape[2] // p, latents.shape[3] // p
        _, t6 = dit.embed_timestep(timestep, image_size, aspect_ratio)
        text_kv = controlnet.text_kv(dit.embed_caption(caption, caption_mask), caption_mask)
        hint = controlnet.hint(dit.x_embedder(condition.astype(self.dtype), position))

        def control(x):
            return controlnet(x, hint, controlnet.modulations(t6), text_kv, height, width)

        modulations = dit.modulations(timestep, image_size, aspect_ratio)
        return dit.run(latents, modulations, dit.text_kv(caption, caption_mask), position, None, control)

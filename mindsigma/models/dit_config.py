"""What determines a DiT: one dataclass, the names other code bases give its fields, and the published models."""

from dataclasses import dataclass, fields, replace
from typing import Optional, Tuple

from mindsigma.errors import MindSigmaError

PATCH_SIZE = 2
MAX_LAYERS = 10_000
SAMPLING_MODES = ("conv", "pool", "ave", "uniform", "uniform_every")


def layer_numbers(text):
    """Tuple of the numbers that a text such as "3,14-27" names. Raises ValueError."""
    spans = [part.partition("-") for part in text.split(",")]
    ranges = [range(int(low), int(high or low) + 1) for low, _, high in spans]
    if any(one.stop > MAX_LAYERS for one in ranges):
        raise ValueError(text)
    return tuple(i for one in ranges for i in one)


@dataclass(frozen=True)
class KVCompression:
    """Which self-attention layers shrink their keys and values, how, and by which factor a side (paper section 3.2).

    Attributes:
        sampling: "conv" (learned depthwise convolution), "pool" (mean of each cell, the paper's ablation; not in the
            official code), "ave" and "uniform" (every factor-th row and column: the official "ave" is a nearest
            interpolation), "uniform_every" (every factor-th token of the sequence).
        factor: stride a side; 1 leaves keys and values as they are.
        layers: block indices, from 0.
    """

    sampling: str = "conv"
    factor: int = 2
    layers: Tuple[int, ...] = tuple(range(14, 28))

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if self.sampling not in SAMPLING_MODES:
            raise MindSigmaError(
                f"kv_compression: unknown sampling {self.sampling!r}; choose from {', '.join(SAMPLING_MODES)}"
            )
        if int(self.factor) != self.factor or self.factor < 1:
            raise MindSigmaError(f"kv_compression: factor must be a whole number of at least 1, not {self.factor!r}")

    @classmethod
    def in_layer(cls, compression, layer):
        """The KVCompression, or None, as far as it acts in block `layer`."""
        acts = compression is not None and compression.factor > 1 and layer in compression.layers
        return compression if acts else None

    @classmethod
    def parse(cls, value):
        """Build from None, an instance, `"conv:2:14-27"` (layers may also be a comma list) or an official dict."""
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, dict):
            return cls._from_dict(value)
        try:
            sampling, factor, layers = str(value).split(":")
            return cls(sampling, int(factor), layer_numbers(layers))
        except ValueError as error:
            if isinstance(error, MindSigmaError):
                raise
            raise MindSigmaError(
                f"kv_compression {value!r}: expected SAMPLING:FACTOR:LAYERS, as in conv:2:14-27"
            ) from None

    @classmethod
    def _from_dict(cls, value):
        known = {
            "sampling": "sampling",
            "factor": "factor",
            "scale_factor": "factor",
            "layers": "layers",
            "kv_compress_layer": "layers",
        }
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise MindSigmaError(f"kv_compression: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        arguments = {known[key]: entry for key, entry in value.items()}
        if arguments.get("sampling") is None or not arguments.get("layers"):
            return None
        return cls(**arguments)


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT. Field names are those of the official code.

    Attributes:
        input_size: latent side of the base resolution, in latent pixels (image side / 8).
        patch_size: side of a token, in latent pixels.
        pe_interpolation: scale of the position grid; base side in tokens / pe_interpolation is 32 in all Σ models.
        model_max_length: longest caption, in T5 tokens.
        learn_sigma: predict the variance beside the noise (twice the output channels).
        qk_norm: LayerNorm over all channels of queries and keys.
        micro_condition: condition on original image size and aspect ratio.
        multi_scale: accept any latent size; otherwise exactly input_size x input_size.
    """

    input_size: int = 128
    patch_size: int = PATCH_SIZE
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    caption_channels: int = 4096
    model_max_length: int = 300
    pe_interpolation: float = 2.0
    learn_sigma: bool = True
    qk_norm: bool = False
    micro_condition: bool = False
    multi_scale: bool = True
    kv_compression: Optional[KVCompression] = None

    def __post_init__(self):
        object.__setattr__(self, "kv_compression", KVCompression.parse(self.kv_compression))
        for name in (
            "input_size",
            "patch_size",
            "in_channels",
            "hidden_size",
            "depth",
            "num_heads",
            "caption_channels",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MindSigmaError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.hidden_size % self.num_heads:
            raise MindSigmaError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise MindSigmaError(f"hidden_size {self.hidden_size} is not a multiple of 4, which the position needs")
        if self.micro_condition and self.hidden_size % 3:
            raise MindSigmaError(f"hidden_size {self.hidden_size} is not a multiple of 3, which micro_condition needs")
        if not isinstance(self.pe_interpolation, (int, float)) or not 0 < self.pe_interpolation < float("inf"):
            raise MindSigmaError(f"pe_interpolation must be a positive number, not {self.pe_interpolation!r}")
        if self.kv_compression and not set(self.kv_compression.layers) <= set(range(self.depth)):
            raise MindSigmaError(f"kv_compression: layers {self.kv_compression.layers} exceed depth {self.depth}")

    @property
    def out_channels(self):
        """Channels of the output: noise, and variance if it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def base_size(self):
        """Tokens a side at the base resolution, the unit of the position grid."""
        return self.input_size // self.patch_size

    def layer_compression(self, layer):
        """KVCompression that acts in block `layer`, or None."""
        return KVCompression.in_layer(self.kv_compression, layer)

    def override(self, **changes):
        """Return a copy with fields replaced; names of diffusers and of the official configs are understood."""
        return replace(self, **canonical_fields(changes))


# Names that the official configs and diffusers give to our fields.
SYNONYMS = {
    "kv_compress_config": "kv_compression",
    "num_attention_heads": "num_heads",
    "num_layers": "depth",
    "sample_size": "input_size",
    "interpolation_scale": "pe_interpolation",
    "use_additional_conditions": "micro_condition",
    "pred_sigma": "learn_sigma",
}


def canonical_fields(changes):
    """Translate a dict of config overrides to DiTConfig fields; an unknown name is an error that lists the known."""
    known = {field.name for field in fields(DiTConfig)}
    result = {}
    for name, value in changes.items():
        field = SYNONYMS.get(name, name)
        if name == "base_size":  # in tokens, of which each has PATCH_SIZE latent pixels a side
            field, value = "input_size", value * changes.get("patch_size", PATCH_SIZE)
        if field not in known:
            raise MindSigmaError(f"unknown DiT option {name!r}; known: {', '.join(sorted(known))}")
        if field in result:
            raise MindSigmaError(f"DiT option {field!r} is given twice")
        result[field] = value
    return result


def _sigma(input_size, **changes):
    return DiTConfig(input_size=input_size, pe_interpolation=input_size / 64, **changes)


_DEEP_HALF = KVCompression("conv", 2, tuple(range(14, 28)))

PRESETS = {
    "PixArt-Sigma-XL-2-256x256": _sigma(32),
    "PixArt-Sigma-XL-2-512-MS": _sigma(64),
    "PixArt-Sigma-XL-2-1024-MS": _sigma(128),
    "PixArt-Sigma-XL-2-2K-MS": _sigma(256),
    "PixArt-Sigma-XL-2-4K-MS": _sigma(512),
    "PixArt-Sigma-XL-2-256x256-KV": _sigma(32, kv_compression=_DEEP_HALF),
    "PixArt-Sigma-XL-2-512-MS-KV": _sigma(64, kv_compression=_DEEP_HALF),
    "PixArt-Sigma-XL-2-1024-MS-KV": _sigma(128, kv_compression=_DEEP_HALF),
    "PixArt-Sigma-XL-2-2K-MS-KV": _sigma(256, kv_compression=_DEEP_HALF),
    "PixArt-Sigma-XL-2-4K-MS-KV": _sigma(512, kv_compression=_DEEP_HALF),
    "sigma-mini": _sigma(32, hidden_size=288, depth=8, num_heads=4, caption_channels=256),
}


def preset(name):
    """Return the DiTConfig of a published model by name."""
    if name not in PRESETS:
        raise MindSigmaError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]

"""What determines a VAE: one dataclass, readable from diffusers' config.json."""

from dataclasses import dataclass, fields
from typing import Tuple

from mindsigma.errors import MindSigmaError


@dataclass(frozen=True)
class VAEConfig:
    """Shape of an AutoencoderKL; the defaults are SDXL's. Field names are those of diffusers' config.json."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: Tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.13025
    shift_factor: float = 0.0
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True  # the activations overflow fp16

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        object.__setattr__(self, "shift_factor", float(self.shift_factor or 0.0))
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise MindSigmaError(
                    f"VAE config: block_out_channels {channels} is not a multiple of norm_num_groups "
                    f"{self.norm_num_groups}"
                )

    @property
    def downsampling(self):
        """Image pixels a side of one latent pixel."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, values):
        """Build from a diffusers config.json; other block types than SDXL's are refused."""
        expected = {
            "act_fn": "silu",
            "down_block_types": "DownEncoderBlock2D",
            "up_block_types": "UpDecoderBlock2D",
            "latents_mean": None,
            "latents_std": None,
        }
        for name, wanted in expected.items():
            got = values.get(name, wanted)
            kinds = set(got) if isinstance(got, (list, tuple)) else {got}
            if kinds != {wanted}:
                raise MindSigmaError(f"VAE config: {name} {got!r} is not supported, only {wanted!r}")
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})

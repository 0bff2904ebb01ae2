"""Points of tools/scaling.py: a decode, a guided step or single blocks of XL/2 at some size; a worker (worker.py).

Options: `pixels`, and as the point has it `vae` ("mini", "sdxl") or `compressed`.
"""

import sys

import numpy as np

from measure.cases import finite, guided_steps, random_network
from measure.problems import CAPTION_TOKENS
from measure.worker import serve
from mindsigma.errors import MindSigmaError
from mindsigma.models.dit_config import preset

PRESETS = {256: "256x256", 512: "512-MS", 1024: "1024-MS", 2048: "2K-MS", 4096: "4K-MS"}
DEPTH = 28


def name_of(pixels, compressed):
    """Preset of XL/2 for a resolution."""
    return f"PixArt-Sigma-XL-2-{PRESETS[pixels]}{'-KV' if compressed else ''}"


def decode(tiled):
    """A function (options) that prepares the decode of a square image."""

    def prepare(options):
        from mindspore import Tensor

        from mindsigma.models.vae import VAE
        from mindsigma.models.vae_config import VAEConfig
        from mindsigma.models.vae_tiling import decode_tiled
        from mindsigma.runtime import set_device
        from mindsigma.weights.loading import open_vae
        from mindsigma.weights.locate import locate

        set_device()
        if options["vae"] == "sdxl":
            vae = random_network(lambda: VAE(VAEConfig()))
        else:
            vae = open_vae(locate("sigma-mini")).load()
        side = options["pixels"] // 8
        latents = np.random.default_rng(0).standard_normal((1, 4, side, side), np.float32)

        def run():
            decode_tiled(vae, latents) if tiled else vae(Tensor(latents)).asnumpy()

        return run

    return prepare


def step(options):
    """Guided steps of XL/2."""
    return guided_steps(name_of(options["pixels"], options["compressed"]), options["pixels"])


def block(options):
    """One block of XL/2, plain or with compressed keys and values, for both halves of guidance."""
    from mindspore import Tensor

    from mindsigma.models.dit import DiT
    from mindsigma.runtime import set_device

    set_device()
    config = preset(name_of(options["pixels"], options["compressed"]))
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}
    layer = "conv:2:0" if options["compressed"] else None
    dit = random_network(lambda: DiT(type(config)(**{**fields, "depth": 1, "kv_compression": layer})))
    rng = np.random.default_rng(0)
    side, channels = options["pixels"] // 16, config.hidden_size
    x = Tensor(rng.standard_normal((2, side * side, channels), np.float32))
    (text_kv,) = dit.text_kv(Tensor(rng.standard_normal((2, CAPTION_TOKENS, config.caption_channels), np.float32)))
    modulation = dit.modulations(Tensor(np.array([500.0], np.float32)))[0]
    return lambda: finite(dit.blocks[0](x, modulation, *text_kv, side, side)[0].asnumpy(), "the block")


CASES = {"tiled": decode(True), "whole": decode(False), "step": step, "block": block}

if __name__ == "__main__":
    try:
        serve(CASES)
    except MindSigmaError as error:
        sys.exit(f"error: {error}")

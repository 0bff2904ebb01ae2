"""Inputs of the cases, the same for every framework; needs NumPy alone."""

import numpy as np

PROMPTS = (
    "a penguin on a yellow background",
    "a red apple",
    "a cat on a blue background",
    "a rocket on a purple background",
)
STEPS = 20
GUIDANCE = 4.5
CAPTION_TOKENS = 300  # the longest caption

# Names are presets of mindsigma; diffusers and mindone get the same shape.
XL_STEPS = {
    "xl-256": ("PixArt-Sigma-XL-2-256x256", 256),
    "xl-512": ("PixArt-Sigma-XL-2-512-MS", 512),
    "xl-1024": ("PixArt-Sigma-XL-2-1024-MS", 1024),
    "xl-1024-kv": ("PixArt-Sigma-XL-2-1024-MS-KV", 1024),
}
WEIGHT_SCALE = 0.02  # of random weights
VAE_SIDE = 64  # of the latents of 512 px
T5_LAYERS = 2  # of T5-XXL's 24


def start_noise(batch):
    """Latents (batch, 4, 32, 32) fp32 of 256 px."""
    return np.random.default_rng(7).standard_normal((batch, 4, 32, 32), np.float32)


def dit_inputs(pixels, caption_channels):
    """Latents (2, 4, h, w), timesteps (2,), caption states (2, L, d), mask (2, L): an empty prompt and a full one."""
    rng = np.random.default_rng(pixels)
    latents = rng.standard_normal((2, 4, pixels // 8, pixels // 8), np.float32)
    states = rng.standard_normal((2, CAPTION_TOKENS, caption_channels), np.float32)
    mask = np.ones((2, CAPTION_TOKENS), np.int32)
    mask[0, 1:] = 0
    return latents, np.full(2, 500.0, np.float32), states, mask


def vae_latents():
    """Latents (1, 4, 64, 64) fp32."""
    return np.random.default_rng(8).standard_normal((1, 4, VAE_SIDE, VAE_SIDE), np.float32)


def token_ids(vocabulary):
    """Ids (1, 300) int32, none of them padding."""
    return np.random.default_rng(9).integers(2, vocabulary, (1, CAPTION_TOKENS)).astype(np.int32)

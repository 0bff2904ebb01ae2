"""A small picture of latents without the VAE: the linear map from a latent pixel to a colour that fits it best."""

import numpy as np
from PIL import Image

SIDE = 16  # latent pixels of the random picture that the map is fitted to
SHOWN = 256  # pixels of the longer side of a preview
RIDGE = 1e-3


class Preview:
    """Fitted to what a pipeline's VAE makes of smooth random latents, once.

    Args:
        pipeline: PixArtSigmaPipeline.
    """

    def __init__(self, pipeline):
        config = pipeline.components.opened("vae").config
        coarse = np.random.default_rng(0).standard_normal((4, config.latent_channels, SIDE // 4, SIDE // 4), np.float32)
        latents = coarse.repeat(4, 2).repeat(4, 3)
        images = pipeline.decode(latents)  # (4, H, W, 3)
        n, height, width, _ = images.shape
        colours = images.reshape(n, SIDE, height // SIDE, SIDE, width // SIDE, 3).mean((2, 4)).reshape(-1, 3)
        inputs = _with_one(latents)
        gram = inputs.T @ inputs + RIDGE * len(inputs) * np.eye(inputs.shape[1])
        self.matrix = np.linalg.solve(gram, inputs.T @ colours)  # (c + 1, 3)

    def __call__(self, latents):
        """PIL image of latents (1, c, h, w), a NumPy array; what is stronger than a clean picture is made as weak."""
        _, _, h, w = latents.shape
        latents = latents / max(float(latents.std()), 1.0)
        colours = np.clip(_with_one(latents) @ self.matrix, 0, 1).reshape(h, w, 3)
        image = Image.fromarray(np.round(colours * 255).astype(np.uint8))
        scale = SHOWN / max(h, w)
        return image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BICUBIC)


def _with_one(latents):
    """(N, c, h, w) to (N * h * w, c + 1) with a constant last column."""
    columns = latents.transpose(0, 2, 3, 1).reshape(-1, latents.shape[1]).astype(np.float64)
    return np.concatenate([columns, np.ones((len(columns), 1))], 1)

"""Tiled decoding and encoding with blended seams, which bound a VAE's memory whatever the size of the image."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mindsigma.errors import MindSigmaError


def decode_tiled(vae, latents, tile=64, overlap=0.25, apply=map):
    """Images of scaled latents, decoded tile by tile.

    Not equal to one untiled call: GroupNorm and the middle attention of each tile see that tile alone.

    Args:
        vae: called with scaled latents (N, c, t, t); its `config.downsampling` is the pixels a side of a latent pixel.
        latents: Tensor or ndarray (N, c, h, w).
        tile: side of a tile, in latent pixels. Where the image is smaller, so is the tile.
        overlap: least fraction of its side that a tile shares with the next, in [0, 1).
        apply: like `map` (function, list of tiles), gives the results in order; by it, several processes can share.

    Returns:
        float32 ndarray (N, 3, 8h, 8w), about [-1, 1].

    Raises:
        MindSigmaError: tile or overlap out of range.
    """
    _check(tile, overlap, 1)
    return _run_tiled(vae, _to_host(latents), tile, overlap, 1, vae.config.downsampling, apply)


def encode_tiled(vae, images, tile=512, overlap=0.25):
    """Moments of images, encoded tile by tile; the counterpart of `decode_tiled`.

    Args:
        vae: its `encode` is called with images (N, 3, t, t); its `config.downsampling` is pixels a latent pixel.
        images: Tensor or ndarray (N, 3, H, W) in [-1, 1]; H and W multiples of the downsampling factor.
        tile: side of a tile, in image pixels, a multiple of the downsampling factor.
        overlap: part of a tile that it shares with the next one, at least 0 and below 1.

    Returns:
        float32 ndarray (N, 2 * c, H / 8, W / 8), mean and then log variance, unscaled.

    Raises:
        MindSigmaError: tile or overlap out of range, or an image of which no whole number of latent pixels is made.
    """
    factor = vae.config.downsampling
    _check(tile, overlap, factor)
    height, width = images.shape[2:]
    if height % factor or width % factor:
        raise MindSigmaError(f"image of {height}x{width} pixels: crop both sides to multiples of {factor} to encode it")
    return _run_tiled(vae.encode, _to_host(images), tile // factor, overlap, factor, 1)


def _check(tile, overlap, multiple):
    if tile < 1 or tile % multiple:
        raise MindSigmaError(f"VAE tile {tile}: give a positive multiple of {multiple}")
    if not 0 <= overlap < 1:
        raise MindSigmaError(f"VAE tile overlap {overlap}: give a fraction of the tile, at least 0 and less than 1")


def _to_host(array):
    # numpy has no bfloat16, so a Tensor is cast before it is copied.
    return array.astype(ms.float32).asnumpy() if isinstance(array, Tensor) else np.asarray(array, np.float32)


def _run_tiled(run, source, tile, overlap, read, write, apply=map):
    """Blend `run` of every tile of source; a latent pixel is `read` pixels a side of source, `write` of the result."""
    height, width = (side // read for side in source.shape[2:])
    rows, columns = _spans(height, tile, overlap, write), _spans(width, tile, overlap, write)
    places = [(row, column) for row in rows for column in columns]
    pieces = [
        source[:, :, top * read : bottom * read, left * read : right * read]
        for (top, bottom, _), (left, right, _) in places
    ]
    blended = None
    results = apply(lambda piece: _to_host(run(Tensor(np.ascontiguousarray(piece)))), pieces)
    for ((top, bottom, row_weights), (left, right, column_weights)), piece in zip(places, results):
        if blended is None:
            blended = np.zeros((*piece.shape[:2], height * write, width * write), np.float32)
        place = blended[:, :, top * write : bottom * write, left * write : right * write]
        place += piece * (row_weights[:, None] * column_weights)
    return blended


def _spans(size, tile, overlap, scale):
    """Tiles along one axis of `size` latent pixels: (start, end, float32 weights (scale * tile,)) of each.

    Tiles have one length, so that one compiled graph serves them all; the last is shifted back to end at the border.
    At every place the weights of the tiles over it sum to one.
    """
    tile = min(tile, size)
    stride = max(1, round(tile * (1 - overlap)))
    starts = [*range(0, size - tile, stride), size - tile]
    weights = np.ones((len(starts), tile * scale))
    position = np.arange(tile * scale) + 0.5
    for i in range(1, len(starts)):
        shared = (starts[i - 1] + tile - starts[i]) * scale
        ramp = np.minimum(position / max(shared, 1), 1)
        weights[i] = np.minimum(weights[i], ramp)
        weights[i - 1] = np.minimum(weights[i - 1], ramp[::-1])
    # Two ramps already sum to one; where the shifted tile makes three tiles meet, they do not.
    total = np.zeros(size * scale)
    for start, weight in zip(starts, weights):
        total[start * scale : (start + tile) * scale] += weight
    return [
        (start, start + tile, (weight / total[start * scale : (start + tile) * scale]).astype(np.float32))
        for start, weight in zip(starts, weights)
    ]

"""Tiled VAE calls: blending is exact where tiles agree, and every tile is one shape."""

import gc
import weakref
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mindsigma.errors import MindSigmaError
from mindsigma.models.vae import VAE
from mindsigma.models.vae_config import VAEConfig
from mindsigma.models.vae_tiling import decode_tiled, encode_tiled


class LocalVAE:
    """Decodes by repeating pixels and encodes by averaging them, so tiles agree exactly; records every shape."""

    def __init__(self, factor, dtype=ms.float32):
        self.config = SimpleNamespace(downsampling=factor)
        self.dtype = dtype
        self.shapes = []

    def __call__(self, latents):
        self.shapes.append(latents.shape)
        z = latents.asnumpy()[:, [0, 1, 2]] * np.float32(2)
        return Tensor(z.repeat(self.config.downsampling, 2).repeat(self.config.downsampling, 3), self.dtype)

    def encode(self, images):
        self.shapes.append(images.shape)
        n, c, height, width = images.shape
        f = self.config.downsampling
        mean = images.asnumpy().reshape(n, c, height // f, f, width // f, f).mean((3, 5))
        return Tensor(np.concatenate([mean, -mean], 1), self.dtype)


class Recorder:
    """A VAE that records the shapes it is called with."""

    def __init__(self, vae):
        self.vae, self.config, self.shapes = vae, vae.config, []

    def __call__(self, latents):
        self.shapes.append(latents.shape)
        return self.vae(latents)

    def encode(self, images):
        self.shapes.append(images.shape)
        return self.vae.encode(images)


def noise(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny_vae():
    ms.set_seed(0)
    return VAE(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))


SIZES = [(16, 16), (17, 16), (16, 17), (31, 33), (7, 40), (40, 3), (1, 1), (5, 6), (32, 32), (53, 29)]
OVERLAPS = [0, 0.1, 0.25, 0.37, 0.5, 0.75]


@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("size", SIZES)
def test_tiles_that_agree_blend_to_the_untiled_result(size, overlap):
    for factor in (8, 3):
        vae = LocalVAE(factor)
        latents = noise(2, 4, *size)
        tiled = decode_tiled(vae, latents, tile=16, overlap=overlap)
        assert tiled.dtype == np.float32
        np.testing.assert_allclose(tiled, LocalVAE(factor)(Tensor(latents)).asnumpy(), rtol=0, atol=1e-6)
        assert set(vae.shapes) == {(2, 4, min(16, size[0]), min(16, size[1]))}

        vae = LocalVAE(factor)
        images = noise(1, 3, size[0] * factor, size[1] * factor)
        tiled = encode_tiled(vae, images, tile=16 * factor, overlap=overlap)
        assert tiled.dtype == np.float32
        np.testing.assert_allclose(tiled, LocalVAE(factor).encode(Tensor(images)).asnumpy(), rtol=0, atol=1e-6)
        assert set(vae.shapes) == {(1, 3, min(16, size[0]) * factor, min(16, size[1]) * factor)}


@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16])
def test_half_precision_comes_back_as_float32(dtype):
    latents = Tensor(np.full((1, 4, 20, 20), 0.5, np.float32), dtype)
    images = decode_tiled(LocalVAE(8, dtype), latents, tile=16)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, 1, rtol=0, atol=1e-6)


def test_tiles_one_pixel_apart():
    latents = noise(1, 4, 21, 10)
    tiled = decode_tiled(LocalVAE(8), latents, tile=8, overlap=0.99)
    np.testing.assert_allclose(tiled, LocalVAE(8)(Tensor(latents)).asnumpy(), rtol=0, atol=1e-5)


def test_calls_needed():
    vae = LocalVAE(8)
    decode_tiled(vae, noise(1, 4, 64, 64))
    assert len(vae.shapes) == 1
    decode_tiled(vae, noise(1, 4, 112, 64))
    assert len(vae.shapes) == 3
    encode_tiled(vae, noise(1, 3, 512, 512))
    assert len(vae.shapes) == 4


def test_weights_ramp_linearly_across_a_seam():
    class Numbering(LocalVAE):
        def __call__(self, latents):
            super().__call__(latents)
            return Tensor(np.full((1, 3, 64, 64), len(self.shapes) - 1, np.float32))

    row = decode_tiled(Numbering(8), noise(1, 4, 8, 14), tile=8, overlap=0.25)[0, 0, 30]
    expected = np.concatenate([np.zeros(48), (np.arange(16) + 0.5) / 16, np.ones(48)])
    np.testing.assert_allclose(row, expected, rtol=0, atol=1e-6)


def test_a_vae_goes_with_the_last_reference():
    """Its memory, and what was compiled for it, do not wait for the collector of circles."""
    vae = VAE(VAEConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8))
    kept = weakref.ref(vae)
    gc.disable()
    try:
        del vae
        assert kept() is None
    finally:
        gc.enable()


def test_real_vae_sees_one_shape(tiny_vae):
    latents = Tensor(noise(1, 4, 21, 13))
    vae = Recorder(tiny_vae)
    images = decode_tiled(vae, latents, tile=8, overlap=0.5)
    assert images.shape == (1, 3, 42, 26) and np.isfinite(images).all()
    assert len(vae.shapes) > 1 and set(vae.shapes) == {(1, 4, 8, 8)}

    vae = Recorder(tiny_vae)
    moments = encode_tiled(vae, noise(1, 3, 42, 26), tile=16, overlap=0.25)
    assert moments.shape == (1, 8, 21, 13) and np.isfinite(moments).all()
    assert len(vae.shapes) > 1 and set(vae.shapes) == {(1, 3, 16, 16)}


def test_one_tile_is_the_untiled_call(tiny_vae):
    latents = noise(1, 4, 8, 8)
    np.testing.assert_array_equal(decode_tiled(tiny_vae, latents), tiny_vae(Tensor(latents)).asnumpy())
    images = noise(1, 3, 16, 16)
    np.testing.assert_array_equal(encode_tiled(tiny_vae, images), tiny_vae.encode(Tensor(images)).asnumpy())


@pytest.mark.parametrize("kwargs", [{"tile": 0}, {"tile": -8}, {"overlap": 1}, {"overlap": -0.1}, {"overlap": 2}])
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(MindSigmaError):
        decode_tiled(LocalVAE(8), noise(1, 4, 8, 8), **kwargs)
    with pytest.raises(MindSigmaError):
        encode_tiled(LocalVAE(8), noise(1, 3, 64, 64), **kwargs)


def test_sizes_between_latent_pixels_are_refused():
    with pytest.raises(MindSigmaError, match="multiple of 8"):
        encode_tiled(LocalVAE(8), noise(1, 3, 64, 64), tile=60)
    with pytest.raises(MindSigmaError, match="64x60"):
        encode_tiled(LocalVAE(8), noise(1, 3, 64, 60))

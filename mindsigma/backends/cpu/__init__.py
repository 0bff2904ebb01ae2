"""Makes networks fast on a CPU: whole blocks of an instance are computed by a library of C++ kernels, in fp32."""

import mindspore as ms

from mindsigma.backends.cpu.dit import FastBlock, FastControlNet, FastDiT, FastFinalLayer, FastPatchEmbedding
from mindsigma.backends.cpu.embeddings import FastCaptionEmbedding, FastScalarEmbedder
from mindsigma.backends.cpu.library import library as native_library
from mindsigma.backends.cpu.t5 import FastEmbedding, FastRelativeBias, FastRMSNorm, FastT5Layer
from mindsigma.backends.cpu.vae import (
    FastConv,
    FastDecoder,
    FastEncoder,
    FastPixelAttention,
    FastResnet,
    FastUpsampler,
    FastVAE,
)
from mindsigma.models.controlnet import ControlNet
from mindsigma.models.dit import CaptionEmbedding, DiT, DiTBlock, FinalLayer, PatchEmbedding
from mindsigma.models.embeddings import ScalarEmbedder
from mindsigma.models.linear import RMSNorm
from mindsigma.models.t5 import Embedding, RelativeBias, T5Layer
from mindsigma.models.vae import VAE, Conv, Decoder, Encoder, PixelAttention, ResnetBlock, Upsampler

FAST = {
    DiT: FastDiT,
    DiTBlock: FastBlock,
    ControlNet: FastControlNet,
    PatchEmbedding: FastPatchEmbedding,
    CaptionEmbedding: FastCaptionEmbedding,
    ScalarEmbedder: FastScalarEmbedder,
    FinalLayer: FastFinalLayer,
    T5Layer: FastT5Layer,
    Embedding: FastEmbedding,
    RelativeBias: FastRelativeBias,
    RMSNorm: FastRMSNorm,
    Conv: FastConv,
    ResnetBlock: FastResnet,
    PixelAttention: FastPixelAttention,
    Upsampler: FastUpsampler,
    Encoder: FastEncoder,
    Decoder: FastDecoder,
    VAE: FastVAE,
}


def accelerate(network):
    """Replace what the kernels compute faster in a DiT, a T5 encoder, a layer of one, or a VAE. Returns the network.

    Its cells become of the subclasses above, so parameters, their names and the calls stay. Nothing is done unless
    MindSpore runs PyNative on a CPU, all weights are fp32, and there is a library, see library.py. A DiT then has
    gradients after set_train() only; before, they are zero.
    """
    plain = {type(cell) for _, cell in network.cells_and_names()} & FAST.keys()
    if not plain or any(one.dtype != ms.float32 for one in network.get_parameters()):
        return network
    if not accelerates(getattr(network, "dtype", ms.float32)):
        return network
    for _, cell in network.cells_and_names():
        if type(cell) in plain and (type(cell) is not Conv or FastConv.takes(cell)):
            object.__setattr__(cell, "__class__", FAST[type(cell)])
    return network


def is_accelerated(network):
    """Whether `accelerate` has changed a network."""
    fast = set(FAST.values())
    return any(type(cell) in fast for _, cell in network.cells_and_names())


def accelerates(dtype):
    """Whether `accelerate` changes networks of this dtype here and now."""
    if ms.get_context("device_target") != "CPU" or ms.get_context("mode") != ms.PYNATIVE_MODE:
        return False
    return dtype == ms.float32 and native_library() is not None

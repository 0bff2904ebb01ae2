"""Golden networks in any dtype, for a process on the Ascend host; the tests call `compute` for the CPU's answer.

python tests/ascend_networks.py OUT.npz NAME:DTYPE:MODE ... writes arrays under NAME:DTYPE:MODE:PART.
"""

import sys
from functools import cache

import mindspore as ms
import numpy as np
import pytest
from conftest import GOLDEN, Case, drawn_weight
from mindspore import Tensor

from mindsigma import PixArtSigmaPipeline
from mindsigma.backends.ascend import align_heads
from mindsigma.models.controlnet import ControlNet
from mindsigma.models.dit import DiT
from mindsigma.ops import pieces
from mindsigma.runtime import DTYPES, device, set_device
from mindsigma.sampling.controls import Control
from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps
from mindsigma.sampling.dpm_solver import DPMSolver
from mindsigma.sampling.inpainting import Inpainting
from mindsigma.sampling.perturbed import PerturbedAttention


def dit(case, dtype, **options):
    """A DiT with the weights of a reference case."""
    drawn = case.build()
    network = DiT(drawn.config, DTYPES[dtype], **options)
    for parameter, value in zip(network.get_parameters(), drawn.get_parameters()):
        parameter.set_data(value.astype(parameter.dtype))
    return network


def output(name, dtype):
    """The output of a reference case, through a DiT as it samples."""
    case = Case(name)
    return {"out": align_heads(dit(case, dtype).set_train(False))(*case.inputs())}


def in_pieces(name, dtype):
    """The same with every MLP in pieces, of 7 tokens or less."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MOST_NUMBERS", 7 * 4 * Case(name).config["hidden_size"])
        return output(name, dtype)


def gradients(name, dtype):
    """Gradients of the squares' sum at weights in fp32, as in training, by the weights' names."""
    case = Case(name)
    network = dit(case, dtype, parameter_dtype=ms.float32).set_train()

    def loss(*inputs):
        return (network(*inputs) ** 2).sum()

    parameters = network.trainable_params()
    found = ms.grad(loss, None, parameters)(*case.inputs())
    return {parameter.name: gradient for parameter, gradient in zip(parameters, found)}


@cache
def pipeline(dtype):
    """The bundled pipeline on the device that is set."""
    mode = ms.get_context("mode")
    made = PixArtSigmaPipeline.from_pretrained("sigma-mini", dtype=dtype, device=device())
    ms.set_context(mode=mode)
    return made


def reference(name="diffusers_dpm_8"):
    """Arrays of a run of the reference on sigma-mini."""
    return np.load(GOLDEN / f"mini_{name}.npz")


def t5(dtype):
    """States of the reference's prompts."""
    prompts = [str(prompt) for prompt in reference()["prompts"]]
    return {"states": pipeline(dtype).encode_prompts(prompts).states}


def vae(dtype):
    """Moments of images, pictures of latents."""
    network = pipeline(dtype).vae
    return {
        "moments": network.encode(Tensor(reference("vae")["image"].astype(np.float32))),
        "images": network(Tensor(reference()["latents"])),
    }


def sample(name, dtype):
    """Latents and pictures (N, H, W, 3) of a run such as diffusers_dpm_8."""
    made, given = pipeline(dtype), reference(name)
    made.convention, steps = name.split("_")[0], int(name.split("_")[-1])
    latents = made(
        [str(prompt) for prompt in given["prompts"]],
        latents=given["z"],
        num_inference_steps=steps,
        guidance_scale=4.5,
        use_resolution_binning=False,
        output_type="latent",
        progress=False,
    ).images
    return {"latents": latents, "images": made.decode(Tensor(latents))}


def guided(name, dtype):
    """Latents after two steps of a reference case: a mask, perturbed attention in the last block, a ControlNet."""
    case = Case(name)
    network = dit(case, dtype).set_train(False)
    controlnet = ControlNet.from_dit(network, network.config.depth - 1, parameter_dtype=DTYPES[dtype])
    for key, parameter in controlnet.parameters_and_names():
        if not key.startswith("blocks."):
            parameter.set_data(Tensor(0.1 * drawn_weight(3, key, parameter.shape), parameter.dtype))
    latents, _, caption, kept = case.inputs()
    given, mask = latents.asnumpy(), np.zeros((1, 1, *latents.shape[2:]), np.float32)
    mask[..., : mask.shape[3] // 2] = 1
    run = denoising_steps(
        DenoisingGraphs(align_heads(network)), latents,
        Inpainting(DPMSolver(), given[:, ::-1], given, mask), 2, (caption, kept), 4.5, (-caption, kept),
        pag=PerturbedAttention((network.config.depth - 1,), 3.0),
        controls=[Control(align_heads(controlnet.set_train(False)), given[:1, :, ::-1])],
    )  # fmt: skip
    return {"latents": [*run][-1].latents}


def compute(name, dtype):
    """Arrays of a network by their names, in float32."""
    if name.startswith("gradients-"):
        parts = gradients(name.split("-")[1], dtype)
    elif name.startswith("guided-"):
        parts = guided(name.split("-")[1], dtype)
    elif name.startswith("pieces-"):
        parts = in_pieces(name.split("-")[1], dtype)
    elif name in ("t5", "vae"):
        parts = {"t5": t5, "vae": vae}[name](dtype)
    else:
        parts = sample(name, dtype) if "dpm" in name else output(name, dtype)
    return {
        part: np.asarray(value.astype(ms.float32).asnumpy() if isinstance(value, Tensor) else value)
        for part, value in parts.items()
    }


def main(out, *jobs):
    """Compute the jobs on Ascend and save them."""
    set_device("Ascend")
    results = {}
    for job in jobs:
        name, dtype, mode = job.split(":")
        ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
        results |= {f"{job}:{part}": value for part, value in compute(name, dtype).items()}
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])

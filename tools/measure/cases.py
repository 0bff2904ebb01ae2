"""The cases that stay in one process, by mindsigma; a worker (worker.py)."""

import sys

import numpy as np

from measure import problems
from measure.worker import serve
from mindsigma.errors import MindSigmaError


def mini_images(batch):
    """A function (options) that prepares `batch` images of 256 px in 20 steps, prompts to pictures, by sigma-mini."""

    def prepare(options):
        from mindsigma import PixArtSigmaPipeline

        pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
        prompts, noise = list(problems.PROMPTS[:batch]), problems.start_noise(batch)

        def run():
            images = pipeline(
                prompts,
                latents=noise,
                num_inference_steps=problems.STEPS,
                guidance_scale=problems.GUIDANCE,
                progress=False,
            ).images
            return np.stack([np.asarray(image) for image in images])

        return run

    return prepare


def mini_step(options):
    """One call of sigma-mini's DiT: batch 2, 300 text tokens, no work shared with another call."""
    from mindspore import Tensor

    from mindsigma import load_dit
    from mindsigma.runtime import set_device

    set_device()
    dit = load_dit("sigma-mini")
    inputs = [Tensor(array) for array in problems.dit_inputs(256, dit.config.caption_channels)]
    return lambda: dit(*inputs).asnumpy()


def mini_decode_4k(options):
    """Tiled decode of 4096 x 4096 pixels by sigma-mini's VAE, without turning them into a picture."""
    from mindsigma import PixArtSigmaPipeline
    from mindsigma.models.vae_tiling import decode_tiled

    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini")
    latents = np.random.default_rng(0).standard_normal((1, 4, 512, 512), np.float32)

    def run():
        decode_tiled(pipeline.vae, latents)

    return run


def xl_step(name, pixels):
    """A function (options) that prepares `guided_steps`."""
    return lambda options: guided_steps(name, pixels)


def guided_steps(name, pixels):
    """A run of one guided step (batch 2, solver included) of a preset with random weights.

    What depends on the text or on the timesteps alone is made before the first step of an image and not timed.
    """
    from mindspore import Tensor

    from mindsigma.backends.cpu.sampler import accelerate_graphs, accelerate_sampler
    from mindsigma.models.dit import DiT
    from mindsigma.models.dit_config import preset
    from mindsigma.runtime import set_device
    from mindsigma.sampling.denoising import DenoisingGraphs, denoising_steps
    from mindsigma.sampling.dpm_solver import DPMSolver

    set_device()
    dit = random_network(lambda: DiT(preset(name)))
    latents, _, states, mask = (Tensor(x) for x in problems.dit_inputs(pixels, dit.config.caption_channels))
    trajectory = denoising_steps(
        accelerate_graphs(DenoisingGraphs(dit)),
        latents[1:],
        accelerate_sampler(DPMSolver(), dit),
        100,
        (states[1:], mask[1:]),
        problems.GUIDANCE,
        (states[:1], mask[:1]),
    )
    next(trajectory)
    return lambda: finite(next(trajectory).latents.asnumpy(), name)


def vae_512(options):
    """Decode of 512 px by an SDXL VAE with random weights, untiled."""
    from mindspore import Tensor

    from mindsigma.models.vae import VAE
    from mindsigma.models.vae_config import VAEConfig
    from mindsigma.runtime import set_device

    set_device()
    vae, latents = random_network(lambda: VAE(VAEConfig())), Tensor(problems.vae_latents())
    return lambda: finite(vae(latents).asnumpy(), "vae-512")


def t5_mini(options):
    """sigma-mini's T5 over 300 tokens."""
    from mindsigma.runtime import set_device
    from mindsigma.weights.loading import open_t5
    from mindsigma.weights.locate import locate

    set_device()
    return encoding(open_t5(locate("sigma-mini")).load())


def t5_xxl(options):
    """The first layers of a T5-XXL over 300 tokens, random weights."""
    from mindsigma.models.t5 import T5Config, T5Encoder
    from mindsigma.runtime import set_device

    set_device()
    return encoding(random_network(lambda: T5Encoder(T5Config(num_layers=problems.T5_LAYERS))))


def encoding(encoder):
    """A run of a T5Encoder over 300 tokens."""
    from mindspore import Tensor

    ids = problems.token_ids(encoder.config.vocab_size)
    ids, mask = Tensor(ids), Tensor(np.ones(ids.shape, np.int32))
    return lambda: finite(encoder(ids, mask).asnumpy(), "T5")


def random_network(build):
    """The network with normal weights of scale 0.02, as fast as it is where it is loaded from files."""
    from mindspore import Tensor
    from mindspore.nn.utils import no_init_parameters

    from mindsigma.backends.cpu import accelerate

    with no_init_parameters():
        network = build()
    rng = np.random.default_rng(0)
    for parameter in network.get_parameters():
        value = rng.standard_normal(parameter.shape, np.float32) * np.float32(problems.WEIGHT_SCALE)
        parameter.set_data(Tensor(value))
    return accelerate(network)


def finite(values, what):
    """The values, if all are finite."""
    if not np.isfinite(values).all():
        raise MindSigmaError(f"{what} gave values that are not finite")
    return values


CASES = {
    "mini-warm": mini_images(1),
    "mini-warm-4": mini_images(4),
    "mini-step": mini_step,
    "mini-decode-4k": mini_decode_4k,
    **{case: xl_step(*model) for case, model in problems.XL_STEPS.items()},
    "vae-512": vae_512,
    "t5-mini": t5_mini,
    "t5-xxl-2": t5_xxl,
}

if __name__ == "__main__":
    try:
        serve(CASES)
    except MindSigmaError as error:
        sys.exit(f"error: {error}")

"""The cases of tools/benchmark.py by diffusers and transformers; a worker in an environment of its own.

The options name `folder`, sigma-mini as tools/convert.py --to diffusers writes it, beside `tokens.npz`: token ids of
the prompts and of the empty prompt, so that this environment needs no tokenizer.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from measure import problems
from measure.worker import serve

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


def pipeline_of(folder):
    """diffusers' PixArtSigmaPipeline with sigma-mini's weights."""
    from diffusers import PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline.from_pretrained(folder, tokenizer=None, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, folder, batch, latents):
    """List of PIL images of the first prompts, prompts padded to 300 tokens as the pipeline itself does."""
    tokens = np.load(Path(folder) / "tokens.npz")
    ids, mask = torch.from_numpy(tokens["ids"][:batch]), torch.from_numpy(tokens["mask"][:batch])
    empty, empty_mask = (torch.from_numpy(tokens[name]).repeat(batch, 1) for name in ("empty", "empty_mask"))
    with torch.no_grad():
        states = pipeline.text_encoder(ids, attention_mask=mask)[0]
        negative = pipeline.text_encoder(empty, attention_mask=empty_mask)[0]
    return pipeline(
        negative_prompt=None,
        prompt_embeds=states,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=empty_mask,
        num_inference_steps=problems.STEPS,
        guidance_scale=problems.GUIDANCE,
        height=256,
        width=256,
        latents=torch.from_numpy(latents),
    ).images


def mini_images(batch):
    """See measure/cases.py."""

    def prepare(options):
        pipeline, noise = pipeline_of(options["folder"]), problems.start_noise(batch)
        return lambda: np.stack([np.asarray(x) for x in draw(pipeline, options["folder"], batch, noise)])

    return prepare


def transformer_step(model, pixels):
    """A run of one call of a transformer: batch 2, 300 text tokens."""
    latents, timestep, states, mask = map(torch.from_numpy, problems.dit_inputs(pixels, model.config.caption_channels))

    def run():
        with torch.inference_mode():
            result = model(
                latents,
                encoder_hidden_states=states,
                timestep=timestep,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
        return finite(result)

    return run


def mini_step(options):
    """See measure/cases.py."""
    from diffusers import PixArtTransformer2DModel

    return transformer_step(PixArtTransformer2DModel.from_pretrained(Path(options["folder"]) / "transformer"), 256)


def xl_step(pixels):
    """See measure/cases.py; the solver, a sum of a few tensors of latents, is left out here."""

    def prepare(options):
        from diffusers import PixArtTransformer2DModel

        return transformer_step(random(PixArtTransformer2DModel(sample_size=pixels // 8, **XL)), pixels)

    return prepare


def vae_512(options):
    """See measure/cases.py."""
    from diffusers import AutoencoderKL

    vae = random(
        AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.13025,
        )
    )
    latents = torch.from_numpy(problems.vae_latents()) / vae.config.scaling_factor

    def run():
        with torch.inference_mode():
            return finite(vae.decode(latents).sample)

    return run


def t5_mini(options):
    """See measure/cases.py."""
    from transformers import T5EncoderModel

    return encoding(
        T5EncoderModel.from_pretrained(Path(options["folder"]) / "text_encoder", dtype=torch.float32).eval()
    )


def t5_xxl(options):
    """See measure/cases.py."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=problems.T5_LAYERS,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return encoding(random(T5EncoderModel(config)))


def encoding(encoder):
    """A run of a T5 over 300 tokens."""
    ids = torch.from_numpy(problems.token_ids(encoder.config.vocab_size)).long()
    mask = torch.ones_like(ids)

    def run():
        with torch.inference_mode():
            return finite(encoder(ids, attention_mask=mask)[0])

    return run


def random(network):
    """The network in evaluation mode with normal weights of scale 0.02."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, problems.WEIGHT_SCALE, generator=generator)
    return network.eval()


def finite(tensor):
    """As a NumPy array, if all values are finite."""
    values = tensor.numpy()
    if not np.isfinite(values).all():
        sys.exit("values that are not finite")
    return values


CASES = {
    "mini-warm": mini_images(1),
    "mini-warm-4": mini_images(4),
    "mini-step": mini_step,
    "xl-256": xl_step(256),
    "xl-512": xl_step(512),
    "xl-1024": xl_step(1024),
    "vae-512": vae_512,
    "t5-mini": t5_mini,
    "t5-xxl-2": t5_xxl,
}

if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    serve(CASES)

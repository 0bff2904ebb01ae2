"""The cases of tools/benchmark.py that mindone's own transformer can do; a worker in this project's environment.

The options are those of diffusers_cases.py.
"""

import sys
from pathlib import Path

import mindspore as ms
import numpy as np
from measure import problems
from measure.worker import serve
from mindone_ops import install
from mindspore import Tensor

XL = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}


def transformer_step(model, pixels):
    """A run of one call of a transformer in graph mode, which is the fastest on a CPU: batch 2, 300 text tokens."""
    ms.set_context(mode=ms.GRAPH_MODE)
    model.set_train(False)
    latents, timestep, states, mask = map(Tensor, problems.dit_inputs(pixels, model.config.caption_channels))

    def run():
        values = model(latents, states, timestep, None, None, None, mask)[0].asnumpy()
        if not np.isfinite(values).all():
            sys.exit("values that are not finite")
        return values

    return run


def mini_step(options):
    """See measure/cases.py."""
    return transformer_step(install().from_pretrained(str(Path(options["folder"]) / "transformer")), 256)


def xl_step(pixels):
    """See measure/cases.py; without the solver."""

    def prepare(options):
        model = install()(sample_size=pixels // 8, **XL)
        rng = np.random.default_rng(0)
        for parameter in model.get_parameters():
            value = rng.standard_normal(parameter.shape, np.float32) * np.float32(problems.WEIGHT_SCALE)
            parameter.set_data(Tensor(value))
        return transformer_step(model, pixels)

    return prepare


CASES = {"mini-step": mini_step, "xl-256": xl_step(256)}

if __name__ == "__main__":
    serve(CASES)

"""generate.py --fast: sigma-mini's own LCM-LoRA draws what the prompt asks for in four steps."""

import numpy as np
import pytest
from conftest import load_tool

from mindsigma import PixArtSigmaPipeline
from mindsigma.choices import FAST
from mindsigma.commands.generate_options import build_parser, make_fast
from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_file import read_adapter
from mindsigma.weights.locate import locate

COLOURS = {
    "a penguin on a yellow background": (250, 210, 40),
    "a cat on a blue background": (40, 90, 210),
    "a dragon on a black background": (16, 16, 16),
}


def parsed(*arguments):
    args = build_parser().parse_args(["a cat", *arguments])
    make_fast(args)
    return args


def test_what_fast_stands_for():
    args = parsed("--fast", "--lora", "style.safetensors")
    assert (args.sampler, args.lora) == ("lcm", [FAST, "style.safetensors"])
    sampling = load_tool("generate").check(args, 1)
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (4, 1.0)
    assert parsed().lora is None


@pytest.mark.parametrize(
    "arguments,said", [(("--model", "models/x"), "bundled sigma-mini"), (("--sampler", "dpm"), "leave out one")]
)
def test_what_does_not_go_with_it(arguments, said):
    with pytest.raises(MindSigmaError, match=said):
        parsed("--fast", *arguments)


def test_the_adapter_is_small():
    adapter = read_adapter(locate(FAST))
    assert locate(FAST).stat().st_size < 4e6
    assert all(array.dtype == np.float16 for entry in adapter.entries.values() for array in (entry.a, entry.b))


def test_four_steps_draw_what_is_asked():
    """The corners have the background's colour, the middle has not; without the adapter four steps miss that."""
    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini", lora=[FAST])
    for seed, (prompt, colour) in enumerate(COLOURS.items()):
        (image,) = pipeline(prompt, sampler="lcm", seed=seed, output_type="np", progress=False).images
        image = image * 255
        corners = np.stack(
            [image[y, x] for y in (slice(4, 20), slice(-20, -4)) for x in (slice(4, 20), slice(-20, -4))]
        )
        assert np.abs(corners.mean((1, 2)) - colour).max() < 60, prompt
        assert np.abs(image[96:160, 96:160].mean((0, 1)) - colour).max() > 30, prompt

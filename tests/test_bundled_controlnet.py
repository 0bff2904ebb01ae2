"""The ControlNet of edges that is part of the package, and the tool that compares what is drawn with what was asked."""

import numpy as np
import pytest
from conftest import load_tool

from mindsigma import PixArtSigmaPipeline
from mindsigma.data.conditions import Condition
from mindsigma.data.scenes import SceneMaker, draw, load_things

NAME = "sigma-mini-canny"
FIRST, COUNT = 900, 3  # scenes of another seed than it was trained on


def test_agreement():
    """A line beside the asked one counts within the tolerance; half of a line is all precise, and half found."""
    agreement = load_tool("compare_controls").agreement
    asked, beside = np.zeros((2, 40, 40), bool)
    asked[10:30, 20] = True
    beside[10:30, 22] = True
    assert agreement(beside, asked, 2) == (1.0, 1.0, pytest.approx(1.0))
    assert agreement(beside, asked, 1) == (0.0, 0.0, 0.0)
    half = asked.copy()
    half[20:] = False
    precision, recall, f1 = agreement(half, asked, 0)
    assert (precision, recall, f1) == (1.0, 0.5, pytest.approx(2 / 3))
    nothing = np.zeros_like(asked)
    assert agreement(nothing, asked, 2) == (0.0, 0.0, 0.0) and agreement(nothing, nothing, 2) == (1.0, 1.0, 1.0)


def test_it_draws_nearer_to_the_edges():
    """Of scenes that it has not seen, from the same noise with and without it."""
    tool, condition = load_tool("compare_controls"), Condition.of("canny")
    pipeline = PixArtSigmaPipeline.from_pretrained("sigma-mini", controlnet=NAME)
    maker, found = SceneMaker(load_things(), seed=77), {0.0: [], 1.0: []}
    for number in range(FIRST, FIRST + COUNT):
        scene = maker.scene(number)
        asked = condition.computed(draw(scene, 256, 256).convert("RGB"))
        for scale, scores in found.items():
            options = {"control_image": asked, "control_scale": scale, "num_inference_steps": 6}
            picture = pipeline(scene.caption, seed=number, progress=False, **options).images[0]
            scores.append(tool.agreement(tool.edges_of(picture, condition), np.asarray(asked)[..., 0] > 0, 2)[2])
    assert np.mean(found[1.0]) > np.mean(found[0.0]) + 0.05, found

"""What the page makes of a form and of a picture, and what it shows of a drawing; gradio is not needed for that."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mindsigma.choices import FAST
from mindsigma.commands.web import build_parser, labels_of
from mindsigma.data.conditions import Condition
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.metadata import read
from mindsigma.web.limits import Limits
from mindsigma.web.page import AS_IT_IS, NO_CONTROL, RATIOS, Page
from mindsigma.web.studio import Studio
from mindsigma.weights.digests import digest_of
from mindsigma.weights.locate import locate

ONCE = {"sampler": "one-step", "num_inference_steps": 1, "guidance_scale": 1.0, "timesteps": (650,)}
SAME = object()  # in the place of gradio's value for what stays as it is
FIELDS = ["the prompt", "", "3:2", 1, 7, "dpm", 3, 4.5, 0, "sigma-mini", False, None, 0.6]
FIELDS += [NO_CONTROL, None, 1, AS_IT_IS]


@pytest.fixture(scope="module")
def studio():
    from mindsigma import PixArtSigmaPipeline

    made = Studio(
        PixArtSigmaPipeline.from_pretrained, ["sigma-mini", "distilled", "at once"],
        {"style.safetensors": FAST, FAST: FAST}, Limits(steps=50, bytes=1 << 20),
        samplers={"distilled": {"sampler": "lcm"}, "at once": ONCE},
    )  # fmt: skip
    made.open_first()
    yield made
    made.close()


@pytest.fixture
def page(studio, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(skip=lambda: SAME, update=lambda **values: values))
    return Page(studio, tmp_path)


def editor(background, *layers):
    """What gradio's ImageEditor gives."""
    return {"background": background, "layers": list(layers), "composite": background}


def test_labels_hide_where_files_are(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("x.safetensors", "a/x.safetensors"):
        (tmp_path / name).touch()
    labels = labels_of([str(tmp_path / "x.safetensors"), str(tmp_path / "a" / "x.safetensors"), "owner/name"])
    assert list(labels) == ["x.safetensors", "x.safetensors (2)", "owner/name"]
    assert build_parser().parse_args([]).host == "127.0.0.1"


def test_a_model_brings_its_sampler(page):
    """As it was distilled; also where an order names none."""
    assert page.own("sigma-mini") == (False, "dpm", 20, 4.5)
    assert page.own("distilled") == (False, "lcm", 4, 1.0)
    assert page.own("at once") == (False, "one-step", 1, 1.0)
    assert page.studio.usual("iddpm") == (50, 4.5), "of 100, the page allows 50"
    order = page.order(*FIELDS, False, 1)
    options = {name: value for name, value in order.options.items() if name == "height"}
    checked = page.studio._checked(order.__class__(order.prompt, options=options, model="distilled"))
    assert checked.options["sampler"] == "lcm"
    asked = {"sampler": "one-step", "num_inference_steps": 1, "guidance_scale": 1.0}
    for model, times in (("at once", (650,)), ("distilled", None)):
        checked = page.studio._checked(order.__class__(order.prompt, options=asked, model=model))
        assert checked.options.get("timesteps") == times


def test_the_models_of_the_hub_that_were_distilled():
    from mindsigma.weights.released import default_sampler

    assert default_sampler("PixArt-alpha/PixArt-LCM-XL-2-1024-MS") == "lcm"
    assert default_sampler("PixArt-Alpha-DMD-XL-2-512x512") == "one-step" and default_sampler("sigma-mini") == "dpm"


def test_fast(page):
    """The bundled model's own LCM-LoRA: chosen, it brings its sampler; it goes with no other model and sampler."""
    assert page.own("sigma-mini", True) == (True, "lcm", 4, 1.0) and page.own("at once", True)[:2] == (
        False,
        "one-step",
    )
    assert page.adapters == ["style.safetensors"], "it is not listed beside the others"
    fast = [*FIELDS[:5], "lcm", 4, 1.0, *FIELDS[8:10], True, *FIELDS[11:], True, 0.5]
    assert page.order(*fast).adapters == ((FAST, 1.0), ("style.safetensors", 0.5))
    for place, value in ((5, "dpm"), (9, "at once")):
        with pytest.raises(MindSigmaError, match="Fast is for sigma-mini with sampler lcm"):
            page.order(*fast[:place], value, *fast[place + 1 :])
    fields = [*FIELDS[:5], True, "lcm", 4, 1.0, *FIELDS[8:10], True, *FIELDS[11:], False, 1]
    path = [one[2] for one in page.draw("a", *fields) if one[2] is not SAME and one[2]][0][0][0]
    with open(path, "rb") as file:
        options, digests = read(file.read())
    assert options["lora"] == [f"{FAST}:1"] and digests[f"lora: {FAST}"] == digest_of(locate(FAST))
    values = page.filled(options)
    assert (
        values[5:8] == ["lcm", 4, 1.0]
        and values[10] is True
        and values[12].endswith("Filled in from the picture.</div>")
    )
    assert page.filled({"lora": [FAST], "model": "sigma-mini"})[10] is True, "as tools/generate.py --fast tells it"


def test_an_order(page):
    order = page.order(*FIELDS, True, 0.5)
    assert (order.ratio, order.image, order.mask, order.control) == (RATIOS["3:2"], None, None, "")
    assert order.adapters == (("style.safetensors", 0.5),) and "strength" not in order.options
    with pytest.raises(MindSigmaError, match="size: '5:1' is none of this page's"):
        page.order(*FIELDS[:2], "5:1", *FIELDS[3:], False, 1)


def test_a_painted_picture(page):
    """Where strokes cover half of a pixel is the mask; without strokes there is none; layers of other sizes are not."""
    background = Image.new("RGBA", (8, 4), (200, 10, 10, 255))
    strokes = np.zeros((4, 8, 4), np.uint8)
    strokes[1, 2, 3], strokes[2, 3, 3] = 127, 128
    picture, mask = page.given(editor(background, Image.fromarray(strokes), Image.new("RGBA", (3, 3), "white"), None))
    expected = np.zeros((4, 8), np.uint8)
    expected[2, 3] = 255
    assert picture is background
    np.testing.assert_array_equal(np.asarray(mask), expected)
    assert page.given(editor(background, Image.new("RGBA", (8, 4)))) == (background, None)
    assert page.given(editor(None)) == page.given(None) == (None, None)
    fields = [*FIELDS[:11], editor(background), *FIELDS[12:]]
    order = page.order(*fields, False, 1)
    assert order.ratio is None and order.options["strength"] == 0.6, "the picture decides the size"
    with pytest.raises(MindSigmaError, match="5000 x 4000 pixels, more than"):
        page.given(editor(Image.new("L", (5000, 4000))))


def test_a_photo_is_made_a_condition(page, monkeypatch):
    """As tools/make_condition.py makes it; the picture's size decides."""
    monkeypatch.setattr(page.studio, "controls", {"edges": "nowhere"})
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))
    order = page.order(*FIELDS[:13], "edges", photo, 0.8, "edges", False, 1)
    assert (order.ratio, order.condition, order.options["control_scale"]) == (None, "edges", 0.8)
    checked = page.studio._checked(order)
    assert checked.condition == "edges:1"
    np.testing.assert_array_equal(np.asarray(checked.control_image), np.asarray(Condition.of("edges").computed(photo)))
    as_it_is = page.studio._checked(page.order(*FIELDS[:13], "edges", photo, 0.8, AS_IT_IS, False, 1))
    np.testing.assert_array_equal(np.asarray(as_it_is.control_image), np.asarray(photo))
    with pytest.raises(MindSigmaError, match="condition: 'blur:1000' is none of this page's"):
        page.studio._checked(page.order(*FIELDS[:13], "edges", photo, 0.8, "blur:1000", False, 1))


def test_what_a_picture_tells_is_a_table(page):
    told = page.table({"prompt": "<b>", "drawn_size": "8x8", "negative_prompt": ""})
    assert "<td>&lt;b&gt;</td>" in told and "<th>drawn size</th>" in told and "negative" not in told
    assert "Choose a picture" in page.table({})


def test_filled_in_values_are_bounded(page):
    """Whatever a picture tells, the form gets values that it can hold."""
    options = {
        "prompt": ["x"], "steps": 10**9, "guidance_scale": -5, "seed": 2**40, "model": "/etc", "sampler": ["dpm"],
        "lora": ["style.safetensors:99", "other:1", "x:y"], "height": 100, "width": 300, "image": "a.png",
    }  # fmt: skip
    values = page.filled(options)
    assert values[0] == "x" and values[2] == "16:9" and values[3] == 2**32 - 1 and values[6] == 50 and values[7] == 1
    assert values[5] == "dpm" and values[9:11] == ["sigma-mini", False] and values[13:] == [True, 2]
    for words in (
        "the model /etc is none",
        "the adapter other is none",
        "the adapter x is none",
        "has to be given again",
    ):
        assert words in values[12]
    values = page.filled({"model": "distilled"})
    assert values[5:8] == ["lcm", 4, 1.0]


def test_what_is_no_picture_of_ours(page):
    *same, line, _, _ = page.fill(b"text")
    assert same == [SAME] * 12 and "is no PNG" in line
    assert "at most 1 MB" in page.fill(b"x" * (2 << 20))[12]


def test_a_drawing_is_shown(page):
    """Waiting, steps with a bar, the picture's file, which goes when its user goes; mistakes are escaped."""
    fields = [*FIELDS[:5], True, *FIELDS[5:], False, 1]
    shown = list(page.draw("somebody", *fields))
    lines = [one[0] for one in shown if one[0] is not SAME]
    assert "Waiting." in lines[0] and "Step 1 of 3" in "".join(lines) and "width: 67%" in "".join(lines)
    assert "Done: 1 picture." in lines[-1] and shown[-1][1] == {"visible": False, "value": None}
    ((path, caption),) = next(one[2] for one in shown if one[2] is not SAME and one[2])
    (told,) = next(one[3] for one in shown if one[3] is not SAME and one[3])
    assert caption == "seed 7" and told["prompt"] == "the prompt" and "parameters" not in told
    with open(path, "rb") as file:
        options, _ = read(file.read())
    assert (options["steps"], options["seed"], options["width"] > options["height"]) == (3, 7, True)
    assert [file.name for file in (page.folder / "pictures").iterdir()] == [path.rpartition("/")[2]]
    assert "the prompt" not in path
    page.leave("somebody")
    assert not list((page.folder / "pictures").iterdir())
    (wrong,) = page.draw("somebody", "a cat", "", "<b>", *fields[3:])
    assert "&lt;b&gt;" in wrong[0] and "<b>" not in wrong[0] and 'class="error"' in wrong[0]


def test_seeds_are_new_unless_kept(page):
    fields = [*FIELDS[:5], False, *FIELDS[5:], False, 1]
    seeds = [next(page.draw("a", *fields))[4] for _ in range(2)]
    assert len({7, *seeds}) == 3

"""The queue behind the web page: users take turns, may cancel, and cannot ask for more than the page allows."""

import io
import threading
import time

import numpy as np
import pytest
from PIL import Image

from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.metadata import read
from mindsigma.web.limits import Limits
from mindsigma.web.preview import Preview
from mindsigma.web.studio import Ended, Order, Picture, Step, Studio, Waiting

OPTIONS = {"num_inference_steps": 2, "height": 64, "width": 64, "use_resolution_binning": False}


@pytest.fixture(scope="module")
def studio():
    from mindsigma import PixArtSigmaPipeline

    made = Studio(PixArtSigmaPipeline.from_pretrained, ["sigma-mini"], limits=Limits(steps=200, waiting=3))
    made.open_first()
    yield made
    made.close()


def order(prompt="a red apple", steps=2, **changes):
    return Order(prompt, options={**OPTIONS, "num_inference_steps": steps}, **changes)


def test_a_drawing_tells_how_far_it_is(studio, mini):
    events = list(studio.submit(order(pictures=2, seed=5), "a").events())
    steps = [event for event in events if isinstance(event, Step)]
    assert [(one.step, one.steps, one.picture, one.pictures) for one in steps] == [
        (1, 2, 1, 2), (2, 2, 1, 2), (1, 2, 2, 2), (2, 2, 2, 2),
    ]  # fmt: skip
    assert steps[0].preview.size == (256, 256)
    assert isinstance(events[0], Waiting) and events[-1] == Ended()
    first, second = (event for event in events if isinstance(event, Picture))
    assert (first.seed, second.seed) == (5, 6)
    expected = mini("a red apple", seed=6, progress=False, **OPTIONS).images[0]
    assert np.abs(np.asarray(second.image, int) - np.asarray(expected, int)).max() <= 1
    with Image.open(io.BytesIO(second.png)) as picture:
        assert picture.text["prompt"] == "a red apple" and picture.text["seed"] == "6"
    options, digests = read(second.png)
    assert (options["prompt"], options["seed"], options["model"]) == (["a red apple"], 6, "sigma-mini")
    assert set(digests) == {"dit", "vae", "t5"}


def test_users_take_turns_and_cancel(studio):
    """The second waits for the first, which is cancelled in the middle; the third is cancelled while it waits."""
    first = studio.submit(order(steps=150), "a")
    events = first.events()
    assert any(isinstance(event, Step) for event in events)  # it has begun
    second, third = studio.submit(order(), "b"), studio.submit(order(), "c")
    assert third._events.get() == Waiting(2)
    assert studio.cancel("c") == 1 and studio.waiting == 1
    found = []
    listening = threading.Thread(target=lambda: found.extend(second.events()))
    listening.start()
    assert studio.cancel("a") == 1
    assert list(events)[-1] == Ended(cancelled=True)
    listening.join(60)
    assert found[0] == Waiting(1) and isinstance(found[-2], Picture) and found[-1] == Ended()


def test_who_stops_listening_cancels(studio):
    ticket = studio.submit(order(steps=150), "a")
    events = ticket.events()
    next(events)
    events.close()
    assert ticket.cancelled
    assert list(studio.submit(order(), "a").events())[-1] == Ended()


def test_the_queue_is_bounded(studio):
    long = [studio.submit(order(steps=200), "a")]
    while studio.waiting:  # until it is taken up
        time.sleep(0.001)
    long.append(studio.submit(order(), "a"))
    with pytest.raises(MindSigmaError, match="2 of your drawings are not done yet"):
        studio.submit(order(), "a")
    long += [studio.submit(order(), "b"), studio.submit(order(), "b")]
    with pytest.raises(MindSigmaError, match=r"the queue is full \(3 drawings wait\)"):
        studio.submit(order(), "c")
    assert studio.cancel("a") + studio.cancel("b") == 4
    assert all(list(ticket.events())[-1].cancelled for ticket in long)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " "}, "prompt: tell what to draw"),
        ({"prompt": "x" * 5000}, "prompt: at most 4000 characters"),
        ({"prompt": 3}, "prompt: at most"),
        ({"steps": 201}, "steps must be a whole number of 1 ... 200, not 201"),
        ({"pictures": 9}, "pictures must be a whole number of 1 ... 8"),
        ({"pictures": "2"}, "pictures must be a whole number"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"model": "/etc/passwd"}, "model: '/etc/passwd' is none of this page's"),
        ({"adapters": (("../x", 1.0),)}, "adapter: '../x' is none of this page's"),
        ({"image": b"no picture"}, "not an image"),
        ({"image": b"x" * (21 << 20)}, "at most 20 MB"),
        ({"image": Image.new("RGB", (5000, 4000))}, "5000 x 4000 pixels, more than the 16,777,216"),
        ({"mask": Image.new("L", (8, 8))}, "mask: give the picture that it belongs to"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(studio, changes, words):
    with pytest.raises(MindSigmaError, match=words):
        studio.submit(order(**changes), "a")


def test_a_mistake_of_one_does_not_end_the_page(studio):
    wrong = Order("a cat", options={**OPTIONS, "height": 72})
    end = list(studio.submit(wrong, "a").events())[-1]
    assert "height 72 is not a multiple of 16" in end.error
    assert list(studio.submit(order(), "a").events())[-1] == Ended()


def test_drawing_from_a_picture_with_a_mask(studio):
    """What the mask keeps is kept; the PNG says that the picture has to be given again."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    events = list(studio.submit(order(steps=4, image=picture, mask=mask), "a").events())
    assert events[-1] == Ended(), events[-1]
    (drawn,) = (event for event in events if isinstance(event, Picture))
    difference = np.abs(np.asarray(drawn.image, int) - np.asarray(picture, int)).max(2)
    assert difference[:, :32].max() == 0 and difference[:, 32:].mean() > 10
    assert read(drawn.png)[0]["image"] == "uploaded picture"


def test_a_picture_tells_the_size_it_was_drawn_at(studio):
    """Of a picture that is drawn from, as tools/generate.py tells it; of a shape, the nearest trained size."""
    told, notes = [], []
    for changes in ({"image": Image.new("RGB", (410, 300), "red")}, {"ratio": 0.5}):
        asked = Order("a red apple", options={"num_inference_steps": 2}, **changes)
        *events, end = studio.submit(asked, "a").events()
        told += [event.told for event in events if isinstance(event, Picture)]
        notes.append(end.notes)
    assert [(one["size"], one["drawn_size"]) for one in told] == [("288x208", "288x208"), ("352x176", "352x176")]
    assert notes == [("image: 300 x 410 (height x width), drawn at 208 x 288: cropped to 296 x 410, then resized",), ()]


def test_a_preview_is_like_the_picture(mini):
    """Of clean latents: the colours of the decoded picture, made small."""
    latents = mini("a red apple", seed=0, num_inference_steps=8, progress=False, output_type="latent").images
    shown = np.asarray(Preview(mini)(latents).resize((32, 32), Image.Resampling.BOX), float)
    decoded = mini.decode(latents)[0].reshape(32, 8, 32, 8, 3).mean((1, 3)) * 255
    assert np.corrcoef(shown.ravel(), decoded.ravel())[0, 1] > 0.9

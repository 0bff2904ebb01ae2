"""Captioned scenes of emoji: things on a plain colour, alone, in pairs or counted, as sigma-mini was trained on."""

import difflib
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mindsigma.data.randomness import generator
from mindsigma.errors import MindSigmaError

SPRITES = Path(__file__).resolve().parent.parent / "bundled" / "emoji"

COLOURS = {
    "white": (255, 255, 255),
    "black": (16, 16, 16),
    "gray": (128, 128, 128),
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 210, 40),
    "green": (50, 160, 70),
    "teal": (30, 150, 150),
    "blue": (40, 90, 210),
    "purple": (120, 60, 180),
    "pink": (245, 150, 190),
    "brown": (120, 75, 40),
}

# Shares of sigma-mini's training set. Sizes and places are fractions of the picture's shorter side.
PAIR_SHARE, COUNT_SHARE = 0.25, 0.15
TAGS_SHARE = 0.12  # of names told by tags instead
SILENT_WHITE_SHARE = 0.7  # of white backgrounds that the caption does not mention
NEAR, FAR = 0.27, 0.73  # of the picture's width or height
COUNTS = {
    "two": (0.45, [(NEAR, 0.5), (FAR, 0.5)]),
    "three": (0.42, [(0.5, 0.28), (NEAR, 0.72), (FAR, 0.72)]),
    "four": (0.42, [(NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)]),
}
LEFT, RIGHT, ABOVE, BELOW = (NEAR, 0.5), (FAR, 0.5), (0.5, NEAR), (0.5, FAR)
RELATIONS = (
    ("to the left of", LEFT, RIGHT),
    ("to the right of", RIGHT, LEFT),
    ("above", ABOVE, BELOW),
    ("below", BELOW, ABOVE),
    ("and", LEFT, RIGHT),
)


class Thing(NamedTuple):
    """An emoji: stem of its file, name, tags."""

    stem: str
    name: str
    tags: tuple


class Placed(NamedTuple):
    """A thing in a scene: centre as fractions of the picture's width and height, shift and size of its shorter side."""

    thing: Thing
    centre: tuple
    size: float
    shift: tuple = (0.0, 0.0)


class Scene(NamedTuple):
    """Caption, name of the background's colour, list of Placed."""

    caption: str
    colour: str
    objects: list

    def compositions(self):
        """What is combined in it: each thing with the colour, and two different things with each other."""
        names = sorted({placed.thing.name for placed in self.objects})
        return {(name, self.colour) for name in names} | ({tuple(names)} if len(names) == 2 else set())


def load_things(only=(), exclude=()):
    """List of the bundled Thing, or of those named. Raises MindSigmaError for a name that does not exist."""
    things = [Thing(stem, name, tuple(tags)) for stem, name, tags in json.loads((SPRITES / "rows.json").read_text())]
    names = {thing.name for thing in things}
    for name in [*only, *exclude]:
        if name not in names:
            near = difflib.get_close_matches(name, names, 3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise MindSigmaError(f"no emoji is named {name!r}{hint}; all names: {SPRITES / 'rows.json'}")
    chosen = [t for t in things if (not only or t.name in only) and t.name not in exclude]
    if not chosen:
        raise MindSigmaError("no emoji is left to compose scenes from; exclude fewer")
    return chosen


def is_held_out(scene, share):
    """Whether a scene has a composition that belongs to the held-out ones.

    Membership follows from the composition's names alone, so sets of different seeds and sizes agree on it.
    """
    return any(_unit_hash("|".join(composition)) < share for composition in scene.compositions())


class SceneMaker:
    """Draws scenes.

    Args:
        things: list of Thing.
        seed: int.
        held_out: share of the compositions (thing with colour, thing with thing) that training scenes never show.
    """

    TRIES = 10000

    def __init__(self, things, seed=0, held_out=0.0):
        if not 0 <= held_out < 1:
            raise MindSigmaError(f"the held-out share must lie in 0 ... 1 (exclusive), not {held_out}")
        self.things, self.seed, self.held_out = things, seed, held_out

    def scene(self, number, held_out=False):
        """Scene of a number: one without any held-out composition, or one with at least one. The same every time."""
        random = generator(self.seed, "held-out scene" if held_out else "scene", number)
        for _ in range(self.TRIES):
            scene = self._any(random)
            if is_held_out(scene, self.held_out) == held_out:
                return scene
        kind = "held-out" if held_out else "training"
        raise MindSigmaError(
            f"no {kind} scene found among {self.TRIES} of {len(self.things)} things with a held-out share of "
            f"{self.held_out}; change the share or take more things"
        )

    def _any(self, random):
        colour = _pick(random, list(COLOURS))
        kind = random.random()
        if kind < PAIR_SHARE:
            subject, objects = self._pair(random)
        elif kind < PAIR_SHARE + COUNT_SHARE:
            subject, objects = self._counted(random)
        else:
            subject, objects = self._single(random)
        return Scene(subject + _background(random, colour), colour, objects)

    def _single(self, random):
        thing = _pick(random, self.things)
        name = _called(random, thing)
        kind = random.random()
        size = random.uniform(0.66, 0.82)
        if kind < 0.12:
            subject, size = f"a small {name}", random.uniform(0.36, 0.46)
        elif kind < 0.2:
            subject, size = f"a large {name}", random.uniform(0.9, 0.98)
        else:
            form = random.random()
            if form < 0.3:
                subject = name
            elif form < 0.75:
                subject = with_article(name)
            else:
                subject = f"{'a 3D emoji' if form < 0.9 else 'an illustration'} of {with_article(name)}"
        return subject, [Placed(thing, (0.5, 0.5), size, tuple(random.uniform(-0.02, 0.02, 2).tolist()))]

    def _pair(self, random):
        first, second = _pick(random, self.things), _pick(random, self.things)
        relation, place, other = _pick(random, RELATIONS)
        size = random.uniform(0.42, 0.48)
        names = [with_article(_called(random, thing)) for thing in (first, second)]
        return f"{names[0]} {relation} {names[1]}", [Placed(first, place, size), Placed(second, other, size)]

    def _counted(self, random):
        thing = _pick(random, self.things)
        word = _pick(random, list(COUNTS))
        size, places = COUNTS[word]
        return f"{word} {plural(_called(random, thing))}", [Placed(thing, place, size) for place in places]


def draw(scene, height, width):
    """PIL image, RGB, of a scene at any size in pixels."""
    picture = Image.new("RGB", (width, height), COLOURS[scene.colour])
    short = min(height, width)
    for thing, centre, size, shift in scene.objects:
        side = max(1, round(size * short))
        emoji = sprite(thing.stem).resize((side, side), Image.Resampling.BICUBIC)
        left = round(centre[0] * width + shift[0] * short - side / 2)
        top = round(centre[1] * height + shift[1] * short - side / 2)
        picture.paste(emoji, (left, top), emoji)
    return picture


def with_article(name):
    """The name with "a" or "an", by its first letter."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name):
    """The plural of a name, by the endings of its last word."""
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2:-1] not in tuple("aeiou"):
        return f"{name[:-1]}ies"
    return f"{name}s"


def _background(random, colour):
    if colour == "white" and random.random() < SILENT_WHITE_SHARE:
        return ""
    # Twice, as it was twice as frequent.
    on = f" on a {colour} background"
    return _pick(random, (on, on, f" on {colour}", f", {colour} background"))


def _called(random, thing):
    if len(thing.tags) >= 2 and random.random() < TAGS_SHARE:
        count = min(len(thing.tags), int(random.integers(2, 4)))
        return " ".join(thing.tags[i] for i in random.choice(len(thing.tags), count, replace=False))
    return thing.name


def _pick(random, options):
    return options[int(random.integers(len(options)))]


def _unit_hash(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


@lru_cache(maxsize=1024)
def sprite(stem):
    """RGBA image of an emoji, by the stem of its file; it is cached, and not to be changed."""
    with Image.open(SPRITES / "sprites" / f"{stem}.webp", formats=("WEBP",)) as image:
        return image.convert("RGBA")

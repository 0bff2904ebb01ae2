"""Captioned pages of text on white: a word of a closed vocabulary, or a sentence, with an emoji beside it or alone."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Optional

from PIL import Image, ImageDraw, ImageFont

from mindsigma.data.randomness import generator
from mindsigma.data.scenes import COLOURS, Thing, is_held_out, sprite, with_article
from mindsigma.errors import MindSigmaError

KINDS = ("words", "sentences")

# Twenty short words, no two of them alike: none counts as another in TextAtlasEval's tolerant comparison. Each is one
# token of sigma-mini's T5, where it is not in quotes; other words would come to it letter by letter.
VOCABULARY = (
    "open", "taxi", "bank", "fish", "milk", "park", "zoo", "hotel", "music", "bus",
    "book", "gift", "stop", "train", "world", "love", "fire", "cold", "queen", "star",
)  # fmt: skip
INKS = ("black", "red", "blue", "green")
PICTURE_SHARE = 0.5  # of pages with an emoji
SENTENCE = (3, 10)  # words of a sentence, least and most

# Sizes and places are fractions of the page's shorter side.
LETTERS, SMALL_LETTERS = 0.25, 0.085  # of a word, of a sentence: size of the font
SHIFT = 0.02  # how far the text moves by lot, each way
LINE_SPACING = 1.35  # of the font's size
WIDEST = 0.92  # text over the page's width
PICTURE = 0.42


class Page(NamedTuple):
    """Caption, the text to be read, its words as written, colour of the letters, an emoji or None, size of the font.

    `letters` and `shift` (right, down) are shares of the shorter side.
    """

    caption: str
    text: str
    words: tuple
    ink: str
    thing: Optional[Thing]
    letters: float
    shift: tuple = (0.0, 0.0)

    def compositions(self):
        """What is combined in it: each word with the ink, and with the picture."""
        pairs = {(word, self.ink) for word in self.words}
        return pairs | ({(word, self.thing.name) for word in self.words} if self.thing else set())


class PageMaker:
    """Draws pages by lot.

    Args:
        things: list of Thing, the pictures.
        kind: "words", one word a page in large letters, or "sentences", some words of the emojis' names and tags.
        words: vocabulary; default VOCABULARY, or the emojis' names and tags for sentences.
        seed: int.
        held_out: share of the compositions (word with ink, word with picture) that training pages never show.
        pictures: share of the pages with a picture.
        inks: names of COLOURS for the letters; default INKS.
        letters: size of the font as a share of the page's shorter side; default LETTERS or SMALL_LETTERS. A text that
            does not fit is written smaller.
        shift: share of the shorter side, how far the text moves by lot, each way.

    Raises:
        MindSigmaError: a share is out of its range, a colour is unknown, or too few compositions are left.
    """

    TRIES = 10000

    def __init__(
        self,
        things,
        kind="words",
        words=(),
        seed=0,
        held_out=0.0,
        pictures=PICTURE_SHARE,
        inks=(),
        letters=None,
        shift=SHIFT,
    ):
        if not 0 <= held_out < 1:
            raise MindSigmaError(f"the held-out share must lie in 0 ... 1 (exclusive), not {held_out}")
        if not 0 <= pictures <= 1:
            raise MindSigmaError(f"the share of pages with a picture must lie in 0 ... 1, not {pictures}")
        for ink in inks:
            if ink not in COLOURS:
                raise MindSigmaError(f"{ink!r}: no colour of letters; choose of {', '.join(COLOURS)}")
        if letters is not None and not 0 < letters <= 1:
            raise MindSigmaError(f"the size of letters must lie in 0 ... 1 of the page's side, not {letters}")
        if not 0 <= shift < 0.5:
            raise MindSigmaError(f"the shift must lie in 0 ... 0.5 of the page's side, not {shift}")
        self.things, self.kind, self.seed, self.held_out, self.pictures = things, kind, seed, held_out, pictures
        self.inks, self.shift = tuple(inks) or INKS, shift
        self.letters = letters or (LETTERS if kind == "words" else SMALL_LETTERS)
        self.words = tuple(words) or (VOCABULARY if kind == "words" else _words_of(things))

    def scene(self, number, held_out=False):
        """Page of a number: one without any held-out composition, or one with at least one. The same every time."""
        random = generator(self.seed, "held-out page" if held_out else "page", number)
        for _ in range(self.TRIES):
            page = self._any(random)
            # Of a sentence some word nearly always is held out, so only its picture and the first word decide.
            if is_held_out(page._replace(words=page.words[:1]), self.held_out) == held_out:
                return page
        kind = "held-out" if held_out else "training"
        raise MindSigmaError(
            f"no {kind} page found among {self.TRIES} of {len(self.words)} words with a held-out share of "
            f"{self.held_out}; change the share or take more words"
        )

    def _any(self, random):
        large = self.kind == "words"
        count = 1 if large else int(random.integers(SENTENCE[0], SENTENCE[1] + 1))
        words = tuple(self.words[i] for i in random.integers(len(self.words), size=count))
        ink = self.inks[int(random.integers(len(self.inks)))]
        thing = self.things[int(random.integers(len(self.things)))] if random.random() < self.pictures else None
        shift = tuple(random.uniform(-self.shift, self.shift, 2).tolist())
        text = " ".join(words)
        subject = f"the word {text} in {ink} letters" if large else f'the text "{text}" in {ink} letters'
        caption = f"{with_article(thing.name)} above {subject}" if thing else subject
        return Page(caption, text, words, ink, thing, self.letters, shift)


def draw(page, height, width):
    """PIL image, RGB, of a page at any size in pixels."""
    picture = Image.new("RGB", (width, height), "white")
    short = min(height, width)
    below = 0.0  # where the text's part of the page begins, as a fraction of its height
    if page.thing is not None:
        side = max(1, round(PICTURE * short))
        emoji = sprite(page.thing.stem).resize((side, side), Image.Resampling.BICUBIC)
        picture.paste(emoji, ((width - side) // 2, round(0.28 * height - side / 2)), emoji)
        below = 0.52
    letters, lines = _fitted(page, short, WIDEST * width, (1 - below) * WIDEST * height)
    pencil = ImageDraw.Draw(picture)
    left, middle = page.shift[0] * short, ((below + 1) / 2 + page.shift[1]) * height
    for number, line in enumerate(lines):
        y = middle + (number - (len(lines) - 1) / 2) * LINE_SPACING * letters.size
        pencil.text((width / 2 + left, y), line, fill=COLOURS[page.ink], font=letters, anchor="mm")
    return picture


def _fitted(page, short, width, height):
    """Font and lines of a page's text: of its size, or the largest that fits width and height in pixels."""
    size = max(1, round(page.letters * short))
    while True:
        letters = font(size)
        lines = _wrapped(page.words, letters, width)
        fits = max(map(letters.getlength, lines)) <= width and len(lines) * LINE_SPACING * size <= height
        if fits or size == 1:
            return letters, lines
        size -= 1


def _wrapped(words, letters, width):
    """Lines of words, as many on each as fit; list of texts."""
    lines = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and letters.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@lru_cache(maxsize=64)
def font(size):
    """DejaVu Sans Bold, as matplotlib ships it with its licence (fonts/ttf/LICENSE_DEJAVU)."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)


def _words_of(things):
    """The words of the emojis' names and tags: letters alone, in order."""
    texts = (text for thing in things for text in (thing.name, *thing.tags))
    return tuple(sorted({word for text in texts for word in text.split() if word.isascii() and word.isalpha()}))

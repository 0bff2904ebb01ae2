"""Prompts as people write them: one a line of a file, with the size of the picture in the prompt."""

import re
from typing import NamedTuple, Optional, Tuple

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import read_text

# Word processors make one dash of two.
_SIZE = re.compile(
    r"(?:^|\s+)(?:--|—|–)(aspect[_-]ratio|ar|hw)\b\s*[=:]?\s*(\d{1,5}(?:\.\d{1,4})?)(?:\s*[:x×*/]\s*|\s+)"
    r"(\d{1,5}(?:\.\d{1,4})?)(?![\w:])",
    re.IGNORECASE,
)
_FLAG = re.compile(r"(?<!\S)--(aspect[_-]ratio|ar|hw)\b", re.IGNORECASE)


class Prompt(NamedTuple):
    """What to draw: text; size, height and width in pixels, or ratio, height / width, if the prompt told one."""

    text: str
    size: Optional[Tuple[int, int]] = None
    ratio: Optional[float] = None

    @classmethod
    def parse(cls, text):
        """Take `--ar HEIGHT:WIDTH`, `--aspect_ratio HEIGHT:WIDTH` and `--hw HEIGHT:WIDTH` out of a text.

        As in the official demo, height comes first, the first of a kind counts, and pixels before a ratio. Raises
        MindSigmaError for such a flag without two positive numbers, and for pixels that are not whole.
        """
        told = {}
        for flag, height, width in _SIZE.findall(text):
            told.setdefault(flag.lower() == "hw", (float(height), float(width)))
        rest = _SIZE.sub("", text)
        wrong = _FLAG.search(rest)
        pixels = told.get(True, (1, 1))
        if wrong or any(not side for sides in told.values() for side in sides) or any(side % 1 for side in pixels):
            flag = wrong[0] if wrong else "--hw" if True in told else "--ar"
            example = "--hw 768:1024" if flag.lower() == "--hw" else f"{flag} 3:4"
            raise MindSigmaError(
                f"the prompt '{one_line(text, 200)}': {flag} must be followed by HEIGHT:WIDTH, as in {example}"
            )
        if not told:
            return cls(text)
        ratio = told[False][0] / told[False][1] if False in told else None
        size = (int(pixels[0]), int(pixels[1])) if True in told else None
        return cls(rest.strip(), size, None if size else ratio)


def read_lines(path, flag="--prompts-file", numbered=False):
    """The lines of a UTF-8 file that are not blank and do not begin with #, stripped, or (number, line) of each.

    Only line feeds end a line, with or without a carriage return before: prompts may hold the separators of Unicode.
    Raises MindSigmaError that names flag and file.
    """
    try:
        text = read_text(path)
    except MindSigmaError as error:
        raise MindSigmaError(f"{flag} {error}") from None
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise MindSigmaError(f"{flag} {path}: holds no prompt")
    return lines if numbered else [line for _, line in lines]

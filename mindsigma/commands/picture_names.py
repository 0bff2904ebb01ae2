"""Names of the pictures' files: from a template, and a free one where there is a file of that name."""

import re
import string

from mindsigma.command_line import did_you_mean
from mindsigma.errors import MindSigmaError, one_line

MAX_NAME_BYTES = 80  # of a prompt in a name
LONGEST_NAME = 200  # bytes of a name without the suffix; file systems take 255
DEFAULT = "{prompt}-{seed}"
TEXTS = ("prompt", "model", "sampler")
NUMBERS = ("seed", "number", "image", "width", "height", "steps", "guidance")
FIELDS = TEXTS + NUMBERS
FORM = re.compile(r"0?\d{0,2}(\.\d{1,2})?[dfgs]?")  # of a field, after its colon


def check_template(template):
    """Raise MindSigmaError for a template that cannot be filled in, or that would leave the folder."""
    try:
        parts = list(string.Formatter().parse(template))
        for _, field, form, _ in parts:
            if field is not None and field not in FIELDS:
                meant = did_you_mean(field, FIELDS)
                raise MindSigmaError(
                    f"--name-template: unknown field {{{one_line(field, 40)}}}; known: {', '.join(FIELDS)}{meant}"
                )
            if not FORM.fullmatch(form or ""):
                raise ValueError(f"the form '{one_line(form, 20)}' of a field is not read")
        name = fill(template, dict.fromkeys(NUMBERS, 1), dict.fromkeys(TEXTS, "x"))
    except MindSigmaError:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise MindSigmaError(
            f"--name-template '{one_line(template)}': {one_line(error)}; write it as in {DEFAULT}-{{number:04d}}"
        ) from None
    if not name:
        raise MindSigmaError("--name-template: gives an empty name")
    if any(character in template for character in "/\\\0"):
        raise MindSigmaError("--name-template: a name holds no slashes; --out names the folder")


def fill(template, numbers, texts=None):
    """A file's name without suffix: the template with its fields. What a name cannot hold becomes a hyphen."""
    values = {**numbers, **{name: _words(text) for name, text in (texts or {}).items()}}
    name = "".join(c if c.isprintable() and c not in '/\\:*?"<>|' else "-" for c in template.format(**values))
    return _cut(name.strip(" ").lstrip("."), LONGEST_NAME) or "image"


def _words(text):
    """A text as a part of a name: its words in lower case, joined by hyphens."""
    words = "".join(c if c.isalnum() else "-" for c in str(text).lower())
    return _cut("-".join(part for part in words.split("-") if part), MAX_NAME_BYTES).rstrip("-") or "image"


def _cut(text, most):
    return text.encode("utf-8", "ignore")[:most].decode("utf-8", "ignore")


class Names:
    """Paths for pictures: none twice in a run, and none that is there already unless that is to be replaced.

    Args:
        overwrite: whether files of earlier runs are replaced.
    """

    def __init__(self, overwrite=False):
        self.overwrite, self._taken = overwrite, set()

    def free(self, path):
        """The path (Path), or it with the first number (-2, -3 ...) that makes it free."""
        number, candidate = 1, path
        while candidate in self._taken or (not self.overwrite and candidate.is_symlink() | candidate.exists()):
            number += 1
            candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
        self._taken.add(candidate)
        return candidate

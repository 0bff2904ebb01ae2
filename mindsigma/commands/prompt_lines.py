"""Files of any number of prompts, of which a few are read at a time."""

import array
import hashlib
from pathlib import Path

from mindsigma.commands.prompt_file import JSON_LINES, TABLES, converted
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import load_json, open_regular
from mindsigma.pipeline.prompts import Prompt

LONGEST_LINE = 1 << 20  # bytes


class PromptLines:
    """The prompts of a text or of JSON lines of any length; only where the lines begin is kept, 16 bytes a prompt.

    All lines are judged at once, so that a mistake is told before anything is drawn.

    Args:
        path, columns, flag: as for read_prompt_file.

    Attributes:
        digest: text that is another for another file.

    Raises:
        MindSigmaError: as read_prompt_file, and for a table of cells, whose rows may have many lines.
    """

    def __init__(self, path, columns, flag="--prompts-file"):
        self._path, self._flag, self._columns = path, flag, columns
        self._known = {name.replace("-", "_"): name for name in columns}
        suffix = Path(path).suffix.lower()
        if suffix in TABLES:
            raise MindSigmaError(
                f"{flag} {path}: shards are drawn from a text or from JSON lines; convert it to .jsonl"
            )
        self._json = suffix in JSON_LINES
        self._starts, self._numbers, digest = array.array("q"), array.array("q"), hashlib.blake2b(digest_size=16)
        try:
            self._file = open_regular(path)
        except MindSigmaError as error:
            raise MindSigmaError(f"{flag} {error}") from None
        start = 0
        for number, line in enumerate(iter(lambda: self._file.readline(LONGEST_LINE), b""), 1):
            if len(line) == LONGEST_LINE:
                raise MindSigmaError(f"{flag} {path}, line {number}: longer than {LONGEST_LINE} bytes")
            digest.update(line)
            values = self._values(number, line)
            if values is not None:
                self._starts.append(start)
                self._numbers.append(number)
            start += len(line)
        if not self._starts:
            raise MindSigmaError(f"{flag} {path}: holds no prompt")
        self.digest = digest.hexdigest()

    def __len__(self):
        return len(self._starts)

    def rows(self, start, stop):
        """What read_prompt_file gives, of the prompts from start to stop."""
        found = []
        for place, number in zip(self._starts[start:stop], self._numbers[start:stop]):
            self._file.seek(place)
            found.append((self._where(number), self._values(number, self._file.readline(LONGEST_LINE))))
        return found

    def _where(self, number):
        return f"{self._flag} {self._path}, line {number}"

    def _values(self, number, line):
        """What a line tells, None if it is blank or a comment."""
        where = self._where(number)
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise MindSigmaError(f"{where}: not UTF-8 text") from None
        if not text or not self._json and text.startswith("#"):
            return None
        values = {"prompt": text}
        if self._json:
            values = converted(where, load_json(where, text, "this line"), self._columns, self._known)
        try:
            Prompt.parse(values["prompt"])
        except MindSigmaError as error:
            raise MindSigmaError(f"{where}: {error}") from None
        return values

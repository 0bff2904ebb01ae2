"""Tables of images, entry by entry: CSV, TSV and relatives, JSON lists, JSON lines, and JSON objects as kohya's.

Files of any length are read with the memory of one entry.
"""

import csv
import io
import itertools
import os
import re
from contextlib import contextmanager

from mindsigma.data import images
from mindsigma.data.record import IMAGE_NAMES, KEY, PROMPT_NAMES, TAG_NAMES, RowError, image_path
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import json_decoder, open_regular, require_shallow, understanding

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json")
LARGEST_ENTRY = 1 << 20  # bytes or characters of a line, or of an entry of a JSON document
SEPARATORS = ",;\t|"
FIRST = 10  # entries looked at to tell whether a file is a table of images

_CSV = (".csv", ".tsv")
_LINE = json_decoder(MindSigmaError)
_BLANK = re.compile(r"[ \t\r\n]*")


def entries(table):
    """Yield (where, dict of a row, or a text of what is wrong with it) of a table, a Path.

    A row of a JSON object has its key as KEY and the rest as the value tells. Raises MindSigmaError where rows cannot
    be told apart.
    """
    if table.suffix.lower() in _CSV:
        return _csv_entries(table)
    return {"list": _list_entries, "object": _object_entries, "lines": _line_entries}[_shape(table)](table)


def why_no_table(table):
    """What keeps a file of a table's suffix from being a table of images; "" for one that is.

    The first entries tell; of a CSV its first line.
    """
    fault = "holds no entry"
    try:
        for _, values in itertools.islice(entries(table), FIRST):
            if table.suffix.lower() in _CSV or isinstance(values, dict) and _tells_an_image(values):
                return ""
            fault = values if isinstance(values, str) else f"its entries have none of {', '.join(IMAGE_NAMES)}"
    except MindSigmaError as error:
        return str(error).removeprefix(f"{table}: ")
    return fault


def keys(table):
    """The first keys of a table that is a JSON object, which need not name images; none of other tables."""
    first = itertools.islice(entries(table), FIRST)
    return [values[KEY] for _, values in first if isinstance(values, dict) and KEY in values]


def _tells_an_image(values):
    try:
        return bool(values.get(KEY) or image_path(values))
    except RowError:
        return False


@contextmanager
def _opened(table):
    """The binary file; whatever its content raises in the block becomes a MindSigmaError."""
    with understanding(table), open_regular(table) as file:
        try:
            yield file
        except UnicodeError:
            raise MindSigmaError(f"{table}: not UTF-8 text; save it as UTF-8") from None


def _csv_entries(table):
    with _opened(table) as file:
        lines = _bounded(table, _as_text(file))
        header = next((line for line in lines if line.strip()), "")
        # Excel tells its separator in a line of its own.
        told = re.fullmatch(r"sep=(.)", header.strip(), re.IGNORECASE)
        if told:
            header = next(lines, "")
        if not header:
            raise MindSigmaError(f"{table}: the table is empty; its first line must name the columns")
        separator = told[1] if told else _separator(table, header)
        reader = csv.reader(itertools.chain([header], lines), delimiter=separator)
        names = _names(next(reader))
        try:
            for fields in reader:
                if fields:
                    # Spreadsheets write empty fields behind the last one.
                    broken = len(fields) < len(names) or any(fields[len(names) :])
                    row = "more or fewer fields than columns" if broken else dict(zip(names, fields))
                    yield f"{table}: line {reader.line_num + bool(told)}", row
        except csv.Error as error:
            raise MindSigmaError(f"{table}: line {reader.line_num}: not a CSV table ({error})") from None


def _as_text(file):
    start = file.read(2)
    file.seek(0)
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return io.TextIOWrapper(file, encoding=encoding, newline="")


def _bounded(table, file):
    """Lines of a file, of text or bytes; MindSigmaError for one that no table holds."""
    number = 0
    while True:
        line = file.readline(LARGEST_ENTRY + 1)
        number += 1
        if not line:
            return
        if len(line) > LARGEST_ENTRY:
            raise MindSigmaError(f"{table}: line {number} is longer than {LARGEST_ENTRY}: damaged, or no table")
        yield line


def _names(fields):
    return [field.strip().lower() for field in fields]


def _separator(table, header):
    """The separator with which the header names a column of image paths."""
    first = "\t" if table.suffix.lower() == ".tsv" else ","
    for separator in dict.fromkeys(first + SEPARATORS):
        if set(_names(next(csv.reader([header], delimiter=separator)))) & set(IMAGE_NAMES):
            return separator
    raise MindSigmaError(
        f"{table}: no column is named {', '.join(IMAGE_NAMES)}; the first line, which must name the columns, reads "
        f"'{one_line(header.strip())}'"
    )


def _shape(table):
    """ "list", "object" or "lines", by what a JSON file begins with."""
    with _opened(table) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        file.seek(0)
        if start == b"[" and table.suffix.lower() == ".json":
            return "list"
        if start != b"{" or table.suffix.lower() != ".json":
            return "lines"
        line = file.readline(LARGEST_ENTRY)
        first = _entry(line)
        more = bool(file.read(LARGEST_ENTRY).strip())
    return "lines" if isinstance(first, dict) and (more or _tells_an_image(first)) else "object"


def _line_entries(table):
    with _opened(table) as file:
        for number, line in enumerate(_bounded(table, file), 1):
            if line.strip():
                yield f"{table}: line {number}", _entry(line)


def _entry(line):
    """The value of a JSON line, or a text of what is wrong with it."""
    try:
        value = _LINE.decode(line.decode("utf-8-sig"))
        require_shallow(value, MindSigmaError)
    except (ValueError, RecursionError) as error:
        return f"not JSON ({one_line(error)})"
    return "not an object" if isinstance(value, str) else value


def _list_entries(table):
    with _opened(table) as file:
        stream = _JsonStream(table, file)
        for number, _ in enumerate(stream.items("[", "]")):
            yield f"{table}: entry {number}", stream.value()


def _object_entries(table):
    """Rows of an object whose keys name images and whose values are captions, or objects with caption and tags."""
    with _opened(table) as file:
        stream = _JsonStream(table, file)
        for _ in stream.items("{", "}"):
            key = stream.value()
            stream.expect(":")
            yield f"{table}: {one_line(key)}", _keyed(key, stream.value())


def _keyed(key, value):
    if not isinstance(key, str):
        return "a key that is no text"
    if isinstance(value, str) and os.path.splitext(key)[1].lower() in images.SUFFIXES:
        return {KEY: key, "prompt": value}
    if not isinstance(value, dict) or not any(name in value for name in (*PROMPT_NAMES, *TAG_NAMES)):
        return f"'{one_line(key)}' has none of {', '.join((*PROMPT_NAMES, *TAG_NAMES))}"
    caption, tags = value.get("caption"), value.get("tags")
    if isinstance(caption, str) and isinstance(tags, str) and caption and tags:
        value = {**value, "caption": f"{caption}, {tags}"}  # as kohya's trainer joins them
    # Sizes are those of the image as another trainer cut it.
    return {KEY: key, **{name: value[name] for name in value if name not in ("width", "height")}}


class _JsonStream:
    """A JSON list or object of any length, value by value."""

    def __init__(self, table, file):
        self._table, self._text = table, io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self._decoder = json_decoder(self._wrong)
        self._buffer, self._position, self._ended = "", 0, False

    def items(self, opening, closing):
        """Iterate once for each value, which the caller takes, of the list or object."""
        self.expect(opening)
        if self._next() == closing:
            self._position += 1
        else:
            while True:
                yield
                if self._next() != ",":
                    break
                self._position += 1
            self.expect(closing)
        if self._next():
            raise self._wrong("text behind its end")

    def expect(self, character):
        """Pass over a character that must come next."""
        if self._next() != character:
            raise self._wrong(f"no '{character}' where one belongs")
        self._position += 1

    def value(self):
        """The value that comes next."""
        self._next()
        while True:
            fault = ""
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except MindSigmaError:
                raise
            except (ValueError, RecursionError) as error:
                fault = one_line(error)
            # A number may go on behind the end of the buffer.
            if not fault and (end < len(self._buffer) or self._ended):
                break
            if self._ended or len(self._buffer) - self._position > 2 * LARGEST_ENTRY:
                raise self._wrong(fault or "an entry without end")
            self._fill()
        self._position = end
        require_shallow(value, self._wrong)
        return value

    def _next(self):
        """The next character that is not blank, "" at the end."""
        while True:
            self._position = _BLANK.match(self._buffer, self._position).end()
            if self._position < len(self._buffer) or not self._fill():
                return self._buffer[self._position : self._position + 1]

    def _fill(self):
        chunk = self._text.read(LARGEST_ENTRY)
        self._ended = not chunk
        self._buffer, self._position = self._buffer[self._position :] + chunk, 0
        return not self._ended

    def _wrong(self, fault):
        return MindSigmaError(f"{self._table}: not valid JSON ({fault}); copy or download the file again")

"""Files of prompts: a text with one prompt a line, or a table (CSV, JSON lines) with options for each picture."""

import csv
import io
from pathlib import Path

from mindsigma.command_line import did_you_mean
from mindsigma.config_file import convert_value
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_text
from mindsigma.pipeline.prompts import read_lines

TABLES = {".csv": ",", ".tsv": "\t"}  # suffix: separator
JSON_LINES = (".jsonl", ".ndjson", ".json")
TRUE, FALSE = ("true", "yes", "1"), ("false", "no", "0")
LONGEST_CELL = 100_000  # characters


def read_prompt_file(path, columns, flag="--prompts-file"):
    """list of (where, dict destination -> value) of a file; each dict holds at least `prompt`.

    Args:
        path: a text; or, by its suffix, a table (.csv, .tsv) with a header or JSON lines (.jsonl), one object a line.
        columns: dict name -> argparse action, for the columns besides `prompt`. Empty cells count as absent.
        flag: what messages begin with.

    Raises:
        MindSigmaError: names file and line of whatever is unknown, of the wrong kind, or missing.
    """
    suffix = Path(path).suffix.lower()
    try:
        if suffix in TABLES:
            rows = _table(path, TABLES[suffix])
        elif suffix in JSON_LINES:
            rows = _json_lines(path)
        else:
            return [
                (f"{flag} {path}, line {number}", {"prompt": line}) for number, line in read_lines(path, flag, True)
            ]
        known = {name.replace("-", "_"): name for name in columns}
        result = [(f"{flag} {where}", converted(where, row, columns, known)) for where, row in rows]
    except MindSigmaError as error:
        raise MindSigmaError(error if str(error).startswith(flag) else f"{flag} {error}") from None
    if not result:
        raise MindSigmaError(f"{flag} {path}: holds no prompt")
    return result


def _table(path, separator):
    """(where, dict) of each row of a table that has any text; cells are texts."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True)
    csv.field_size_limit(LONGEST_CELL)
    header = None
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                twice = next((name for name in header if header.count(name) > 1), None)
                if twice is not None:
                    raise MindSigmaError(f"{where}: the column '{one_line(twice)}' stands twice")
                if "prompt" not in header:
                    raise MindSigmaError(f"{where}: the first line must name the columns, one of them prompt")
                continue
            if len(cells) != len(header):
                raise MindSigmaError(f"{where}: has {len(cells)} cells, the header {len(header)} columns")
            yield where, {name: cell.strip() for name, cell in zip(header, cells) if cell.strip()}
    except csv.Error as error:
        raise MindSigmaError(f"{path}, line {reader.line_num}: not CSV ({one_line(error)})") from None


def _json_lines(path):
    """(where, dict) of each line that is not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, load_json(where, line, "this line")


def converted(where, row, columns, known):
    """dict destination -> value of a row."""
    values = {}
    for key, value in row.items():
        name = str(key).replace("-", "_")
        if name == "prompt":
            if not isinstance(value, str) or not value.strip():
                raise MindSigmaError(f"{where}: has no prompt")
            values["prompt"] = value
            continue
        if name not in known:
            listed = ", ".join(["prompt", *known])
            raise MindSigmaError(
                f"{where}: unknown column '{one_line(key)}'; known: {listed}{did_you_mean(name, ['prompt', *known])}"
            )
        if value is None:
            continue
        action = columns[known[name]]
        if isinstance(value, str):
            value = _of_text(value, action)
        values[action.dest] = convert_value(f"{where}: {name}", value, action)
    if "prompt" not in values:
        raise MindSigmaError(f"{where}: has no prompt")
    return values


def _of_text(value, action):
    """A cell as what its option takes: a truth, a list, or the text itself."""
    if action.nargs == 0:
        return True if value.lower() in TRUE else False if value.lower() in FALSE else value
    if action.nargs is not None:  # several numbers
        return value.split()
    if type(action).__name__ == "_AppendAction":
        return [part.strip() for part in value.split(";") if part.strip()]
    return value

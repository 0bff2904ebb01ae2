"""The layouts of a data set on disk: which one it is, and its rows (official folder, images with texts, tables)."""

import csv
import json
import os
from pathlib import Path

from mindsigma.data import shards
from mindsigma.data.conversion_note import is_complete
from mindsigma.data.images import SUFFIXES
from mindsigma.data.record import (
    BROKEN,
    NO_CAPTION,
    BadRow,
    Record,
    RowError,
    below,
    captions_of,
    image_path,
    size_of,
    text_of,
)
from mindsigma.errors import MindSigmaError

OFFICIAL_IMAGES, OFFICIAL_DATA, OFFICIAL_INDEX = "InternImgs", "InternData", "data_info.json"
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
LARGEST_CAPTION = 2**20  # bytes of a .txt beside an image


def find_layout(path, image_root=None):
    """(name of the layout, function that yields its Record and BadRow) of a file or folder, by what it holds.

    Args:
        path: folder, table (.csv, .tsv, .json, .jsonl) or shard (.tar).
        image_root: folder that the paths of a table are relative to; by default that of the table.

    Raises:
        MindSigmaError: absent, empty, or not to be told.
    """
    path = Path(path)
    if path.is_file():
        return _of_file(path, image_root)
    if not path.is_dir():
        raise MindSigmaError(f"{path}: no such file or folder; give the data set's folder, table or .tar shard")
    _require_complete(path)
    official = path.parent if path.name == OFFICIAL_DATA and (path / OFFICIAL_INDEX).is_file() else path
    index = official / OFFICIAL_DATA / OFFICIAL_INDEX
    if index.is_file():
        return "official", lambda: table_rows(index, image_root or official / OFFICIAL_IMAGES)
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from None
    tars = [path / name for name in names if name.lower().endswith(".tar")]
    tables = [path / name for name in names if name.lower().endswith(TABLE_SUFFIXES) and _is_table(path / name)]
    if tars:
        return "webdataset", lambda: shards.rows(tars)
    metadata = [table for table in tables if table.stem in ("metadata", OFFICIAL_INDEX[:-5])]
    if len(metadata or tables) == 1:
        return _of_file((metadata or tables)[0], image_root)
    if tables:
        raise MindSigmaError(f"{path}: holds several tables ({', '.join(t.name for t in tables)}); give one of them")
    return "folder", lambda: folder_rows(path)


def _require_complete(folder):
    if not is_complete(folder):
        raise MindSigmaError(f"{folder}: its conversion was interrupted; run the same tools/prepare_data.py again")


def _of_file(path, image_root):
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise MindSigmaError(f"{path}: cannot be read ({error.strerror})") from None
    if start[257:262] == b"ustar" or path.suffix.lower() == ".tar":
        return "webdataset", lambda: shards.rows([path])
    if path.suffix.lower() in (".gz", ".tgz", ".zst") and ".t" in path.name:
        raise MindSigmaError(f"{path}: compressed shards cannot be read in place; decompress it to .tar")
    if path.suffix.lower() not in TABLE_SUFFIXES:
        raise MindSigmaError(f"{path}: neither a table ({', '.join(TABLE_SUFFIXES)}) nor a .tar shard")
    official = path.parent.name == OFFICIAL_DATA and (path.parent.parent / OFFICIAL_IMAGES).is_dir()
    root = image_root or (path.parent.parent / OFFICIAL_IMAGES if official else path.parent)
    kind = "official" if official else "csv" if path.suffix.lower() in (".csv", ".tsv") else "jsonl"
    return kind, lambda: table_rows(path, root)


def table_rows(table, root):
    """Rows of a CSV, TSV, JSON list or JSON lines file whose image paths are relative to the folder `root`."""
    for where, values in _entries(Path(table)):
        try:
            if not isinstance(values, dict):
                raise RowError(BROKEN, values if isinstance(values, str) else "not an object")
            file, key = below(root, image_path(values))
            yield Record(key, *captions_of(values), *size_of(values), file)
        except RowError as error:
            yield BadRow(where, *error.args)


def folder_rows(folder):
    """Rows of a folder, at any depth: every image, with the caption of the .txt file of its name."""
    folder = os.path.abspath(folder)
    seen = {os.path.realpath(folder)}  # links are followed, but into no folder twice: they may form a circle
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _is_new(parent, name, seen)]
        present = set(names)
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES or name.startswith("."):
                continue
            file = os.path.join(parent, name)
            key = os.path.relpath(file, folder)
            try:
                caption = _caption_file(parent, [f"{stem}.txt", f"{name}.txt"], present)
                yield Record(key, *captions_of({"prompt": caption}), 0, 0, file)
            except RowError as error:
                yield BadRow(file, *error.args)


def _is_new(parent, name, seen):
    """Whether the folder is none of `seen`, real paths, to which it is added."""
    real = os.path.realpath(os.path.join(parent, name))
    new = real not in seen
    seen.add(real)
    return new


def _unreadable(error):
    return MindSigmaError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def _raise_unreadable(error):
    raise _unreadable(error) from None


def _caption_file(parent, candidates, present):
    for name in candidates:
        if name in present:
            try:
                with open(os.path.join(parent, name), "rb") as file:
                    return text_of(file.read(LARGEST_CAPTION), name)
            except (OSError, MindSigmaError) as error:
                raise RowError(BROKEN, str(error)) from None
    raise RowError(NO_CAPTION, f"no {candidates[0]} beside it")


def _is_table(path):
    """Whether a file of a table's suffix has images in it, judging by its first entry."""
    try:
        _, first = next(_entries(path))
    except (MindSigmaError, StopIteration):
        return path.stem in ("metadata", OFFICIAL_INDEX[:-5])  # its fault is worth telling
    try:
        return isinstance(first, dict) and bool(image_path(first))
    except RowError:
        return False


def _entries(table):
    """(where, dict of a row or what is wrong with it) of a table; MindSigmaError where rows cannot be told apart."""
    if table.suffix.lower() in (".csv", ".tsv"):
        yield from _csv_entries(table)
    elif table.suffix.lower() == ".jsonl" or not _starts_with_list(table):
        yield from _json_lines(table)
    else:
        text = _read(table)
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MindSigmaError(f"{table}: not valid JSON ({error})") from None
        for number, entry in enumerate(entries):
            yield f"{table}: entry {number}", entry


def _csv_entries(table):
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            if reader.fieldnames is None:
                raise MindSigmaError(f"{table}: the table is empty; its first line must name the columns")
            reader.fieldnames = [(name or "").strip().lower() for name in reader.fieldnames]
            for row in reader:
                broken = None in row or None in row.values()
                yield f"{table}: line {reader.line_num}", "more or fewer fields than columns" if broken else row
    except OSError as error:
        raise MindSigmaError(f"{table}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise MindSigmaError(f"{table}: not a UTF-8 CSV table ({error})") from None


def _json_lines(table):
    try:
        with open(table, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        entry = json.loads(line.decode("utf-8-sig"))
                    except (ValueError, RecursionError) as error:
                        entry = f"not JSON ({error})"
                    yield f"{table}: line {number}", entry
    except OSError as error:
        raise MindSigmaError(f"{table}: cannot be read ({error.strerror})") from None


def _starts_with_list(table):
    try:
        with open(table, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except OSError as error:
        raise MindSigmaError(f"{table}: cannot be read ({error.strerror})") from None


def _read(file):
    try:
        return text_of(file.read_bytes(), file)
    except OSError as error:
        raise MindSigmaError(f"{file}: cannot be read ({error.strerror})") from None

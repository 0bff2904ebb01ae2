"""TextAtlasEval as it is published, or data of one's own in its layout: prompts, texts to be read, reference pictures.

Published are parquet files with the columns image (a struct of bytes and path), image_path, annotation (the whole
prompt) and raw_text, a folder each subset. One's own is a JSON list of {image_path, original_image_path, prompt,
raw_text}, or JSON lines of the same.
"""

import io
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mindsigma.data.images import decode
from mindsigma.data.tables import entries
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.extras import extra
from mindsigma.foreign import open_regular

HUB = "CSU-JPG/TextAtlasEval"
SUBSETS = ("styledtextsynth", "textvisionblend", "textsceneshq", "cleantextsynth")
COLUMNS = ("image_path", "annotation", "raw_text")
IMAGE = "image"
LONGEST_TEXT = 100_000  # characters of a prompt or of a text to be read
MOST_ITEMS = 10_000_000
MOST_BYTES = 4 << 30  # of the texts of a file, or of one row group's images


class Item(NamedTuple):
    """One prompt.

    Attributes:
        subset: name of its subset.
        number: its place within the subset, from 0.
        name: image_path, the name of its picture.
        prompt, text: what is drawn, what is to be read.
        reference: where the real picture is, for `TextAtlas.reference`, or None.
    """

    subset: str
    number: int
    name: str
    prompt: str
    text: str
    reference: Any


class TextAtlas:
    """The items of a data set.

    Args:
        path: folder of parquet files or of JSON files, one such file, or a hub id.
        subsets: names of those that are wanted; default all.
        limit: items of each subset, the first ones; default all.

    Attributes:
        items: list of Item.
        bad: list of texts, a row that was left out each.

    Raises:
        MindSigmaError: there is nothing to read, a column is missing, a subset is unknown.
    """

    def __init__(self, path, subsets=(), limit=None):
        self.path = path
        self.items, self.bad = [], []
        self._groups = {}  # of each parquet file the row group that was read last
        files = _files(path)
        found = {}
        for file in files:
            found.setdefault(_subset_of(file), []).append(file)
        wanted = [subset.lower() for subset in subsets]
        for subset in wanted:
            if subset not in found:
                raise MindSigmaError(f"{path}: has no subset {one_line(subset)}; it has {', '.join(sorted(found))}")
        names = {}
        for subset, parts in found.items():
            if wanted and subset not in wanted:
                continue
            number = 0
            for file in parts:
                rows = _parquet_rows if file.suffix == ".parquet" else _json_rows
                for where, row, reference in rows(file):
                    fault = row if isinstance(row, str) else _fault(row)
                    name = "" if fault else row["image_path"].strip()
                    if not fault and names.setdefault((subset, name), where) != where:
                        fault = f"image_path '{one_line(name)}' is that of another row, too"
                    if fault:
                        self.bad.append(f"{where}: {fault}")
                    elif limit is None or number < limit:
                        self.items.append(Item(subset, number, name, row["annotation"], row["raw_text"], reference))
                    number += 1
        self._leave_out_folders(names)
        if not self.items:
            why = f"; the first of {len(self.bad)} that were left out: {self.bad[0]}" if self.bad else ""
            raise MindSigmaError(f"{path}: holds no prompt{why}")

    def _leave_out_folders(self, names):
        """No picture can have the name of another's folder."""
        for item in list(self.items):
            if any((item.subset, str(parent)) in names for parent in PurePosixPath(item.name).parents):
                self.items.remove(item)
                self.bad.append(f"{item.subset}: {one_line(item.name)}: its folder has the name of another picture")

    @property
    def subsets(self):
        """Names of the subsets that there are items of, in order."""
        return list(dict.fromkeys(item.subset for item in self.items))

    def reference(self, item):
        """The real picture of an Item, a PIL image. Raises MindSigmaError where there is none or it does not open."""
        if item.reference is None:
            raise MindSigmaError(f"{self.path}: {item.name} has no reference picture")
        file, place = item.reference
        try:
            if place is None:
                with open_regular(file) as opened:
                    return decode(opened)
            return decode(io.BytesIO(self._image_of_row(file, *place)))
        except MindSigmaError as error:
            where = file if place is None else f"{file}: {one_line(item.name)}"
            raise MindSigmaError(f"{where}: {str(error).removeprefix(f'{file}: ')}") from None

    def _image_of_row(self, file, group, row):
        if self._groups.get(file, (None,))[0] != group:
            with _parquet(file) as opened:
                size = opened.metadata.row_group(group).total_byte_size
                if size > MOST_BYTES:
                    raise MindSigmaError(
                        f"{file}: a row group of {size} bytes, more than the {MOST_BYTES} that are read"
                    )
                self._groups[file] = group, opened.read_row_group(group, columns=[IMAGE]).column(0).to_pylist()
        value = self._groups[file][1][row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise MindSigmaError("holds no bytes of a picture")
        return data


def _files(path):
    """The parquet or JSON files of a path or hub id, sorted; parquet wins."""
    place = Path(path).expanduser()
    if not place.exists():
        place = _from_hub(str(path))
    if place.is_file():
        return [place]
    for suffix in (".parquet", ".json", ".jsonl"):
        files = sorted(file for file in place.rglob(f"*{suffix}") if not _hidden(file.relative_to(place)))
        if suffix != ".parquet":
            # Beside pictures there may be other JSON files.
            named = [file for file in files if file.stem.lower() in ("textatlas", *SUBSETS)]
            files = named or [file for file in files if file.parent == place]
        if files:
            return files
    raise MindSigmaError(f"{path}: holds neither .parquet nor .json files; give TextAtlasEval's folder, or a JSON list")


def _hidden(path):
    return any(part.startswith(".") for part in path.parts)


def _from_hub(name):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise MindSigmaError(f"{one_line(name)}: no such file or folder; a hub id has the form owner/name, as {HUB}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet", "*.json"]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise MindSigmaError(
            f"{name}: no such folder, and not to be had from the hub ({type(error).__name__}); fetch it where there is "
            f"a network: hf download {name} --repo-type dataset --local-dir {name.rpartition('/')[2]}"
        ) from None


def _subset_of(file):
    """Name of a file's subset, fit for a folder: a known one of its path, or its own, or its folder's."""
    for part in (file.stem, *(parent.name for parent in list(file.parents)[:2])):
        for subset in SUBSETS:
            if part.lower().startswith(subset):
                return subset
    shard = re.sub(r"(^|-)\d{5}-of-\d{5}$", "", file.stem).lower()
    name = file.parent.name.lower() if shard in ("train", "test", "textatlas", "data", "") else shard
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "all"


def _fault(row):
    """What is wrong with a row, or ""."""
    for name in COLUMNS:
        value = row.get(name)
        if not isinstance(value, str):
            return f"{name} is no text"
        if len(value) > LONGEST_TEXT:
            return f"{name} has {len(value)} characters, more than {LONGEST_TEXT}"
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return f"{name} holds half a character, which no text has"
    if not row["annotation"].strip():
        return "the prompt is empty"
    name = row["image_path"].strip()
    return "" if is_picture_name(name) else f"image_path '{one_line(name)}' is no name of a file"


def is_picture_name(name):
    """Whether a text names a file below a folder: relative, printable, without `..`, of no length that none has."""
    path = PurePosixPath(name)
    plain = name and name.isprintable() and "\\" not in name and not path.is_absolute() and ".." not in path.parts
    return bool(plain and path.name and not path.name.startswith(".") and len(os.fsencode(path.name)) < 200)


def _json_rows(file):
    """Yield (where, row or text of what is wrong, reference) of a JSON list or of JSON lines."""
    for where, value in entries(file):
        if not isinstance(value, dict):
            yield where, value if isinstance(value, str) else "not an object", None
            continue
        row = {"image_path": value.get("image_path"), "raw_text": value.get("raw_text")}
        row["annotation"] = value.get("prompt", value.get("annotation"))
        missing = [name for name in ("image_path", "raw_text") if name not in value]
        if missing or row["annotation"] is None:
            yield where, f"lacks {', '.join(missing or ['prompt'])}", None
            continue
        real = value.get("original_image_path")
        known = isinstance(real, str) and real and "\0" not in real
        yield where, row, (file.parent / real, None) if known else None


class _parquet:
    """A pyarrow ParquetFile; whatever pyarrow raises becomes a MindSigmaError that names the file."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        library = extra("pyarrow.parquet", "reading parquet files")
        self._opened = open_regular(self.file)
        try:
            return library.ParquetFile(self._opened)
        except Exception as error:
            self._opened.close()
            raise self._explained(error) from error

    def __exit__(self, kind, error, trace):
        self._opened.close()
        if isinstance(error, Exception) and not isinstance(error, MindSigmaError):
            raise self._explained(error) from error

    def _explained(self, error):
        return MindSigmaError(f"{self.file}: not a parquet file, or damaged ({one_line(error)}); download it again")


def _parquet_rows(file):
    """Yield (where, row or text of what is wrong, reference) of a parquet file; images are left where they are."""
    with _parquet(file) as opened:
        names = opened.schema_arrow.names
        missing = [name for name in COLUMNS if name not in names]
        if missing:
            raise MindSigmaError(
                f"{file}: lacks the columns {', '.join(missing)}; it has {one_line(', '.join(names))}, TextAtlasEval "
                f"{', '.join((IMAGE, *COLUMNS))}"
            )
        if opened.metadata.num_rows > MOST_ITEMS:
            raise MindSigmaError(f"{file}: {opened.metadata.num_rows} rows, more than the {MOST_ITEMS} that are read")
        number = 0
        for group in range(opened.num_row_groups):
            _check_size(file, opened.metadata.row_group(group))
            rows = opened.read_row_group(group, columns=list(COLUMNS)).to_pylist()
            for row, values in enumerate(rows):
                yield f"{file}: row {number}", values, (file, (group, row)) if IMAGE in names else None
                number += 1


def _check_size(file, group):
    sizes = [group.column(i) for i in range(group.num_columns)]
    size = sum(one.total_uncompressed_size for one in sizes if one.path_in_schema in COLUMNS)
    if size > MOST_BYTES:
        raise MindSigmaError(f"{file}: {size} bytes of text in a row group, more than the {MOST_BYTES} that are read")

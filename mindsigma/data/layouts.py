"""The layouts of a data set on disk: which one it is, by what it holds, and its rows."""

import os
from pathlib import Path
from typing import Callable, NamedTuple, Tuple

from mindsigma.data import shards, tables
from mindsigma.data.conversion_note import is_complete
from mindsigma.data.folders import folder_rows, is_beside_image, listing
from mindsigma.data.images import SUFFIXES
from mindsigma.data.record import (
    BROKEN,
    KEY,
    NOT_READ,
    BadRow,
    Record,
    RowError,
    below,
    captions_of,
    image_path,
    size_of,
)
from mindsigma.data.tar_index import is_compressed
from mindsigma.data.unread import remedy_for, remedy_for_compressed
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular, understanding

OFFICIAL_IMAGES, OFFICIAL_DATA, OFFICIAL_INDEX = "InternImgs", "InternData", "data_info.json"
METADATA = ("metadata", OFFICIAL_INDEX[:-5])  # stems of a table that counts before others


class Layout(NamedTuple):
    """A layout.

    Attributes:
        name: what it is called.
        rows: function that yields its Record and BadRow.
        passed_over: why tables there do not count.
        root: folder that its files lie in.
        shards: (path, function that yields the rows of that shard) of each, in the order of `rows`; the last may be of
            what lies beside the shards, whose path is None. Empty of other layouts.
    """

    name: str
    rows: Callable
    passed_over: Tuple[str, ...] = ()
    root: str = ""
    shards: Tuple[Tuple, ...] = ()


def find_layout(path, image_root=None):
    """Layout of a file or folder.

    Args:
        path: folder, table (.csv, .tsv, .json, .jsonl) or shard (.tar).
        image_root: folder that the paths of a table are relative to; by default that of the table.

    Raises:
        MindSigmaError: absent, empty, or not to be told.
    """
    path = Path(path)
    if not path.is_dir():
        if not os.path.lexists(path):
            raise MindSigmaError(f"{path}: no such file or folder; give the data set's folder, table or .tar shard")
        return _of_file(path, image_root)
    _require_complete(path)
    official = path.parent if path.name == OFFICIAL_DATA else path
    indices = _official_indices(official / OFFICIAL_DATA)
    if indices:
        root = image_root or official / OFFICIAL_IMAGES
        name = "official" if len(indices) == 1 else f"official, {len(indices)} indices"
        return Layout(name, lambda: (row for index in indices for row in table_rows(index, root)), root=str(root))
    files = listing(path)
    tars = [Path(parent, name) for parent, names in files for name in names if name.lower().endswith(".tar")]
    if tars:
        return _of_shards(path, tars, path, lambda: _beside_shards(path, files))
    return _of_listed_folder(path, files, image_root)


def _of_listed_folder(path, files, image_root):
    names, found, passed_over = set(files[0][1]), [], []
    for name in files[0][1]:
        table = path / name
        if table.suffix.lower() in tables.SUFFIXES and not is_beside_image(name, names):
            fault = tables.why_no_table(table) or _why_no_keys(table, image_root or path)
            if not fault or table.stem in METADATA:  # whose fault is worth telling
                found.append(table)
            else:
                passed_over.append(f"{name}: {fault}")
    found = [table for table in found if table.stem in METADATA] or found
    if len(found) > 1:
        raise MindSigmaError(f"{path}: holds several tables ({', '.join(t.name for t in found)}); give one of them")
    if found:
        return _of_file(found[0], image_root)
    for parent, within in files[1:]:
        passed_over += [
            f"{os.path.relpath(os.path.join(parent, name), path)}: give this table, or its folder"
            for name in within
            if name.lower().endswith(tables.SUFFIXES) and os.path.splitext(name)[0] in METADATA
        ]
    return Layout("folder", lambda: folder_rows(path, files), tuple(passed_over), str(path))


def _why_no_keys(table, root):
    """What keeps a JSON object from being one of images: its keys may be anything. "" for other tables."""
    keys = tables.keys(table)
    names = Keys(root) if keys else None
    return "" if not keys or any(names.has(key) for key in keys) else f"its keys name no image in {root}"


def _official_indices(folder):
    """The index files of the official layout in a folder, the usual one first."""
    if not folder.is_dir():
        return []
    usual = folder / OFFICIAL_INDEX
    found = [
        Path(parent, name)
        for parent, names in listing(folder)
        for name in names
        if name.lower().endswith(tables.SUFFIXES) and not is_beside_image(name, set(names))
    ]
    return [usual] * (usual in found) + [i for i in found if i != usual and not tables.why_no_table(i)]


def _require_complete(folder):
    if not is_complete(folder):
        raise MindSigmaError(f"{folder}: its conversion was interrupted; run the same tools/prepare_data.py again")


def _of_file(path, image_root):
    with understanding(path), open_regular(path) as file:
        start = file.read(1024)
    suffix = path.suffix.lower()
    if is_compressed(start) or remedy_for(path.name) == remedy_for_compressed(path):
        raise MindSigmaError(f"{path}: {remedy_for_compressed(path)}")
    if start[257:262] == b"ustar" or suffix == ".tar":
        return _of_shards(path.parent, [path])
    if suffix not in tables.SUFFIXES:
        remedy = remedy_for(path.name)
        kinds = f"neither a table ({', '.join(tables.SUFFIXES)}) nor a .tar shard"
        raise MindSigmaError(f"{path}: {kinds}{'; ' if remedy else ''}{remedy}")
    official = path.parent.name == OFFICIAL_DATA and (path.parent.parent / OFFICIAL_IMAGES).is_dir()
    root = image_root or (path.parent.parent / OFFICIAL_IMAGES if official else path.parent)
    kind = "official" if official else "csv" if suffix in (".csv", ".tsv") else "jsonl"
    return Layout(kind, lambda: table_rows(path, root), root=str(root))


def table_rows(table, root):
    """Rows of a CSV, TSV, JSON or JSON lines file whose image paths are relative to the folder `root`."""
    keys = None
    for where, values in tables.entries(Path(table)):
        try:
            if not isinstance(values, dict):
                raise RowError(BROKEN, values if isinstance(values, str) else "not an object")
            if KEY in values:
                keys = keys or Keys(root)
                file, key = keys.find(values[KEY])
            else:
                file, key = below(root, image_path(values))
            yield Record(key, *captions_of(values), *size_of(values), file)
        except RowError as error:
            yield BadRow(where, *error.args)


class Keys:
    """Finds the images below a folder that a JSON object names by path or by stem, as kohya's tools do."""

    def __init__(self, root):
        self._root, self._names, self._by_end = root, set(), {}
        for parent, names in listing(root) if os.path.isdir(root) else ():
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    path = os.path.relpath(os.path.join(parent, name), root)
                    self._names.add(path)
                    for end in {name, stem, os.path.splitext(path)[0]}:
                        self._by_end.setdefault(end, []).append(path)

    def has(self, key):
        """Whether a key names one image."""
        try:
            return self.find(key)[1] in self._names
        except RowError:
            return False

    def find(self, key):
        """(path of the file, its name relative to the root), as `below`."""
        try:
            file, name = below(self._root, key)
            if name in self._names:
                return file, name
        except RowError:
            if ".." in key.split("/"):
                raise
        # A path of another computer, or one without suffix: what its end names.
        parts = [part for part in key.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            found = [end] if end in self._names else self._by_end.get(end, [])
            if len(found) == 1:
                return below(self._root, found[0])
            if found:
                raise RowError(BROKEN, f"'{one_line(key)}' may be any of {', '.join(found[:3])}")
        return below(self._root, key)


def _of_shards(root, tars, folder=None, beside=None):
    """Layout of shards, whose keys begin with their paths below `folder`; beside: function that yields more rows."""
    parts = tuple((tar, lambda tar=tar: shards.rows([tar], folder)) for tar in tars)
    parts += ((None, beside),) if beside else ()
    return Layout("webdataset", lambda: (row for _, rows in parts for row in rows()), root=str(root), shards=parts)


def _beside_shards(folder, files):
    """Bad rows for what lies beside the shards at any depth of a folder and is not read."""
    for row in folder_rows(folder, files):
        if isinstance(row, Record):
            yield BadRow(row.file, NOT_READ, "a loose image beside shards; give its folder, or remove one of both")
        elif row.reason == NOT_READ:
            yield row

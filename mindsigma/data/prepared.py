"""Writing a data set in another layout: official folder, JSON lines or WebDataset; a killed run is continued."""

import io
import json
import os
import re
import tarfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mindsigma.data.conversion_note import NotedFolder, require_own
from mindsigma.data.layouts import OFFICIAL_DATA, OFFICIAL_IMAGES, OFFICIAL_INDEX
from mindsigma.data.own_folder import Held, check_places
from mindsigma.data.records import open_image
from mindsigma.errors import MindSigmaError, printable
from mindsigma.weights.formats.atomic import naming, replacing

LAYOUTS = ("official", "jsonl", "webdataset")
IMAGES = "images"  # folder of the layout "jsonl"
TABLE = "metadata.jsonl"  # its table
SHARD_RECORDS = 1000
FOLDER_FILES = 1000  # in one folder of the target; more go to folders within, as writing looks through the folder
AHEAD = 64  # images copied or awaited at once

# What no part of a name may hold: controls, what other systems refuse, halves of characters (a name of wrong UTF-8).
UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\:*?\"<>|]")
LONGEST_PART = 180  # bytes, of 255; the rest is room for a number and for what stands beside while writing
LONGEST_SUFFIX = 16  # bytes
LONGEST_FOLDERS = 1000  # bytes of all folders of a name; below deeper ones nothing can be opened


def convert(records, target, to, threads=8, shard_records=SHARD_RECORDS, progress=None):
    """Write Records into the folder `target` in the layout `to`; images are copied byte for byte.

    Every file is written beside its place and renamed, and a note in the folder says that it is not complete until it
    is. The same conversion run again keeps the files that are what it would write, and writes the others anew.

    Args:
        records: Records.
        target: folder, absent, empty, or of an earlier run of the same conversion.
        to: "official", "jsonl" or "webdataset".
        threads: images copied at once.
        shard_records: samples of a WebDataset shard.
        progress: called with the number of records done since the last call.

    Raises:
        MindSigmaError: the folder holds something else or is being written, something is in the way, or it cannot be
            written. Obstructions are told before anything is changed.
    """
    if to not in LAYOUTS:
        raise MindSigmaError(f"layout {to!r} is unknown; choose from {', '.join(LAYOUTS)}")
    if shard_records < 1:
        raise MindSigmaError(f"a shard must hold at least 1 record, not {shard_records}")
    target = Path(target)
    task = {"to": to, "source": records.fingerprint(), "shard_records": shard_records if to == "webdataset" else None}
    names = safe_names([record.key for record in records])
    require_own(target, task)
    check_places(target, _places(to, names, shard_records))
    progress = progress or (lambda count: None)
    with Held(target):
        require_own(target, task)  # still, now that nobody else can change it
        writer = NotedFolder(target, task)
        if to == "webdataset":
            _write_shards(records, names, writer, shard_records, progress)
        elif to == "official":
            _copy_images(records, names, writer, OFFICIAL_IMAGES, threads, progress)
            writer.put(f"{OFFICIAL_DATA}/{OFFICIAL_INDEX}", lambda file: put_lines(file, _official(records, names)))
        else:
            _copy_images(records, names, writer, IMAGES, threads, progress)
            writer.put(TABLE, lambda file: put_lines(file, _table(records, names)))
        writer.complete()


def safe_names(keys):
    """A relative path for each key, all different, that stays below any folder whatever the key."""
    names, files, folders, filled = [], set(), set(), Counter()
    for number, key in enumerate(keys):
        parts = [UNSAFE.sub("_", part) for part in key.split("/")]
        parts = [part.removesuffix(".tar") for part in parts if part not in ("", ".", "..")]
        parts = [part.lstrip(".") or "_" for part in parts]  # hidden names are not read again
        stem, suffix = os.path.splitext(parts.pop() if parts else "_")
        stem, suffix = _cut(stem, LONGEST_PART), _cut(suffix, LONGEST_SUFFIX)
        parts = [_cut(part, LONGEST_PART) for part in parts]
        if len("/".join(parts).encode()) > LONGEST_FOLDERS:
            parts = ["deep"]
        folder = tuple(parts)
        if filled[folder] >= FOLDER_FILES:
            parts.append(f"part-{filled[folder] // FOLDER_FILES:04d}")
        filled[folder] += 1
        while any(part in files for part in _folders(parts)):  # a file has the name of one of the folders
            parts[0] += "_"
        name, again = "/".join([*parts, stem + suffix]), 0
        while name.lower() in files or name.lower() in folders:
            name = "/".join([*parts, f"{stem}-{number}{'_' * again}{suffix}"])
            again += 1
        files.add(name.lower())
        folders.update(_folders(parts))
        names.append(name)
    return names


def _folders(parts):
    """Paths, in lower case, of a folder and of those above it."""
    return ["/".join(parts[: i + 1]).lower() for i in range(len(parts))]


def _cut(text, length):
    return text.encode("utf-8")[:length].decode("utf-8", "ignore")


def write_lines(path, lines):
    """Write texts as lines of a UTF-8 file, whole or not at all; the folder is made if it is absent."""
    if path.exists() and not path.is_file():
        raise MindSigmaError(f"{path}: is no file; choose another name")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        put_lines(file, lines)


def write_bad_rows(path, rows):
    """Write a list of BadRow as lines `reason, where, detail` between tabs; what cannot be printed is escaped."""
    write_lines(path, ("\t".join(printable(part) for part in (row.reason, row.where, row.detail)) for row in rows))


def _places(to, names, shard_records):
    """Relative paths of all files that a conversion writes."""
    if to == "webdataset":
        return [_shard_name(number) for number in range(-(-len(names) // shard_records))]
    if to == "official":
        return [*(f"{OFFICIAL_IMAGES}/{name}" for name in names), f"{OFFICIAL_DATA}/{OFFICIAL_INDEX}"]
    return [*(f"{IMAGES}/{name}" for name in names), TABLE]


def _shard_name(number):
    return f"{number:05d}.tar"


def _copy_images(records, names, writer, folder, threads, progress):
    def copy(record, name):
        with open_image(record) as source:
            data = source.read()
        writer.put(f"{folder}/{name}", lambda file: file.write(data))

    pool, pending = ThreadPoolExecutor(max(1, threads)), deque()
    try:
        for pair in zip(records, names):
            pending.append(pool.submit(copy, *pair))
            if len(pending) >= AHEAD:
                pending.popleft().result()
                progress(1)
        while pending:
            pending.popleft().result()
            progress(1)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shards(records, names, writer, shard_records, progress):
    for number, start in enumerate(range(0, len(records), shard_records)):
        members = range(start, min(start + shard_records, len(records)))
        writer.put(_shard_name(number), lambda file, members=members: _write_shard(file, records, names, members))
        progress(len(members))


def _write_shard(file, records, names, members):
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in members:
            record = records[number]
            with open_image(record) as source:
                image = source.read()
            suffix = os.path.splitext(names[number])[1].lower()
            texts = {"key": record.key, **_texts(record)}
            for ending, data in ((suffix, image), (".json", json.dumps(texts).encode())):
                member = tarfile.TarInfo(f"{number:09d}{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _official(records, names):
    """Lines of the official index: a JSON list with an entry a line."""
    last = len(records) - 1
    yield "["
    for i, (record, name) in enumerate(zip(records, names)):
        row = {"path": name, **_texts(record), "ratio": record.height / record.width}
        yield json.dumps(row, ensure_ascii=False) + ("," if i < last else "")
    yield "]"


def _table(records, names):
    """Lines of a table of JSON lines."""
    for record, name in zip(records, names):
        yield json.dumps({"file_name": f"{IMAGES}/{name}", **_texts(record)}, ensure_ascii=False)


def _texts(record):
    return {
        "prompt": record.prompt,
        "sharegpt4v": record.long_prompt,
        "height": record.height,
        "width": record.width,
    }


def put_lines(file, lines):
    """Write texts as lines to a binary file; a lone surrogate is escaped."""
    for line in lines:
        file.write((line + "\n").encode("utf-8", "backslashreplace"))

"""Writing a data set in another layout: official folder, JSON lines or WebDataset; a killed run is continued."""

import io
import json
import os
import re
import tarfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mindsigma.checkpoints.atomic import naming, replacing, write_json
from mindsigma.data.layouts import OFFICIAL_DATA, OFFICIAL_IMAGES, OFFICIAL_INDEX, STATE
from mindsigma.data.records import open_image
from mindsigma.errors import MindSigmaError

LAYOUTS = ("official", "jsonl", "webdataset")
SHARD_RECORDS = 1000
FOLDER_FILES = 1000  # in one folder of the target; more go to folders within, as writing looks through the folder
AHEAD = 64  # images copied or awaited at once


def convert(records, target, to, threads=8, shard_records=SHARD_RECORDS, progress=None):
    """Write Records into the folder `target` in the layout `to`; images are copied byte for byte.

    Every file is written beside its place and renamed, and a note in the folder says that it is not complete until it
    is. The same conversion run again keeps the files that are there.

    Args:
        records: Records.
        target: folder, absent, empty, or of an interrupted run of the same conversion.
        to: "official", "jsonl" or "webdataset".
        threads: images copied at once.
        shard_records: samples of a WebDataset shard.
        progress: called with the number of records done since the last call.

    Raises:
        MindSigmaError: the folder holds something else, or cannot be written.
    """
    if to not in LAYOUTS:
        raise MindSigmaError(f"layout {to!r} is unknown; choose from {', '.join(LAYOUTS)}")
    if shard_records < 1:
        raise MindSigmaError(f"a shard must hold at least 1 record, not {shard_records}")
    target = Path(target)
    task = {"to": to, "source": records.fingerprint(), "shard_records": shard_records if to == "webdataset" else None}
    _claim(target, task)
    names = safe_names([record.key for record in records])
    progress = progress or (lambda count: None)
    if to == "webdataset":
        _write_shards(records, names, target, shard_records, progress)
    elif to == "official":
        _copy_images(records, names, target / OFFICIAL_IMAGES, threads, progress)
        _write_list(target / OFFICIAL_DATA / OFFICIAL_INDEX, [_official(*pair) for pair in zip(records, names)])
    else:
        _copy_images(records, names, target / "images", threads, progress)
        rows = [{"file_name": f"images/{name}", **_texts(record)} for record, name in zip(records, names)]
        write_lines(target / "metadata.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    write_json(target / STATE, {**task, "complete": True})


def safe_names(keys):
    """A relative path for each key, all different, that stays below any folder whatever the key."""
    names, taken, filled = [], set(), Counter()
    for number, key in enumerate(keys):
        parts = [re.sub(r"[\x00-\x1f\\:*?\"<>|]", "_", part) for part in key.split("/")]
        parts = [part.removesuffix(".tar") for part in parts if part not in ("", ".", "..")]
        parts = [part.lstrip(".") or "_" for part in parts]  # hidden names are not read again
        stem, suffix = os.path.splitext(parts.pop() if parts else "_")
        folder = tuple(parts)
        if filled[folder] >= FOLDER_FILES:
            parts.append(f"part-{filled[folder] // FOLDER_FILES:04d}")
        filled[folder] += 1
        # A file system's limit is 255 bytes; the rest is room for a number and for what stands beside while writing.
        stem = stem.encode("utf-8", "replace")[:180].decode("utf-8", "ignore")
        name = "/".join([*parts, stem + suffix])
        if name.lower() in taken:
            name = "/".join([*parts, f"{stem}-{number}{suffix}"])
        taken.add(name.lower())
        names.append(name)
    return names


def write_lines(path, lines):
    """Write texts as lines of a UTF-8 file, whole or not at all; the folder is made if it is absent."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        for line in lines:
            file.write((line + "\n").encode("utf-8", "backslashreplace"))


def _claim(target, task):
    """Mark the folder as the incomplete target of this task, or raise."""
    state = target / STATE
    if state.is_file():
        try:
            stored = json.loads(state.read_text())
            same = all(stored.get(name) == value for name, value in task.items())
        except (OSError, ValueError, AttributeError):
            same = False
        if not same:
            raise MindSigmaError(f"{target}: holds another conversion; choose another folder, or delete this one")
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise MindSigmaError(f"{target}: is not an empty folder; choose another target")
    write_json(state, {**task, "complete": False})


def _copy_images(records, names, folder, threads, progress):
    def copy(record, name):
        with open_image(record) as source:
            data = source.read()
        path = folder / name
        if path.is_file() and path.stat().st_size == len(data):
            return  # of an earlier run of this task, as it was renamed into place
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(data)

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


def _write_shards(records, names, target, shard_records, progress):
    for start in range(0, len(records), shard_records):
        path = target / f"{start // shard_records:05d}.tar"
        count = min(shard_records, len(records) - start)
        if not path.is_file():
            with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for number in range(start, start + count):
                    record = records[number]
                    with open_image(record) as source:
                        image = source.read()
                    suffix = os.path.splitext(names[number])[1].lower()
                    texts = {"key": record.key, **_texts(record)}
                    for ending, data in ((suffix, image), (".json", json.dumps(texts).encode())):
                        member = tarfile.TarInfo(f"{number:09d}{ending}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        progress(count)


def _official(record, name):
    return {"path": name, **_texts(record), "ratio": record.height / record.width}


def _texts(record):
    return {
        "prompt": record.prompt,
        "sharegpt4v": record.long_prompt,
        "height": record.height,
        "width": record.width,
    }


def _write_list(path, rows):
    """A JSON list with an entry a line."""
    last = len(rows) - 1
    lines = (json.dumps(row, ensure_ascii=False) + ("," if i < last else "") for i, row in enumerate(rows))
    write_lines(path, ["[", *lines, "]"])

"""Building an index: any number of processes read the source in pieces, the one that ends last joins them.

.building/task.json            what is being built
.building/000000.safetensors   the columns of a piece: a shard, or some rows of a table or folder

The same command again goes on; it may be given to several processes at once, which may come and go.
"""

import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mindsigma.data.columns import Kind, Part, Parts, arrays_of, merge, text_arrays, write_part
from mindsigma.data.index import (
    BAD,
    CURRENT,
    FILES,
    FORMAT,
    ORDER,
    ROWS,
    is_index,
    joined_fingerprint,
    read_version,
    row_tuples,
)
from mindsigma.data.layouts import find_layout
from mindsigma.data.own_folder import Held
from mindsigma.data.record import ABSENT, DUPLICATE, BadRow, Record
from mindsigma.data.records import MAX_RATIO, MOST_BAD, fingerprint, judged, require_ratio, row_digest, unique
from mindsigma.data.shares import claim
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes
from mindsigma.weights.formats.atomic import naming, write_json

BUILDING, TASK, JOINING = ".building", "task.json", "joining"
PIECE_ROWS = 1 << 14  # rows of a table or folder that are a piece
LARGEST_TASK = 1 << 20  # bytes
MOST_ROWS = 2**31 - 1  # of a part
OPEN = 64  # pieces kept open while keys that come twice are compared
PIECE = (ROWS, FILES, BAD)
GONE = (Kind("gone", np.uint64),)  # row_digest of the keys of a piece's bad images: later rows of theirs are duplicates


class Piece(NamedTuple):
    """A part of the work: number, what its rows follow from (a text), function that yields them, path of a shard."""

    number: int
    source: str
    rows: object
    shard: object = None


class Built(NamedTuple):
    """What came of a call: the version, 0 if other processes still work; pieces made here; rows known before."""

    version: int
    made: int
    known: int = 0


class Building:
    """An index that is built, or added to.

    Args:
        source: data set of any layout.
        target: folder of the index: absent, empty, or an index.
        append: add the source's new records to the index that is there; else it must be of this source or absent.
        max_ratio, image_root: as for open_records.
        threads: images' headers read at once.

    Raises:
        MindSigmaError: no data set there; the folder holds something else, another index, or another unfinished one.
    """

    def __init__(self, source, target, append=False, max_ratio=MAX_RATIO, image_root=None, threads=8):
        require_ratio(max_ratio)
        self.source, self.target, self.threads, self.max_ratio = str(source), Path(target), threads, max_ratio
        self.layout = find_layout(source, image_root)
        self.root = os.path.abspath(self.layout.root)
        self.base, self.document = read_version(self.target) if is_index(self.target) else (0, {"parts": []})
        self.task = {
            "source": os.path.abspath(source),
            "root": self.root,
            "layout": self.layout.name,
            "max_ratio": max_ratio,
        }
        self.complete = False
        if self.base and not append:
            last = self.document["parts"][-1]
            self.complete = all(last.get(name) == value for name, value in self.task.items())
            if not self.complete:
                raise MindSigmaError(
                    f"{target}: is an index of {last['source']}; add to it with --append, or choose another"
                )
        self._require_free()
        self._held = Held(self.target, shared=True)
        self.folder = self.target / BUILDING
        self._known = self._known_shards()
        self._begin()

    def run(self, progress=None):
        """Make what pieces nobody else makes, and join all if they are there. Returns Built.

        `progress` is called with the number of records read since the last call. Raises MindSigmaError where the source
        has no usable record, or a shard of the index is another by now.
        """
        if self.complete:
            return Built(self.base, 0)
        count, made, elsewhere = 0, 0, []
        for piece in self._pieces():
            count += 1
            if not self._is_there(piece):
                with claim(self.folder, f"{piece.number:06d}") as mine:
                    if mine and not self._is_there(piece) and not self._finished():
                        rows = self._make(piece)
                        made += 1
                        if progress:
                            progress(rows)
                    elif not mine:
                        elsewhere.append(piece._replace(rows=None))
        if self._finished():
            return Built(self.base + 1, made)
        with claim(self.folder, JOINING) as mine:
            if self._finished():  # meanwhile
                self._remove_leftovers()
                return Built(self.base + 1, made)
            if not mine or not all(map(self._is_there, elsewhere)):
                return Built(0, made)
            return self._join([self._path(number) for number in range(count)], made)

    def _require_free(self):
        if not self.target.is_dir():
            return
        with naming(self.target):
            foreign = [name for name in os.listdir(self.target) if not name.startswith(".")]
        if foreign and not is_index(self.target) and not (self.target / BUILDING).is_dir():
            raise MindSigmaError(
                f"{self.target}: holds something else, such as {one_line(foreign[0])}; choose an empty folder"
            )

    def _begin(self):
        """Note the task, or go on with the same one. What the version that is there left is removed."""
        note, task = self.folder / TASK, {**self.task, "base": self.base}
        if note.is_file():
            stored = load_json(note, read_bytes(note, LARGEST_TASK), "the note of an index")
            if stored.get("base") != self.base:
                self._remove_leftovers()
            elif stored != task:
                raise MindSigmaError(
                    f"{self.target}: an index of {one_line(stored.get('source'))} is unfinished there, or of other "
                    f"options; finish it, or delete {self.folder}"
                )
        if self.complete:
            self._remove_leftovers()
        elif not note.is_file():
            for path in self.folder.glob("[0-9]*"):  # of a building whose end was interrupted
                path.unlink()
            write_json(note, task)

    def _finished(self):
        """Whether another process has joined the pieces by now."""
        return is_index(self.target) and read_version(self.target)[0] > self.base

    def _path(self, number):
        return self.folder / f"{number:06d}.safetensors"

    def _known_shards(self):
        """dict from the name of a shard that the index holds, of this source, to its size and time."""
        known = {}
        for part in self.document["parts"] if self.layout.shards else ():
            if part["source"] == self.task["source"]:
                columns = Part(self.target / part["file"], ROWS, FILES)
                known.update(zip(columns.all_texts("files"), map(tuple, columns.arrays["stamp"].tolist())))
        return known

    def _pieces(self):
        """Yield Piece after Piece of the source, always the same; shards that the index holds are left out."""
        if self.layout.shards:
            number = 0
            for path, rows in self.layout.shards:
                stamp = _stamp(path) if path else (0, 0)
                known = self._known.get(self._below(str(path))) if path else self._known
                if path and known and known != stamp:
                    raise MindSigmaError(f"{path}: is another file than when it was indexed; build a new index")
                if not known:
                    yield Piece(number, f"{stamp} {path}", lambda rows=rows: list(rows()), path)
                    number += 1
            return
        rows = iter(self.layout.rows())
        for number in itertools.count():
            some = list(itertools.islice(rows, PIECE_ROWS))
            if not some:
                return
            yield Piece(number, fingerprint(map(tuple, some)), lambda some=some: some)

    def _is_there(self, piece):
        path = self._path(piece.number)
        if not path.is_file():
            return False
        try:
            return Part(path, *PIECE).metadata.get("source") == one_line(piece.source, 500)
        except MindSigmaError:
            return False

    def _make(self, piece):
        """Read a piece and write its columns; returns the number of its rows."""
        rows = list(unique(piece.rows()))
        good, bad = self._present([row for row in rows if isinstance(row, Record)])
        kept, more = judged(good, self.max_ratio, self.threads, False)
        gone = {record.key for record in good} - {record.key for record in kept}
        bad = [row for row in rows if not isinstance(row, Record)] + bad + more
        files = {self._below(str(piece.shard)): 0} if piece.shard else {}
        columns = [
            (
                *record[:3],
                (record.height, record.width),
                files.setdefault(self._below(record.file), len(files)),
                (record.offset, record.length),
                (row_digest(record.key), row_digest((record.prompt, record.long_prompt))),
            )
            for record in kept
        ]
        stamps = [_stamp(piece.shard) if piece.shard else (0, 0)] + [(0, 0)] * len(files)
        arrays = arrays_of(ROWS, columns)
        arrays.update(arrays_of(FILES, list(zip(files, stamps))))
        arrays.update(arrays_of(BAD, [row.shown() for row in bad]))
        arrays.update(arrays_of(GONE, [(row_digest(key),) for key in sorted(gone)]))
        write_part(self._path(piece.number), arrays, {"source": one_line(piece.source, 500)})
        return len(rows)

    def _present(self, records):
        """(those of a list of Record whose file is there, BadRow of the others); a listing is believed."""
        if self.layout.shards or self.layout.name == "folder":
            return records, []
        with ThreadPoolExecutor(self.threads) as pool:
            there = list(pool.map(lambda record: os.path.isfile(record.file), records))
        good = [record for record, found in zip(records, there) if found]
        return good, [BadRow(record.file, ABSENT) for record, found in zip(records, there) if not found]

    def _below(self, path):
        """A path as it is stored: below the root, or whole."""
        path = os.path.abspath(path)
        return path[len(self.root) :].lstrip(os.sep) if path.startswith(self.root.rstrip(os.sep) + os.sep) else path

    def _join(self, paths, made):
        """Make the next version of the pieces; of none that has a new row, leave the index as it is."""
        known = self._leave_out(paths)
        pieces = Parts(paths, *PIECE)
        counts = np.array([part.counts for part in pieces]).reshape(-1, len(PIECE))
        rows, _, bad = counts.sum(0).tolist() if len(counts) else (0, 0, 0)
        if bad > MOST_BAD:
            raise MindSigmaError(f"{self.source}: more than {MOST_BAD} bad rows; mend it first")
        if rows > MOST_ROWS:
            raise MindSigmaError(f"{self.source}: {rows} records, more than the {MOST_ROWS} of a part; index it in two")
        if not rows:
            if self.base:
                self._remove_leftovers()
                return Built(self.base, made, known)
            raise MindSigmaError(
                f"{self.source}: no usable image with a caption ({self.layout.name} layout){_example(pieces)}"
            )
        ratios = np.concatenate([_ratios(part.arrays["size"]) for part in pieces])
        order = np.argsort(ratios, kind="stable").astype(np.int32)
        firsts = np.cumsum([0, *counts[:, 1]])[:-1].tolist()
        name = f"part-{self.base + 1:04d}.safetensors"
        merge(self.target / name, pieces, {"by_ratio": order}, {"file": firsts})
        del ratios, order
        described = describe_part(self.target, name, self.task)
        write_version(self.target, self.base + 1, [*self.document["parts"], described])
        self._remove_leftovers()
        return Built(self.base + 1, made, known)

    def _leave_out(self, paths):
        """Take rows out of the pieces whose key came before, there or in the index; the number that it held already.

        What came twice in the source, or has other captions or another size than in the index, is listed as bad.
        """
        olds = [self.target / part["file"] for part in self.document["parts"]]
        files = [*olds, *paths]
        digests = [part.arrays["digest"][:, 0].copy() for part in Parts(files, ROWS)]
        bounds, keys = np.cumsum([0, *map(len, digests)]), np.concatenate(digests)
        order = np.argsort(keys, kind="stable")
        opened = lru_cache(OPEN)(lambda number: Part(files[number], ROWS))

        def row(place):
            """(number of the file, of the row in it, key, what else tells the record) of a row of all."""
            number = int(np.searchsorted(bounds, place, "right")) - 1
            part, i = opened(number), int(place - bounds[number])
            return number, i, part.texts("key", i, i + 1)[0], (*part.arrays["size"][i], part.arrays["digest"][i, 1])

        known, drops, first = 0, {}, None
        for at in np.flatnonzero(keys[order[1:]] == keys[order[:-1]]) + 1:
            if first is None or keys[order[at]] != keys[order[first]]:
                first = at - 1
            number, i, key, content = row(order[at])
            earlier, _, other, before = row(order[first])
            if number < len(olds) or key != other:  # two keys of one digest
                continue
            if earlier < len(olds) and content == before:
                known += 1
                drops.setdefault(number, {})[i] = None
            else:
                why = "is in the index with other captions or another size" if earlier < len(olds) else "comes twice"
                drops.setdefault(number, {})[i] = f"{key} {why}"
        gone = np.empty(0, np.uint64)
        for number, part in enumerate(Parts(paths, *PIECE, GONE), len(olds)):
            for i in np.flatnonzero(np.isin(digests[number], gone)).tolist():
                drops.setdefault(number, {})[i] = f"{part.texts('key', i, i + 1)[0]} comes twice"
            gone = np.concatenate([gone, part.arrays["gone"]])
        for number, rows in drops.items():
            self._drop(files[number], rows)
        return known

    def _drop(self, path, rows):
        """Write a piece anew without some rows: dict from the number of a row to why it is bad, None if it is not."""
        part = Part(path, *PIECE)
        keep = np.array([i for i in range(part.rows) if i not in rows], np.int64)
        arrays = {name: np.array(array) for name, array in part.arrays.items()}
        for kind in ROWS:
            if kind.dtype is None:
                texts = list(part.all_texts(kind.name))
                arrays.update(text_arrays(kind.name, [texts[i] for i in keep]))
            else:
                arrays[kind.name] = arrays[kind.name][keep]
        names = list(part.all_texts("files"))
        bad = list(zip(*(part.all_texts(kind.name) for kind in BAD)))
        bad += [
            (os.path.join(self.root, names[part.arrays["file"][i]]), DUPLICATE, why) for i, why in rows.items() if why
        ]
        arrays.update(arrays_of(BAD, [BadRow(*row).shown() for row in bad]))
        write_part(path, arrays, part.metadata)

    def _remove_leftovers(self):
        shutil.rmtree(self.folder, ignore_errors=True)


def describe_part(target, name, task):
    """dict of a part of an index for the description of its version."""
    part = Part(target / name, ROWS, FILES, BAD, ORDER)
    return {
        "file": name,
        "rows": part.rows,
        "bad": part.counts[2],
        "bytes": (target / name).stat().st_size,
        "fingerprint": fingerprint(row_tuples(part)),
        "relative": os.path.relpath(task["root"], target),
        **task,
    }


def write_version(target, number, parts):
    """Declare a version of an index; the newest is what is opened."""
    document = {
        **FORMAT,
        "version": number,
        "rows": sum(part["rows"] for part in parts),
        "fingerprint": joined_fingerprint([part["fingerprint"] for part in parts]),
        "parts": parts,
    }
    write_json(target / _version_name(number), document)
    write_json(target / CURRENT, document)


def _version_name(number):
    return f"version-{number:04d}.json"


def _stamp(path):
    with naming(path):
        found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _ratios(sizes):
    """float64 (n,), height / width, as Resolution.assign divides."""
    sizes = np.asarray(sizes, np.float64)
    return sizes[:, 0] / sizes[:, 1]


def _example(pieces):
    for part in pieces:
        for where, reason, detail in zip(*(part.all_texts(kind.name) for kind in BAD)):
            return f"; bad rows: {reason}, e.g. {one_line(where, 300)}{': ' if detail else ''}{one_line(detail, 300)}"
    return "; it holds none"

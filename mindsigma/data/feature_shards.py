"""Features in tar shards: the files of the other form (`features.py`) are members, read by offset.

features.json                      what they were made with
null_caption.safetensors           T5's states of the empty caption
shards/001-00000.tar               moments, states and what else a record has; the names of members hold their CRC-32
index.safetensors                  the records as columns (`columns.py`), written when all are there
.building/001-00000.safetensors    the columns of a shard, until then
left_out.txt                       the records whose image cannot be read, if there are any

The first number of a shard is that of the round. Shards are never changed: what is new, or was made of another image or
caption, goes to the shards of another round.
"""

import os
import re
import shutil
import threading
import zlib
from collections import OrderedDict
from itertools import islice

import numpy as np

from mindsigma.data.columns import AT_ONCE, Column, Kind, Part, Parts, arrays_of, merge, write_part
from mindsigma.data.feature_set import FeatureSet
from mindsigma.data.features import (
    AGAIN,
    BAD,
    LEFT_OUT,
    LONG_STATES,
    SHARDS,
    STATES,
    FeatureWriter,
    is_current,
    is_sharded,
)
from mindsigma.data.growing_tar import GrowingTar
from mindsigma.data.index import BAD as BAD_ROWS
from mindsigma.data.index import FILES, ORDER, ROWS
from mindsigma.data.record import UNREADABLE, BadRow, Record
from mindsigma.data.records import fingerprint, row_digest
from mindsigma.data.shares import claim
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular, read_bytes, understanding
from mindsigma.weights.formats.atomic import copy_file
from mindsigma.weights.formats.safetensors_file import parse_safetensors
from mindsigma.weights.formats.safetensors_writer import safetensors_pieces

INDEX, FOLDER, BUILDING = "index.safetensors", "shards", ".building"
MEMBER = re.compile(r"\d{9}-([0-9a-f]{8})\.safetensors")
LARGEST_MEMBER = 1 << 30  # bytes
TOGETHER = 64  # records that are translated between two moments at which the disk is waited for
OPEN = 256  # shards that a process keeps open

# Of a record in a shard, beside what an index of images tells: `place` and `file` are those of its member.
FEATURES = (
    *ROWS,
    Kind("tokens", np.int32, (2,)),  # of the short caption, of the long one
    Kind("crc", np.uint32),
    Kind("image", np.uint64, (2,)),  # row_digest of the stamp and of the bytes of its image
)
PIECE = (FEATURES, FILES, BAD_ROWS)


def open_features(path):
    """The FeatureSet of a folder of features, in either form."""
    return ShardedFeatureSet(path) if is_sharded(path) else FeatureSet(path)


class ShardedFeatureSet(FeatureSet):
    """Features in shards; stands where a FeatureSet stands. Opening them takes the same time however many there are.

    Attributes:
        digests: uint64 (n, 2), row_digest of each record's key and of what a run depends on besides its size.
        fingerprints: list of the fingerprint, as an Index has it.
    """

    version = SHARDS

    def _read_index(self):
        file = self.path / INDEX
        if not file.is_file():
            raise MindSigmaError(f"{self.path}: the extraction is not finished ({INDEX} is absent); {AGAIN}")
        self._part = Part(file, FEATURES, FILES, ORDER)
        if not self._part.rows or self._part.counts[2] != self._part.rows:
            raise self._part.damaged("it tells no record")
        self.digests, self.fingerprints = Column([self._part.arrays["digest"]]), [self.fingerprint()]
        self._shards = _OpenShards(self.path, self._part)
        return _Rows(self._part), Column([self._part.arrays["size"]])

    def by_ratio(self):
        """See Index."""
        return [(0, self._part.arrays["by_ratio"])]

    def fingerprint(self):
        """See FeatureSet; it was made when the index was."""
        return self._told("fingerprint")

    def _longest(self):
        text = self._told("longest")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise self._part.damaged("it does not tell the longest caption")
        return int(text)

    def _told(self, name):
        if name not in self._part.metadata:
            raise self._part.damaged(f"it does not tell the {name}")
        return self._part.metadata[name]

    def place(self, index):
        """See FeatureSet."""
        return (str(self._shards.path(self._shard(index))), *self._value("place", index))

    def where(self, index):
        """Shard and record, for messages."""
        return f"{self._shards.path(self._shard(index))}: {self._rows[index][0]}"

    def tensors(self, index):
        """See FeatureSet. Raises MindSigmaError, naming the shard, where the bytes are not those that were written."""
        offset, length = self._value("place", index)
        if not (0 <= length <= LARGEST_MEMBER and offset >= 0):
            raise self._part.damaged(f"row {index} is none that was written")
        where = self.where(index)
        data = self._shards.read(self._shard(index), offset, length, where)
        if zlib.crc32(data) != self._value("crc", index):
            raise MindSigmaError(f"{where}: damaged, its checksum is another; delete the shard and {AGAIN}")
        return parse_safetensors(where, np.frombuffer(data, np.uint8))[0]

    def _shard(self, index):
        return self._value("file", index)

    def _value(self, name, index):
        index = range(len(self))[index]
        return self._part.read(name, index, index + 1)[0].tolist()


class _Rows:
    """The rows of features as FeatureSet has them, read when they are asked for."""

    def __init__(self, part):
        self._part = part

    def __len__(self):
        return self._part.rows

    def __getitem__(self, index):
        index = range(len(self))[index]
        return next(self._made(index, index + 1))

    def __iter__(self):
        for start in range(0, len(self), AT_ONCE):
            yield from self._made(start, min(start + AT_ONCE, len(self)))

    def _made(self, start, stop):
        texts = (self._part.texts(name, start, stop) for name in ("key", "prompt", "long_prompt"))
        numbers = (self._part.read(name, start, stop).tolist() for name in ("size", "tokens"))
        for key, prompt, long_prompt, size, tokens in zip(*texts, *numbers):
            if min(size) < 1 or any(bool(text) != (count > 0) for text, count in zip((prompt, long_prompt), tokens)):
                raise self._part.damaged(f"the row of {one_line(key)} is none that was written")
            yield key, prompt, long_prompt, tuple(size), tuple(tokens)


class _OpenShards:
    """Reads from the shards of a folder, of which it keeps some open; threads may share it."""

    def __init__(self, folder, part):
        self._folder, self._part, self._lock, self._files = folder, part, threading.Lock(), OrderedDict()

    def path(self, number):
        """Path of the shard of a number."""
        if not 0 <= number < self._part.counts[1]:
            raise self._part.damaged(f"shard {number} is not in its list")
        (name,) = self._part.texts("files", number, number + 1)
        if os.path.basename(name) != name:
            raise self._part.damaged(f"'{one_line(name)}' is no shard's name")
        return self._folder / FOLDER / name

    def read(self, number, offset, length, where):
        """bytes of a shard."""
        file = self._file(number)
        with understanding(where, AGAIN):
            data = os.pread(file.fileno(), length, offset)
        if len(data) != length:
            raise MindSigmaError(f"{where}: cut off; delete the shard and {AGAIN}")
        return data

    def _file(self, number):
        with self._lock:
            if number not in self._files:
                self._files[number] = open_regular(self.path(number))
                if len(self._files) > OPEN:
                    self._files.popitem(last=False)  # closed when nobody reads from it any more
            self._files.move_to_end(number)
            return self._files[number]


class FeatureShards(FeatureWriter):
    """A folder of features in shards while it is written.

    Args:
        path, config: as for FeatureWriter.
        records: of which the features are: Records, or any sequence of Record.
        shard_records: records of a shard.
        condition: as for FeatureWriter.

    Attributes:
        missing: int64 (n,), the records that the finished folder lacks, or holds of another image or caption.
        count: number of the shards that they make.
    """

    version = SHARDS

    def __init__(self, path, config, records, shard_records, condition=None):
        if shard_records < 1:
            raise MindSigmaError(f"a shard must hold at least 1 record, not {shard_records}")
        super().__init__(path, config, condition)
        self.records, self._shard_records = records, shard_records
        self._old = Part(self.path / INDEX, FEATURES, FILES, ORDER) if (self.path / INDEX).is_file() else None
        self._round = 1 + _round_of(self._old) if self._old else 1
        self.missing = self._find_missing()
        self.count = -(-len(self.missing) // shard_records)
        self.building = self.path / BUILDING

    def share(self, number):
        """list of the records of a shard, as numbers."""
        return self.missing[number * self._shard_records : (number + 1) * self._shard_records].tolist()

    def is_there(self, number):
        """Whether a shard is complete and of the records as they are now."""
        there = self._piece(number) is not None and (self.path / FOLDER / self._name(number)).is_file()
        return there or self._is_joined()

    def claim(self, number):
        """See shares.claim."""
        return claim(self.building, f"{self._round:03d}-{number:05d}")

    def open_shard(self, number, chunks):
        """The Shard of a number; chunks: lists of the records that are added together, in this order."""
        return Shard(self, number, chunks)

    def finish(self):
        """Write the index if all shards are there. Returns (shards that are to come, list of BadRow left out)."""
        if self._is_joined():
            return 0, []
        absent = [number for number in range(self.count) if not self.is_there(number)]
        if absent:
            return len(absent), []
        if self._old and not self.count and len(self.records) == self._old.rows:
            shutil.rmtree(self.building, ignore_errors=True)  # an end that was interrupted may have left it
            return 0, []
        with claim(self.building, "joining") as mine:
            if self._is_joined():  # meanwhile
                shutil.rmtree(self.building, ignore_errors=True)
                return 0, []
            return (0, self._join()) if mine else (1, [])

    def _is_joined(self):
        """Whether another process has written the index of this round by now."""
        file = self.path / INDEX
        return file.is_file() and _round_of(Part(file, FEATURES, FILES, ORDER)) >= self._round

    def _name(self, number):
        return f"{self._round:03d}-{number:05d}.tar"

    def _piece_path(self, number):
        return self.building / f"{self._round:03d}-{number:05d}.safetensors"

    def _source(self, number):
        """What a shard's columns are made of, a text."""
        identities = (tuple(self.identity(self.records[i]).values()) for i in self.share(number))
        return fingerprint(identities)

    def _piece(self, number):
        """Part with the columns of a complete shard, or None."""
        try:
            part = Part(self._piece_path(number), *PIECE)
        except MindSigmaError:
            return None
        return part if part.metadata.get("source") == self._source(number) else None

    def _find_missing(self):
        if self._old is None:
            return np.arange(len(self.records))
        self._order, self._keys = _sorted_keys(self._old)
        self._whole = [_bytes_of(self.path / FOLDER / name) == stamp[0] for name, stamp in _files(self._old)]
        return np.flatnonzero(np.fromiter((self._old_row(r) is None for r in self.records), bool, len(self.records)))

    def _old_row(self, record):
        """Number of the row of the finished index that is of a Record as it is now, or None."""
        row = _found(record, self._order, self._keys)
        if row is None:
            return None
        arrays = self._old.arrays
        if not self._whole[int(arrays["file"][row])]:
            return None
        content = row_digest((record.prompt, record.long_prompt, *arrays["tokens"][row].tolist()))
        if (content, [record.height, record.width]) != (int(arrays["digest"][row, 1]), arrays["size"][row].tolist()):
            return None
        stamp, data = arrays["image"][row].tolist()
        return row if self.is_current(record, {"stamp": stamp, "digest": data}, row_digest) else None

    def is_current(self, record, metadata, stored=str):
        """Whether what a file of features tells of its image is of a Record's image as it is now."""
        return is_current(record, metadata, stored, self.condition)

    def _join(self):
        """Write the index of all records, in their order, and what was left out; list of BadRow of that."""
        paths = [self._piece_path(number) for number in range(self.count)]
        new = Parts(paths, *PIECE)
        left_out = [BadRow(*row) for part in new for row in zip(*(part.all_texts(kind.name) for kind in BAD_ROWS))]
        if self._old is not None:
            paths = self._rearranged(new)
        if any(part.rows for part in Parts(paths, *PIECE)):
            self._write_index(Parts(paths, *PIECE))
            self.write_left_out(left_out)
        for part in new:
            if not part.rows:  # bad images alone
                (self.path / FOLDER / next(part.all_texts("files"))).unlink(missing_ok=True)
        shutil.rmtree(self.building, ignore_errors=True)
        return left_out

    def _write_index(self, pieces):
        counts = np.array([part.counts for part in pieces])
        sizes = np.concatenate([part.arrays["size"] for part in pieces]).astype(np.float64)
        longest = max(int(part.arrays["tokens"].max(initial=0)) for part in pieces)
        order = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable").astype(np.int32)
        rows = (row for part in pieces for row in _Rows(part))
        head = [sorted(self.config.items())]
        metadata = {
            "fingerprint": fingerprint(row for some in (head, rows) for row in some),
            "longest": str(longest),
            "round": str(self._round),
        }
        added = {"file": np.cumsum([0, *counts[:, 1]])[:-1].tolist()}
        merge(self.path / INDEX, Parts(pieces.paths, FEATURES, FILES), {"by_ratio": order}, added, metadata)

    def _rearranged(self, new):
        """Paths of pieces with the rows of the finished index that stay and those of new pieces, as the records are."""
        fresh = self.building / "new.safetensors"
        firsts = np.cumsum([0, *(part.counts[1] for part in new)])[:-1].tolist()
        merge(fresh, new, None, {"file": firsts})
        parts = (self._old, Part(fresh, *PIECE))
        files = [_files(part) for part in parts]
        sorted_keys = (self._order, self._keys), _sorted_keys(parts[1])
        numbered, paths = enumerate(self.records), []
        while some := list(islice(numbered, AT_ONCE)):
            names, rows = {}, []
            for i, record in some:
                at = int(np.searchsorted(self.missing, i))
                which = int(at < len(self.missing) and self.missing[at] == i)  # 1: a row of this round
                row = _found(record, *sorted_keys[which])
                if row is not None:
                    values = {kind.name: _value(parts[which], kind, row) for kind in FEATURES}
                    name, stamp = files[which][values["file"]]
                    values["file"] = names.setdefault((name, tuple(stamp)), len(names))
                    rows.append(tuple(values.values()))
            arrays = {**arrays_of(FEATURES, rows), **arrays_of(FILES, list(names))}
            paths.append(self.building / f"joined-{len(paths):05d}.safetensors")
            write_part(paths[-1], {**arrays, **arrays_of(BAD_ROWS, [])}, {})
        return paths


def _round_of(part):
    """The number of the round that wrote an index."""
    text = part.metadata.get("round", "")
    if not (text.isascii() and text.isdigit() and len(text) < 7):
        raise part.damaged("it does not tell its round")
    return int(text)


def _files(part):
    """list of (name, [bytes, 0]) of the shards of a Part."""
    return list(zip(part.all_texts("files"), part.arrays["stamp"].tolist()))


def _bytes_of(path):
    """Size of a file, None if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _sorted_keys(part):
    """(rows by their keys' digests, these digests) of a Part."""
    digests = part.arrays["digest"][:, 0]
    order = np.argsort(digests, kind="stable")
    return order, digests[order]


def _found(record, order, keys):
    """Row of a Record's key, or None."""
    digest = np.uint64(row_digest(record.key))
    at = int(np.searchsorted(keys, digest))
    return int(order[at]) if at < len(keys) and keys[at] == digest else None


def _value(part, kind, row):
    return part.texts(kind.name, row, row + 1)[0] if kind.dtype is None else part.arrays[kind.name][row]


class Translation(FeatureShards):
    """Features of the other form that are put into shards, byte for byte.

    Args:
        source: FeatureSet. path, shard_records: as for FeatureShards.
    """

    def __init__(self, source, path, shard_records):
        self._source_set = source
        super().__init__(path, source.config, [_record(source, i) for i in range(len(source))], shard_records)
        if not self.has_null_caption():
            states, mask = source.null_caption()
            self.write_null_caption(states, int(mask.sum()))

    def is_current(self, record, metadata, stored=str):
        """See FeatureShards. The image is not at hand; who extracts again will look at it."""
        return True

    def run(self, progress=None):
        """Write the shards that no other process writes; returns how many are to come, as `finish`.

        `progress` is called with the number of records done since the last call. Raises MindSigmaError, which names the
        file, for a record whose features are absent, damaged or of something else.
        """
        for number in range(self.count):
            with self.claim(number) as mine:
                if mine and not self.is_there(number):
                    self._translate(number, progress)
        absent, _ = self.finish()
        if not absent and (self._source_set.path / LEFT_OUT).is_file():
            copy_file(self._source_set.path / LEFT_OUT, self.path / LEFT_OUT)
        return absent

    def _translate(self, number, progress):
        chunks = [self.share(number)[i : i + TOGETHER] for i in range(0, len(self.share(number)), TOGETHER)]
        with self.open_shard(number, chunks) as shard:
            for chunk in shard.left:
                for i in chunk:
                    shard.copy(self.records[i], self._bytes(i))
                shard.sync()
                if progress:
                    progress(len(chunk))
            shard.complete()

    def _bytes(self, i):
        """The bytes of a record's file, which are what the index tells."""
        file = self._source_set.where(i)
        data = read_bytes(file, LARGEST_MEMBER)
        _, metadata = parse_safetensors(file, np.frombuffer(data, np.uint8))
        if any(metadata.get(name) != value for name, value in self.identity(self.records[i]).items()):
            raise MindSigmaError(f"{file}: is of another record, or made otherwise, than the index tells; {AGAIN}")
        self._source_set.require_sound(i)
        return data


def _record(source, index):
    """Record of a row of features."""
    key, prompt, long_prompt, size, _ = source[index]
    return Record(key, prompt, long_prompt, *size, str(source.where(index)))


class Shard:
    """A shard that is written. What an earlier process wrote of it is kept, if it is still of the same records.

    Args:
        folder: FeatureShards. number: of the shard. chunks: as for FeatureShards.open_shard.

    Attributes:
        left: the chunks that are to be added.
    """

    def __init__(self, folder, number, chunks):
        self._folder, self._number, self._records = folder, number, folder.records
        self._tar = GrowingTar(folder.path / FOLDER / folder._name(number))
        self._rows, self._bad, self._written = [], [], 0
        self._places = {folder.records[i].key: i for chunk in chunks for i in chunk}
        self.left = chunks[self._keep(chunks) :]

    def write(self, record, tensors, image=None):
        """See FeatureFolder."""
        self._add(record, tensors, {**self._folder.identity(record), **(image or {})})

    def write_bad(self, record, reason, image=None):
        """See FeatureFolder."""
        note = {**self._folder.identity(record), **(image or {}), BAD: one_line(reason, 500)}
        self._add(record, {BAD: np.zeros(1, np.uint8)}, note)

    def copy(self, record, data):
        """Add the bytes of a record's file of the other form."""
        tensors, metadata = parse_safetensors(record.where, np.frombuffer(data, np.uint8))
        self._append(record, [data], tensors, metadata)

    def sync(self):
        """Bring what was added to the disk; called after each chunk."""
        self._tar.sync()

    def complete(self):
        """All records are there: give the shard its name and write its columns."""
        self._tar.complete()
        rows = [row for _, row in sorted(self._rows, key=lambda one: one[0])]
        name = self._tar.path.name
        arrays = {
            **arrays_of(FEATURES, rows),
            **arrays_of(FILES, [(name, (self._tar.path.stat().st_size, 0))]),
            **arrays_of(BAD_ROWS, self._bad),
        }
        source = {"source": self._folder._source(self._number)}
        write_part(self._folder._piece_path(self._number), arrays, source)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._tar.close()

    def _keep(self, chunks):
        """Take over the members of whole chunks; returns of how many."""
        members, whole = self._tar.members, 0
        for chunk in chunks:
            there = [self._known(*member) for member in members[self._written : self._written + len(chunk)]]
            if sorted(one[0] for one in there if one) != sorted(chunk):
                break
            for i, *rest in there:
                self._note(self._records[i], *rest)
            self._written += len(chunk)
            whole += 1
        self._tar.keep(self._written)
        return whole

    def _known(self, name, offset, length):
        """(record, tensors, metadata, place, CRC) of a member that is whole and of a record as it is now, or None."""
        match = MEMBER.fullmatch(name)
        if not match or length > LARGEST_MEMBER:
            return None
        data = self._tar.read(offset, length)
        crc = zlib.crc32(data)
        if crc != int(match[1], 16):
            return None
        try:
            tensors, metadata = parse_safetensors(name, np.frombuffer(data, np.uint8))
        except MindSigmaError:
            return None
        for i in self._sources().get(metadata.get("source"), ()):
            record = self._records[i]
            same = metadata == {**metadata, **self._folder.identity(record)}
            if same and self._folder.is_current(record, metadata):
                return i, tensors, metadata, offset, length, crc
        return None

    def _sources(self):
        """dict from what a file of features tells of its source to the records of the shard that it may be."""
        if not hasattr(self, "_by_source"):
            self._by_source = {}
            for i in self._places.values():
                source = self._folder.identity(self._records[i])["source"]
                self._by_source.setdefault(source, []).append(i)
        return self._by_source

    def _add(self, record, tensors, metadata):
        self._append(record, safetensors_pieces(self._tar.path, tensors, metadata), tensors, metadata)

    def _append(self, record, pieces, tensors, metadata):
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
        length = sum(memoryview(piece).nbytes for piece in pieces)
        offset = self._tar.add(f"{self._written:09d}-{crc:08x}.safetensors", *pieces)
        self._written += 1
        self._note(record, tensors, metadata, offset, length, crc)

    def _note(self, record, tensors, metadata, offset, length, crc):
        if BAD in metadata:
            self._bad.append(BadRow(record.where, UNREADABLE, metadata[BAD]).shown())
            return
        texts = ((STATES, record.prompt), (LONG_STATES, record.long_prompt))
        tokens = tuple(len(tensors[name]) if text else 0 for name, text in texts)
        row = (
            *record[:3],
            (record.height, record.width),
            0,
            (offset, length),
            (row_digest(record.key), row_digest((record.prompt, record.long_prompt, *tokens))),
            tokens,
            crc,
            tuple(row_digest(metadata.get(name, "")) for name in ("stamp", "digest")),
        )
        self._rows.append((self._places[record.key], row))

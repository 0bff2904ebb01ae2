"""An index: the records of data sets as memory-mapped columns, opened in milliseconds however many there are.

mindsigma-index.json      the newest version: its parts, how many rows, their fingerprint
version-0001.json         every version there was; naming one opens it
part-0001.safetensors     the columns of the rows that a version added

`index_building.py` writes it. Rows are never changed: what is appended makes another version and leaves the old ones.
"""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from mindsigma.data.columns import AT_ONCE, Column, Kind, Part
from mindsigma.data.record import BadRow, Record
from mindsigma.data.records import Records, fingerprint
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes, understanding

CURRENT = "mindsigma-index.json"
VERSION = re.compile(r"version-(\d{4,9})\.json")
FORMAT = {"format": "mindsigma-index", "format_version": 1}
LARGEST_DOCUMENT = 16 << 20  # bytes
AGAIN = "build the index again with tools/prepare_data.py --index"

# The columns. `place` is offset and length in a shard, 0 and 0 for a whole file. `digest` is the row_digest of the key
# and of the captions, by which a run tells records apart.
ROWS = (
    Kind("key"),
    Kind("prompt"),
    Kind("long_prompt"),
    Kind("size", np.int32, (2,)),  # height, width
    Kind("file", np.int32),  # number of a row of FILES
    Kind("place", np.int64, (2,)),
    Kind("digest", np.uint64, (2,)),
)
FILES = (Kind("files"), Kind("stamp", np.int64, (2,)))  # below the root; size and time of a shard, else 0
BAD = (Kind("bad.where"), Kind("bad.reason"), Kind("bad.detail"))
ORDER = (Kind("by_ratio", np.int32),)  # the rows by height / width, equal ones in their order


def is_index(path):
    """Whether a folder is an index, or a file the description of a version of one."""
    path = Path(path)
    return (path / CURRENT).is_file() or (VERSION.fullmatch(path.name) is not None and path.is_file())


def read_version(path):
    """(number, dict) of an index's newest version, or of the one that the file `path` is. Raises MindSigmaError."""
    file = Path(path) / CURRENT if Path(path).is_dir() else Path(path)
    document = load_json(file, read_bytes(file, LARGEST_DOCUMENT), "the description of an index")
    if any(document.get(name) != value for name, value in FORMAT.items()):
        raise MindSigmaError(f"{file}: another format than this version's; {AGAIN}")
    with understanding(file, AGAIN):
        parts = document["parts"]
        if not isinstance(parts, list) or not parts or type(document["version"]) is not int:
            raise ValueError("parts and version are missing")
        for part in parts:
            texts = (part[name] for name in ("file", "fingerprint", "root", "relative", "source", "layout"))
            if not all(isinstance(text, str) for text in texts) or os.path.basename(part["file"]) != part["file"]:
                raise ValueError("a part is not described as it is written")
            if not all(type(part[name]) is int for name in ("rows", "bad", "bytes")) or "max_ratio" not in part:
                raise ValueError("a part has no numbers of rows and bytes")
    return document["version"], document


def open_index(path, max_ratio=None, strict=False, image_root=None, threads=1, progress=False):
    """Index of a path; options as those of open_records, of which those of reading images have no effect.

    Raises MindSigmaError for another max_ratio than that of the building, and for what open_records does.
    """
    index = Index(path, image_root)
    built = {part["max_ratio"] for part in index.described}
    if max_ratio is not None and built != {max_ratio}:
        raise MindSigmaError(f"{path}: was built with --max-ratio {', '.join(map(str, built))}, not {max_ratio}")
    if strict:
        index.require_no_bad()
    return index


def joined_fingerprint(fingerprints):
    """The fingerprint of parts one after the other; of a single one its own, as if its rows had been read."""
    return fingerprints[0] if len(fingerprints) == 1 else fingerprint([tuple(fingerprints)])


def row_tuples(part):
    """Iterate over (key, prompt, long prompt, height, width) of a Part, what the fingerprint is made of."""
    for start in range(0, part.rows, AT_ONCE):
        stop = min(start + AT_ONCE, part.rows)
        texts = (part.texts(name, start, stop) for name in ("key", "prompt", "long_prompt"))
        yield from zip(*texts, *part.read("size", start, stop).T.tolist())


class Rows:
    """The records of parts, made when they are asked for; stands for a list of Record.

    Args:
        parts: list of Part. roots: the folder that the files of each lie in.
    """

    def __init__(self, parts, roots):
        self.parts, self._roots = parts, roots
        self.sizes = Column([part.arrays["size"] for part in parts])

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        number, row = self.sizes.place(int(index))
        return next(self._made(number, row, row + 1))

    def __iter__(self):
        for number, part in enumerate(self.parts):
            for start in range(0, part.rows, AT_ONCE):
                yield from self._made(number, start, min(start + AT_ONCE, part.rows))

    def _made(self, number, start, stop):
        part, root = self.parts[number], self._roots[number]
        columns = [part.texts(name, start, stop) for name in ("key", "prompt", "long_prompt")]
        columns += part.read("size", start, stop).T.tolist()
        columns += [part.read(name, start, stop).tolist() for name in ("file", "place")]
        for key, prompt, long_prompt, height, width, file, (offset, length) in zip(*columns):
            if not (0 <= file < part.counts[1] and height > 0 and width > 0 and offset >= 0 and length >= 0):
                raise part.damaged(f"the row of {one_line(key)} is none that was written")
            (name,) = part.texts("files", file, file + 1)
            yield Record(key, prompt, long_prompt, height, width, os.path.join(root, name), offset, length)


class Index(Records):
    """The records of an index; stands where Records stand.

    Args:
        path: folder of the index, or file of one of its versions.
        image_root: folder that the images or shards are in, if they were moved since; of an index of one part.

    Attributes:
        version: number of the version; described: list of dict, what it tells of its parts.
        fingerprints: of the first part, of the first two, ...: those of the earlier versions, and its own.

    Raises:
        MindSigmaError: no index there, or damaged.
    """

    def __init__(self, path, image_root=None):
        self.version, document = read_version(path)
        folder, parts = Path(path), document["parts"]
        self.described = parts
        folder = folder if folder.is_dir() else folder.parent
        if image_root is not None and len(parts) > 1:
            raise MindSigmaError(f"{path}: has {len(parts)} parts with roots of their own; --image-root is for one")
        self.parts = [_part(folder, described) for described in parts]
        roots = [image_root or _root(folder, described) for described in parts]
        self._records = Rows(self.parts, roots)
        self.sizes = self._records.sizes
        layouts = dict.fromkeys(described["layout"] for described in parts)
        self.layout, self.path = f"index of {', '.join(layouts)}", str(path)
        own = [described["fingerprint"] for described in parts]
        self.fingerprints = [joined_fingerprint(own[: i + 1]) for i in range(len(own))]
        self.digests = Column([part.arrays["digest"] for part in self.parts])

    @property
    def bad(self):
        """list of BadRow: all that were found when the index was built."""
        names = [kind.name for kind in BAD]
        rows = (row for part in self.parts for row in zip(*map(part.all_texts, names)))
        return [BadRow(*row) for row in rows]

    def bad_by_reason(self):
        """See Records."""
        return Counter(reason for part in self.parts for reason in part.all_texts("bad.reason"))

    def fingerprint(self):
        """See Records; it was made when the index was."""
        return self.fingerprints[-1]

    def count_captions(self):
        """See Records."""
        short = long = both = 0
        for part in self.parts:
            for start in range(0, part.rows, AT_ONCE):
                has = [part.lengths(name, start, start + AT_ONCE) > 0 for name in ("prompt", "long_prompt")]
                short, long, both = short + has[0].sum(), long + has[1].sum(), both + (has[0] & has[1]).sum()
        return int(short), int(long), int(both)

    def by_ratio(self):
        """list of (number of the first row, rows from there by height / width) of each part."""
        firsts = np.cumsum([0, *(part.rows for part in self.parts)]).tolist()
        return [(first, part.arrays["by_ratio"]) for first, part in zip(firsts, self.parts)]


def _part(folder, described):
    """Part that a version describes."""
    path = folder / described["file"]
    part = Part(path, ROWS, FILES, BAD, ORDER)
    found = {"rows": part.rows, "bad": part.counts[2]}
    if any(found[name] != described[name] for name in found) or part.counts[3] != part.rows:
        raise MindSigmaError(f"{path}: holds {part.rows} rows where the version tells {described['rows']}; {AGAIN}")
    if path.stat().st_size != described["bytes"]:
        raise MindSigmaError(f"{path}: another size than the version tells; {AGAIN}")
    return part


def _root(folder, described):
    """The folder of a part's files: where it was, or at the same place beside the index, if both were moved."""
    moved = os.path.normpath(os.path.join(os.path.abspath(folder), described["relative"]))
    return described["root"] if os.path.isdir(described["root"]) else moved

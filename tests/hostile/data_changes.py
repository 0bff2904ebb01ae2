"""What is wrong with hostile data: lies in tables, tars, states, options and pictures, files that are none."""

import io
import json
import os
import shutil
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

from hostile import blind, configs, headers
from hostile.data_sources import DATA_SOURCES, image

NASTY = "a\nerror: b\r\x1b[31m\x07\u202e"
VALUES = (
    *configs.NUMBERS,
    *configs.OTHERS,
    True,
    False,
    NASTY,
    "\ud800",
    "../../x",
    "/etc/passwd",
    "a\0b",
    "x" * 10**6,
)
VALUES += (10**400, -(2**63), {"a": [NASTY]})


def files_of(folder, *endings):
    """Sorted regular files below a folder, of these endings if any are given."""
    found = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return sorted(file for file in found if not endings or file.name.endswith(endings))


def _drawn(rng, values):
    return values[int(rng.integers(len(values)))]


# Of any file: what stands in its place.


def _in_place(make):
    def change(rng, folder):
        file = _drawn(rng, files_of(folder))
        content = file.read_bytes()
        file.unlink()
        make(file, content)

    return change


def _sparse(size):
    def make(file, content):
        file.write_bytes(content)
        os.truncate(file, size)

    return make


def _of_bytes(change):
    def mutate(rng, folder):
        file = _drawn(rng, files_of(folder))
        file.write_bytes(change(rng, file.read_bytes()))

    return mutate


def _renamed(rng, folder):
    file = _drawn(rng, files_of(folder))
    file.rename(file.with_name("a\nerror: b\x1b[31m" + file.suffix))


def _of_odd_bytes(rng, folder):
    file = _drawn(rng, files_of(folder))
    os.rename(os.fsencode(file), os.fsencode(file.parent) + b"/\xff\xfe" + os.fsencode(file.suffix))


PLACES = {
    "a pipe": _in_place(lambda file, content: os.mkfifo(file)),
    "a link to nowhere": _in_place(lambda file, content: file.symlink_to("absent")),
    "a loop": _in_place(lambda file, content: file.symlink_to(file.name)),
    "a folder": _in_place(lambda file, content: file.mkdir()),
    "/dev/zero": _in_place(lambda file, content: file.symlink_to("/dev/zero")),
    "/dev/full": _in_place(lambda file, content: file.symlink_to("/dev/full")),
    "/etc/passwd": _in_place(lambda file, content: file.symlink_to("/etc/passwd")),
    "lost": _in_place(lambda file, content: None),
    "a gigabyte": _in_place(_sparse(2**30)),
    "a terabyte": _in_place(_sparse(2**40)),
    "of a nasty name": _renamed,
    "of odd bytes": _of_odd_bytes,
    "circle": lambda rng, folder: (folder / "loop").symlink_to("."),
}

# Tables, indices, states: one value of one object.


def _documents(text):
    """The JSON documents of a file of one or of one a line, and how to join them again."""
    try:
        return [json.loads(text)], lambda parts: json.dumps(parts[0])
    except ValueError:
        return [json.loads(line) for line in text.splitlines()], lambda parts: "\n".join(map(json.dumps, parts)) + "\n"


def _objects(value):
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(part)


def _of_json(edit):
    def change(rng, folder):
        files = [file for file in files_of(folder, ".json", ".jsonl") if file.read_text().strip()]
        file = _drawn(rng, files)
        documents, join = _documents(file.read_text())
        objects = [one for document in documents for one in _objects(document) if one]
        edited = edit(rng, _drawn(rng, objects))
        text = edited if isinstance(edited, bytes) else join(documents).encode("utf-8", "surrogatepass")
        file.write_bytes(text)

    return change


def _key(rng, table):
    return _drawn(rng, list(table))


def _all(value):
    return lambda rng, table: table.update(dict.fromkeys(list(table), value))


JSON = {
    **{f"value {value!r:.30}": _of_json(lambda rng, table, value=value: table.update({_key(rng, table): value}))
       for value in VALUES},
    **{f"all {value!r:.20}": _of_json(_all(value)) for value in (None, [], {}, "", -1, 1e999, NASTY, True)},
    "key lost": _of_json(lambda rng, table: table.pop(_key(rng, table))),
    "nasty key": _of_json(lambda rng, table: table.update({NASTY: 1})),
    "deep": _of_json(lambda rng, table: b"[" * 10**6),
    "deep lines": _of_json(lambda rng, table: (b"[" * 5000 + b"]" * 5000 + b"\n") * 20),
    "digits": _of_json(lambda rng, table: b'{"step": ' + b"9" * 10**6 + b"}"),
    "endless line": _of_json(lambda rng, table: b'{"path": "' + b"x" * (8 << 20)),
    "many lines": _of_json(lambda rng, table: b"{}\n" * 300_000),
    "null bytes": _of_json(lambda rng, table: bytes(1 << 20)),
    "a text": _of_json(lambda rng, table: b'"text"'),
    "a number": _of_json(lambda rng, table: b"3"),
    "constants": _of_json(lambda rng, table: b"[NaN, Infinity, -Infinity]"),
    "UTF-16": _of_json(lambda rng, table: json.dumps([table]).encode("utf-16")),
}  # fmt: skip

CSV = {
    "no header": lambda text: text.split("\n", 1)[1],
    "nasty header": lambda text: NASTY.replace("\n", " ") + "," + text,
    "nasty path": lambda text: text.replace("1.png", '"a\nb\x1b[31m.png"'),
    "quote never closed": lambda text: text.replace("a 1", '"a 1'),
    "endless field": lambda text: text.replace("a 1", "x" * 10**6),
    "endless header": lambda text: ",".join(f"c{i}" for i in range(10**5)) + "\n" + text,
    "absurd size": lambda text: text.replace(",41,", f",{'9' * 5000},"),
    "sizes of words": lambda text: text.replace(",41,", ",1e999,").replace(",42,", ",nan,").replace(",43,", ",-1,"),
    "NUL": lambda text: text.replace("a 1", "a\0b"),
    "many rows": lambda text: text + text.split("\n", 1)[1] * 20_000,
    "outside": lambda text: text.replace("1.png", "../../../etc/passwd"),
    "a device": lambda text: text.replace("1.png", "/dev/zero"),
}


def _of_text(ending, change):
    def mutate(rng, folder):
        file = _drawn(rng, files_of(folder, ending))
        file.write_bytes(change(file.read_bytes().decode()).encode("utf-8", "surrogatepass"))

    return mutate


# Tars.


def _of_tar(edit):
    def change(rng, folder):
        file = _drawn(rng, files_of(folder, ".tar"))
        with tarfile.open(file) as archive:
            members = [(info, archive.extractfile(info).read()) for info in archive]
        members = edit(rng, members) or members
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for info, data in members:
                archive.addfile(info, io.BytesIO(data))
        file.write_bytes(buffer.getvalue())

    return change


def _named(name):
    def edit(rng, members):
        _drawn(rng, members)[0].name = name

    return _of_tar(edit)


def _typed(kind, link="/etc/passwd"):
    def edit(rng, members):
        info, _ = members[0]
        info.type, info.linkname, info.size = kind, link, 0

    return _of_tar(edit)


def _field(begin, content):
    def change(rng, folder):
        file = _drawn(rng, files_of(folder, ".tar"))
        data = bytearray(file.read_bytes())
        data[begin : begin + len(content)] = content
        head = data[:148] + b" " * 8 + data[156:512]
        data[148:156] = b"%06o\0 " % sum(head)
        file.write_bytes(data)

    return change


TAR = {
    "nasty member": _named(NASTY + ".jpg"),
    "member above": _named("../../x.jpg"),
    "member at the root": _named("/tmp/x.jpg"),
    "endless member": _named("x" * 10**6 + ".jpg"),
    "nameless member": _named(""),
    "symbolic link": _typed(tarfile.SYMTYPE),
    "hard link": _typed(tarfile.LNKTYPE, "x"),
    "device": _typed(tarfile.CHRTYPE),
    "pipe": _typed(tarfile.FIFOTYPE),
    "folder": _typed(tarfile.DIRTYPE),
    "size negative": _field(124, b"\xff" * 12),
    "size of terabytes": _field(124, b"\x80" + (2**60).to_bytes(11, "big")),
    "size of letters": _field(124, b"abcdefghijk\0"),
    "size of gigabytes": _field(124, b"77777777777\0"),
    "type of a long name": _field(156, b"L"),
    "type of pax": _field(156, b"x"),
    "type unknown": _field(156, b"\xff"),
    "sparse": _field(156, b"S"),
    "json that is deep": _of_tar(
        lambda rng, members: [(i, b"[" * len(d)) if i.name.endswith("json") else (i, d) for i, d in members]
    ),
    "captions that are none": _of_tar(
        lambda rng, members: [(i, b"\xff" * len(d)) if i.name.endswith("txt") else (i, d) for i, d in members]
    ),
}


# Pictures.


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_of(width, height, depth, colour, data=b""):
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _zeros(width, height, bits):
    packer = zlib.compressobj()
    row = bytes(1 + width * bits // 8)
    return b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])


def _with_text(size):
    file, info = io.BytesIO(), PngImagePlugin.PngInfo()
    info.add_text("parameters", "x" * size, zip=True)
    Image.open(io.BytesIO(image(1))).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def _picture(content):
    def change(rng, folder):
        file = _drawn(rng, files_of(folder, ".png"))
        file.write_bytes(content() if callable(content) else content)

    return change


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(touched) print\n%%EOF\n"
PICTURES = {
    "bomb of 16 bits": _picture(lambda: _png_of(12_000, 12_000, 16, 0, _zeros(12_000, 12_000, 16))),
    "bomb of RGBA": _picture(lambda: _png_of(13_000, 13_000, 8, 6, _zeros(13_000, 13_000, 32))),
    "large": _picture(lambda: _png_of(2**31 - 1, 2**31 - 1, 8, 2)),
    "thin": _picture(lambda: _png_of(2**20, 1, 8, 0, _zeros(2**20, 1, 8))),
    "no pixels": _picture(lambda: _png_of(0, 0, 8, 2)),
    "text of gigabytes": _picture(lambda: _with_text(200 << 20)),
    "EPS": _picture(EPS),
    "PDF": _picture(b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer\n<<>>\n%%EOF"),
    "SVG": _picture(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>'),
    "text": _picture(b"P3\n1 1\n255\n" + b"9" * 10**6),
    "empty GIF": _picture(b"GIF89a\xff\xff\xff\xff\x00\x00\x00;"),
}

# Options.

YAML = {
    "aliases": "a: &a [x]\nprompts: [*a, *a]\n",
    "billion laughs": "a0: &a0 [x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "itself": "prompts: &a [*a]\n",
    "merge": "<<: {steps: 1}\nsteps: 2\n",
    "object": "output: !!python/object/apply:os.system ['touch touched']\n",
    "tags": "steps: !!int '8'\nmulti-scale: !!bool maybe\n",
    "deep flow": "prompts: " + "[" * 10**5,
    "deep block": "".join(" " * i + "a:\n" for i in range(400)),
    "base 60": "steps: 1:30\n",
    "base 8": "steps: 010\n",
    "Norway": "output: no\n",
    "day": "output: 2024-01-02\n",
    "no day": "output: 2024-99-02\n",
    "digits": "steps: " + "9" * 10**5 + "\n",
    "infinite": "learning-rate: .inf\nsteps: .nan\n",
    "nasty key": '"a\\nerror: b\\e[31m": 1\n',
    "nasty value": 'optimizer: "a\\nerror: b\\e[31m\\u202e"\n',
    "surrogate": 'output: "\\ud800"\n',
    "endless value": "optimizer: " + "x" * 10**5 + "\n",
    "endless list": "prompts: [" + "a, " * 10**5 + "]\n",
    "endless key": "x" * 1000 + ": 1\n",
    "large": "# " + "x" * 10**7,
    "twice": "steps: 1\nsteps: 2\n",
    "sets": "? steps\n? [a, b]\n",
    "documents": "steps: 1\n---\nsteps: 2\n",
    "directive": "%YAML 9.9\n---\nsteps: 1\n",
}


def _yaml(text):
    return lambda rng, folder: (folder / "options.yaml").write_text(text)


# Runs.


def _checkpoint(rng, folder):
    return sorted((folder / "checkpoints").glob("step_*"))[-1]


def _copied(make):
    def change(rng, folder):
        last = _checkpoint(rng, folder)
        make(last, sorted((folder / "checkpoints").glob("step_*"))[0])

    return change


def _nan(last, first):
    file = last / "dit" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    file.write_bytes(content)


def _lock(make):
    def change(rng, folder):
        lock = folder / "checkpoints" / ".lock"
        lock.unlink()
        make(lock)

    return change


RUN = {
    "NaN weights": _copied(_nan),
    "an extra state": _copied(lambda last, first: (last / "states-1.safetensors").write_bytes(b"x")),
    "a state of another step": _copied(lambda last, first: shutil.copy(first / "state.json", last)),
    "of another name": _copied(lambda last, first: last.rename(last.with_name("step_00000007"))),
    "of an absurd name": _copied(lambda last, first: last.rename(last.with_name("step_" + "9" * 200))),
    "of other digits": _copied(lambda last, first: last.rename(last.with_name("step_0000000\u0665"))),
    "a link out": _copied(lambda last, first: (last / "dit" / "more").symlink_to("/etc")),
    "the lock a pipe": _lock(os.mkfifo),
    "the lock a link": _lock(lambda lock: lock.symlink_to("../log.jsonl")),
}  # fmt: skip


def _headers(change):
    def mutate(rng, folder):
        file = _drawn(rng, files_of(folder, ".safetensors"))
        file.write_bytes(change(rng, file.read_bytes()))

    return mutate


def changes_of(source):
    """dict mutation name -> function of a source: (rng, folder) changes the files below `folder` in place."""
    found = {f"place: {name}": change for name, change in PLACES.items()}
    found.update({f"blind: {name}": _of_bytes(change) for name, change in blind.MUTATIONS.items()})
    tables = []
    if source in ("official", "jsonl", "features", "index", "feature-shards", "run", "peft"):
        tables.append(("json", JSON))
    if source in ("features", "index", "feature-shards", "run", "adapter", "peft", "kohya"):
        tables.append(("safetensors", {name: _headers(change) for name, change in headers.MUTATIONS.items()}))
    if source == "csv":
        tables.append(("csv", {name: _of_text(".csv", change) for name, change in CSV.items()}))
    if source in ("folder", "official", "jsonl", "csv"):
        tables.append(("picture", PICTURES))
    if source == "shards":
        tables.append(("tar", TAR))
    if source == "run":
        tables.append(("run", RUN))
    if source == "options":
        tables.append(("yaml", {name: _yaml(text) for name, text in YAML.items()}))
    for kind, table in tables:
        found.update({f"{kind}: {name}": change for name, change in table.items()})
    return found


def names():
    """List of (source, mutation)."""
    return [(source, mutation) for source in DATA_SOURCES for mutation in changes_of(source)]

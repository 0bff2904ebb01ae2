"""Lies in the zip around a PyTorch file: headers that disagree, members compressed, doubled or out of bounds."""

import struct

from hostile.encoding import unzipped, zipped

CENTRAL, LOCAL, END = b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"


def _patched(signature, offset, layout, *values):
    """Fields of one drawn header that starts with the signature, overwritten."""

    def change(rng, data):
        places = [i for i in range(len(data)) if data.startswith(signature, i)]
        at = places[int(rng.integers(len(places)))] + offset
        content = struct.pack(layout, *values)
        return data[:at] + content + data[at + len(content) :]

    return change


def _members(edit):
    """The list of (name, content) edited and zipped anew; `edit` may return (members, names to compress)."""

    def change(rng, data):
        members = unzipped(data)
        edited = edit(rng, members)
        if isinstance(edited, tuple):
            return zipped(*edited)
        return zipped(members if edited is None else edited)

    return change


def _storage(edit):
    """One drawn storage replaced."""

    def change(rng, members):
        storages = [i for i, (name, _) in enumerate(members) if "/data/" in name]
        i = storages[int(rng.integers(len(storages)))]
        members[i : i + 1] = edit(*members[i])

    return _members(change)


def _renamed(edit):
    return _members(lambda rng, members: [(edit(name), content) for name, content in members])


def _with(*more):
    return _members(lambda rng, members: members + list(more))


def _content(name, content):
    return _members(lambda rng, members: [(n, content if n.endswith(name) else c) for n, c in members])


def _without(name):
    return _members(lambda rng, members: [(n, c) for n, c in members if not n.endswith(name)])


def _root(members):
    return members[0][0].partition("/")[0]


def _bomb(name, size):
    """A member of zeros that inflates a thousandfold."""

    def edit(rng, members):
        kept = [(n, c) for n, c in members if not n.endswith(name)]
        return [*kept, (f"{_root(members)}/{name}", bytes(size))], (name,)

    return _members(edit)


def _nested(rng, data):
    """A zip of the zip."""
    return zipped([("archive/data.pkl", data)])


def _overlapping(rng, data):
    """A directory that lists one local header many times, as the better zip bomb does."""
    end = data.rindex(END)
    size, start = struct.unpack("<II", data[end + 12 : end + 20])
    first = data[start : start + size]
    name = struct.unpack("<H", first[28:30])[0]
    one = first[: 46 + name]
    directory = b"".join(one[:46] + one[46:-4] + b"%04d" % i for i in range(2000))
    tail = data[end : end + 8] + struct.pack("<HHII", 2000, 2000, len(directory), start) + data[end + 20 :]
    return data[:start] + directory + tail


def _zip64(rng, data):
    """A directory entry whose sizes stand in a zip64 field of absurd numbers."""
    at = data.index(CENTRAL)
    name, extra = struct.unpack("<HH", data[at + 28 : at + 32])
    field = struct.pack("<HHQQQ", 1, 24, 2**63, 2**63, 2**63)
    entry = data[at : at + 20] + b"\xff" * 8 + struct.pack("<HH", name, extra + len(field)) + data[at + 32 : at + 42]
    return data[:at] + entry + b"\xff" * 4 + data[at + 46 : at + 46 + name] + field + data[at + 46 + name :]


MUTATIONS = {
    "encrypted in the directory": _patched(CENTRAL, 8, "<H", 1),
    "encrypted in the header": _patched(LOCAL, 6, "<H", 1),
    "data descriptor announced": _patched(LOCAL, 6, "<H", 8),
    "descriptor in the directory": _patched(CENTRAL, 8, "<H", 8),
    "method in the directory": _patched(CENTRAL, 10, "<H", 8),
    "method in the header": _patched(LOCAL, 8, "<H", 8),
    "unknown method": _patched(CENTRAL, 10, "<H", 99),
    "version 9.9": _patched(CENTRAL, 6, "<H", 99),
    "checksum": _patched(CENTRAL, 16, "<I", 0xDEADBEEF),
    "sizes": _patched(CENTRAL, 20, "<II", 2**31, 2**31),
    "sizes unlike": _patched(CENTRAL, 20, "<II", 10, 1000),
    "sizes smaller": _patched(CENTRAL, 20, "<II", 1, 1),
    "no sizes": _patched(CENTRAL, 20, "<II", 0, 0),
    "sizes in zip64": _patched(CENTRAL, 20, "<II", 2**32 - 1, 2**32 - 1),
    "sizes in the header": _patched(LOCAL, 18, "<II", 7, 7),
    "absurd zip64": _zip64,
    "name length": _patched(CENTRAL, 28, "<H", 60_000),
    "name length in the header": _patched(LOCAL, 26, "<H", 60_000),
    "extra length": _patched(CENTRAL, 30, "<H", 60_000),
    "extra length in the header": _patched(LOCAL, 28, "<H", 8),
    "comment length": _patched(CENTRAL, 32, "<H", 60_000),
    "other disk": _patched(CENTRAL, 34, "<H", 3),
    "header at the start": _patched(CENTRAL, 42, "<I", 0),
    "header beyond": _patched(CENTRAL, 42, "<I", 2**31),
    "name in the header": _patched(LOCAL, 30, "<2s", b"zz"),
    "name in the directory": _patched(CENTRAL, 46, "<2s", b"zz"),
    "NUL in the directory": _patched(CENTRAL, 48, "<1s", b"\0"),
    "UTF-8 flag": _patched(CENTRAL, 8, "<HH", 0x800, 0),
    "name not UTF-8": lambda rng, data: _patched(CENTRAL, 46, "<2s", b"\xff\xfe")(
        rng, _patched(CENTRAL, 8, "<H", 0x800)(rng, data)
    ),
    "date": _patched(CENTRAL, 12, "<I", 0xFFFFFFFF),
    "signature": _patched(CENTRAL, 0, "<4s", b"PK\x01\x03"),
    "signature of the header": _patched(LOCAL, 0, "<4s", b"PK\x03\x05"),
    "directory elsewhere": _patched(END, 16, "<I", 5),
    "directory beyond": _patched(END, 16, "<I", 2**32 - 2),
    "directory large": _patched(END, 12, "<I", 2**32 - 2),
    "directory empty": _patched(END, 8, "<HHII", 0, 0, 0, 0),
    "65535 entries": _patched(END, 8, "<HH", 65535, 65535),
    "comment announced": _patched(END, 20, "<H", 9),
    "spread over disks": _patched(END, 4, "<HH", 1, 1),
    "comment": lambda rng, data: data[:-2] + struct.pack("<H", 5) + b"hello",
    "all compressed": _members(lambda rng, members: (members, tuple(n.partition("/")[2] for n, _ in members))),
    "pickle compressed": _members(lambda rng, members: (members, ("data.pkl",))),
    "bomb in the pickle": _bomb("data.pkl", 40_000_000),
    "bomb in a storage": _bomb("data/0", 40_000_000),
    "bomb beside": _bomb("extra", 40_000_000),
    "overlapping bomb": _overlapping,
    "zip in the zip": _nested,
    "pickle twice": _members(lambda rng, members: members + [members[0]]),
    "storage twice": _members(lambda rng, members: members + [(f"{_root(members)}/data/0", b"\0" * 8)]),
    "two roots": _with(("other/data.pkl", b"\x80\x02}.")),
    "path above": _with(("../../executed", b"x")),
    "path at the root": _with(("/etc/executed", b"x")),
    "root above": _renamed(lambda name: "../" + name),
    "root nameless": _renamed(lambda name: "/" + name.partition("/")[2]),
    "no root": _renamed(lambda name: name.partition("/")[2]),
    "backslashes": _renamed(lambda name: name.replace("/", "\\")),
    "root with newline": _renamed(lambda name: "a\nerror: b" + name),
    "root not ASCII": _renamed(lambda name: "\u00e9\u202e" + name),
    "root a call": _renamed(lambda name: "$(touch executed)" + name),
    "pickle lost": _without("data.pkl"),
    "pickle empty": _content("data.pkl", b""),
    "pickle a text": _content("data.pkl", b"import os; os.system('touch executed')"),
    "pickle of zeros": _content("data.pkl", bytes(1000)),
    "pickle of 70 MB": _content("data.pkl", b"\x80\x02" + b"N0" * 35_000_000 + b"N."),
    "byte order big": _content("byteorder", b"big"),
    "byte order nonsense": _content("byteorder", b"\xff\n" * 1000),
    "byte order large": _content("byteorder", b"l" * 10_000_000),
    "storage lost": _storage(lambda name, content: []),
    "storage short": _storage(lambda name, content: [(name, content[:-1])]),
    "storage long": _storage(lambda name, content: [(name, content + b"\0")]),
    "storage empty": _storage(lambda name, content: [(name, b"")]),
    "storage renamed": _storage(lambda name, content: [(name + "0000", content)]),
    "storage infinite": _storage(lambda name, content: [(name, b"\x00\x7c" * (len(content) // 2))]),
    "TorchScript": _with(("archive/constants.pkl", b"\x80\x02).")),
    "no member": lambda rng, data: zipped([]),
    "20000 members": _members(lambda rng, members: members + [(f"x/{i}", b"") for i in range(20_000)]),
}

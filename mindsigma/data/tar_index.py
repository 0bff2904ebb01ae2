"""The members of a tar file by name and place, read header by header: nothing is unpacked, no header is read whole."""

import os

from mindsigma.errors import MindSigmaError, one_line

BLOCK = 512
LARGEST_NAME = 1 << 16  # bytes of a header that holds a long name; a path has 4096 at most

_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5/\xfd", b"\x04\x22M\x18")  # gzip, bzip2, xz, zstd, lz4
_FILES = (b"0", b"\0", b"7")
_LONG_NAME, _LONG_LINK, _PAX, _PAX_SOLARIS, _PAX_GLOBAL, _SPARSE = b"L", b"K", b"x", b"X", b"g", b"S"


def is_compressed(start):
    """Whether the first bytes of a file are those of a compressed one."""
    return start.startswith(_COMPRESSED)


def members(file):
    """Yield (name, offset, length) of every regular file in a tar, whose bytes lie whole within it.

    Args:
        file: the tar, a seekable binary file.

    Raises:
        MindSigmaError: damaged from here on, or no tar file at all; without the file's name. Members before are sound.
    """
    end = file.seek(0, os.SEEK_END)
    position, told = 0, {}  # told: what the headers before a member say of it
    while position < end:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0"):
            return  # zeros mark the end
        _require_sound(header)
        kind, data, length = header[156:157], position + BLOCK, _number(header[124:136])
        special = kind in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_SOLARIS, _PAX_GLOBAL)
        if not special:
            length = told.get("size", length)
        if kind == _SPARSE:
            data = _behind_extensions(file, header, data)
        name = told.get("name") or _name(header)
        if data + length > end:
            raise MindSigmaError(f"member {one_line(name, 80)!r} is cut off")
        position = data + -(-length // BLOCK) * BLOCK
        if not special:
            if kind in _FILES and not name.endswith("/") and not told.get("sparse"):
                yield name, data, length
            told = {}
        elif kind in (_LONG_NAME, _PAX, _PAX_SOLARIS):
            if length > LARGEST_NAME:
                raise MindSigmaError(f"a header of {length} bytes, more than {LARGEST_NAME}")
            file.seek(data)
            text = file.read(length)
            told.update({"name": _text(text)} if kind == _LONG_NAME else _pax(text))


def _require_sound(header):
    """Raise unless the bytes sum up to what the header says; some old writers sum them as signed."""
    if len(header) < BLOCK:
        raise MindSigmaError("cut off within a header")
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    negative = 256 * sum(byte > 127 for byte in header[:148] + header[156:])
    if _number(header[148:156]) not in (total, total - negative):
        raise MindSigmaError("a header is damaged, or none at all")


def _number(field):
    """An octal text, or a binary number where its first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise MindSigmaError("a header is damaged, or none at all") from None


def _name(header):
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    name = _text(header[:100])
    return f"{prefix}/{name}" if prefix else name


def _text(data):
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _behind_extensions(file, header, position):
    """Where the bytes of an old sparse member begin: blocks of its map may follow its header."""
    more = header[482]
    while more:
        file.seek(position)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise MindSigmaError("cut off within a header")
        position, more = position + BLOCK, block[504]
    return position


def _pax(text):
    """What the records `LENGTH KEY=VALUE\\n` of an extended header tell."""
    told, start = {}, 0
    while start < len(text) and text[start]:
        digits, blank, _ = text[start : start + 8].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        if not len(digits) + 2 < length <= len(text) - start:
            raise MindSigmaError("an extended header is damaged")
        key, _, value = text[start + len(digits) + 1 : start + length - 1].partition(b"=")
        start += length
        if key == b"path":
            told["name"] = value.decode("utf-8", "surrogateescape")
        elif key == b"size" and value.isdigit() and len(value) < 20:
            told["size"] = int(value)
        elif key.startswith(b"GNU.sparse"):
            told["sparse"] = True
    return told

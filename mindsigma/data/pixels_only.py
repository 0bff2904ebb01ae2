"""What of an image file makes its pixels: texts, profiles, tags and later frames are left out before Pillow sees them.

Pillow reads those whole, some once for every tag that points to them, so that a file of a megabyte can take gigabytes
or hours, and a fault in them would cost an image whose pixels are sound. Which way is up is read here instead.
"""

import io
import re
import struct
import zlib

from mindsigma.errors import MindSigmaError

# Pillow itself warns of a bomb from there on; its memory, and ours, is a few bytes for each pixel.
MAX_PIXELS = 89_478_485

MAX_SCANS = 100  # of a JPEG; each goes over all of its pixels. Encoders write about 10.
MAX_PIECES = 200_000  # chunks, segments or blocks of a file: those of a gigabyte as encoders write it
MAX_METADATA = 1 << 20  # bytes of a text or EXIF block, and of what it unpacks to

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_JPEG_ALONE = (b"\xff", b"\0", b"\x01", *(bytes([number]) for number in range(0xD0, 0xD9)))  # no segment follows
_PNG_COLOURS = (b"IHDR", b"PLTE", b"tRNS", b"IEND")
_TIFF_MAGIC = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}

# TIFF tags that say how pixels are stored: size, compression, strips and tiles, colours.
_TIFF_PIXELS = frozenset(
    [254, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339]
    + [347, *range(512, 522), 529, 530, 531, 532]
)
_TIFF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def pixels_only(file, header=False):
    """(binary file for Pillow, orientation) of an image file.

    Args:
        file: seekable binary file, of a size that may be read whole.
        header: only the size will be asked for, so the pixels themselves may be left out.

    Returns:
        orientation is 1 ... 8 as EXIF counts, or None where neither EXIF nor XMP tells it.

    Raises:
        MindSigmaError: the file asks for more work or memory than an image does; without its name.
    """
    start = file.read(32)
    file.seek(0)
    if start[:3] == b"\xff\xd8\xff":
        return _jpeg(file, header)
    if start[:8] == b"\x89PNG\r\n\x1a\n":
        return _png(file, header)
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return _gif(file, header), None
    if start[:2] in (b"II", b"MM"):
        return _tiff(bytearray(file.read()))
    if start[4:8] == b"ftyp":
        return io.BytesIO(_without_exif(bytearray(file.read()))), None
    if start[:4] == b"RIFF" and start[12:16] == b"VP8X":
        # Pillow makes the canvas before it tells its size.
        require_pixels(*(int.from_bytes(start[i : i + 3], "little") + 1 for i in (24, 27)))
    return io.BytesIO(file.read()), None


def require_pixels(width, height, most=MAX_PIXELS):
    """Raise MindSigmaError for a size that is not decoded."""
    if width * height > most:
        raise MindSigmaError(f"{width} x {height} pixels, more than the {most} that are decoded; make it smaller")


def orientation_of(exif=b"", xmp=b""):
    """1 ... 8 as EXIF bytes tell it, else as XMP does, else None."""
    exif = exif[6:] if exif[:6] == b"Exif\0\0" else exif
    order = _TIFF_MAGIC.get(bytes(exif[:4]))
    try:
        (offset,) = struct.unpack_from(f"{order}I", exif, 4) if order else (len(exif),)
        (count,) = struct.unpack_from(f"{order}H", exif, offset)
        for place in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == 274:
                (value,) = struct.unpack_from(f"{order}{'I' if kind == 4 else 'H'}", exif, place + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    found = _XMP_ORIENTATION.search(xmp)
    return int(found[1]) if found else None


def _jpeg(file, header):
    """A JPEG without its APP segments, but those that tell its colours, and comments."""
    kept, exif, xmp = io.BytesIO(), b"", b""
    kept.write(file.read(2))
    marker = b""
    for _ in range(MAX_PIECES):
        before, marker = marker, file.read(1)
        if before != b"\xff" or marker in _JPEG_ALONE:
            continue  # also over junk between segments, as decoders do
        if marker in (b"", b"\xd9"):
            break
        length = file.read(2)
        size = max(0, int.from_bytes(length, "big") - 2)
        if b"\xe1" <= marker <= b"\xed" or marker in (b"\xef", b"\xfe"):
            if marker == b"\xe1" and not (exif and xmp):
                data = file.read(size)
                exif = exif or (data if data[:6] == b"Exif\0\0" else b"")
                xmp = xmp or (data if data[:28] == b"http://ns.adobe.com/xap/1.0/" else b"")
            else:
                file.seek(size, io.SEEK_CUR)
            continue
        kept.write(b"\xff" + marker + length + file.read(size))
        if marker == b"\xda":
            rest = b"\xff\xd9" if header else file.read()
            _require_few_scans(rest)
            kept.write(rest)
            break
    kept.seek(0)
    return kept, orientation_of(exif, xmp)


def _require_few_scans(data):
    """Of the bytes of a JPEG from its first pixels on, to the end of the image."""
    position, marker = 0, re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
    for _scan in range(1, MAX_SCANS):
        for _ in range(MAX_PIECES):
            found = marker.search(data, position)
            if found is None or found[0] == b"\xff\xd9":
                return
            position = found.end()
            if found[0] not in (b"\xff\xd8", b"\xff\x01"):
                position += int.from_bytes(data[position : position + 2], "big")
            if found[0] == b"\xff\xda":
                break
    raise MindSigmaError(f"a JPEG of more than {MAX_SCANS} scans; save it anew")


def _png(file, header):
    """The chunks of a PNG that hold pixels and colours; of an animation the still image."""
    kept, exif, profile, xmp = io.BytesIO(), b"", b"", b""
    largest = file.seek(0, io.SEEK_END)  # a chunk may claim 4 GB
    file.seek(0)
    kept.write(file.read(8))
    seen = False
    for _ in range(MAX_PIECES):
        head = file.read(8)
        size, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8:
            break
        if kind == b"IDAT" and header:
            if not seen:
                kept.write(b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big"))
            seen = True
            file.seek(size + 4, io.SEEK_CUR)
        elif kind == b"IDAT" or (kind in _PNG_COLOURS and size <= MAX_METADATA):
            kept.write(head + file.read(min(size + 4, largest)))
        elif kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt") and size <= MAX_METADATA:
            data = file.read(size + 4)[:size]
            exif = exif or (data if kind == b"eXIf" else b"")
            if data[:22] == b"Raw profile type exif\0":
                profile = profile or _hexadecimal(data[22:] if kind == b"tEXt" else _inflated(data[23:]))
            if data[:22] == b"XML:com.adobe.xmp\0\0\0\0\0":  # not compressed, without language and keyword
                xmp = xmp or data
        else:
            file.seek(size + 4, io.SEEK_CUR)
        if kind == b"IEND":
            break
    kept.seek(0)
    return kept, orientation_of(exif or profile, xmp)


def _inflated(data):
    try:
        return zlib.decompressobj().decompress(data, MAX_METADATA)
    except zlib.error:
        return b""


def _hexadecimal(text):
    """The bytes of a raw profile: an empty line, its name, its length, then hexadecimal lines."""
    try:
        return bytes.fromhex("".join(text.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return b""


def _gif(file, header):
    """The first frame of a GIF, with the extension that tells its transparency."""
    kept, control = io.BytesIO(), b""
    kept.write(file.read(13))
    kept.write(file.read(_colours(kept.getvalue()[10:11])))
    for _ in range(MAX_PIECES):
        kind = file.read(1)
        if kind == b"!":
            label = file.read(1)
            blocks = _blocks(file, keep=label == b"\xf9")
            control = kind + label + blocks if label == b"\xf9" else control
        elif kind == b",":
            frame = file.read(9)
            kept.write(control + kind + frame + file.read(_colours(frame[8:9]) + 1))
            kept.write(b"\0" if header else _blocks(file))
            break
        elif kind != b"\0":
            break
    kept.write(b";")
    kept.seek(0)
    return kept


def _colours(flags):
    """Bytes of a GIF's colour table."""
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0


def _blocks(file, keep=True):
    kept = io.BytesIO()
    while True:
        size = file.read(1)
        if keep:
            kept.write(size)
        if size in (b"", b"\0"):
            return kept.getvalue()
        if keep:
            kept.write(file.read(size[0]))
        else:
            file.seek(size[0], io.SEEK_CUR)


def _tiff(data):
    """(the first image of a TIFF, its orientation): tags that are not of its pixels become of no type."""
    order = _TIFF_MAGIC.get(bytes(data[:4]))
    if order is None:  # Pillow also takes two that are wrong
        raise MindSigmaError("not an image")
    big = b"+" in data[2:4]
    long, head, entry, inline = ("Q", 8, 20, 12) if big else ("I", 4, 12, 8)
    values, claimed = {}, 0
    try:
        (offset,) = struct.unpack_from(f"{order}{long}", data, head)
        (count,) = struct.unpack_from(f"{order}{'Q' if big else 'H'}", data, offset)
        start = offset + (8 if big else 2)
        if count > 1000:
            raise MindSigmaError(f"a TIFF of {count} tags; save it anew")
        for place in range(start, start + entry * count, entry):
            tag, kind, number = struct.unpack_from(f"{order}HH{long}", data, place)
            if kind in (3, 4) and number == 1:
                values[tag] = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", data, place + inline)[0]
            if tag in _TIFF_PIXELS:
                claimed += number * _TIFF_UNITS.get(kind, 1)
            else:
                struct.pack_into(f"{order}H", data, place + 2, 0)
        struct.pack_into(f"{order}{long}", data, start + entry * count, 0)  # no further images
    except struct.error:
        raise MindSigmaError("a cut off TIFF") from None
    if claimed > len(data) + 4 * 1000:  # the tags share bytes, which are read once for each
        raise MindSigmaError("a TIFF whose tags are larger than the file; save it anew")
    tile, area = values.get(322, 0) * values.get(323, 0), values.get(256, 0) * values.get(257, 0)
    if tile > 4 * max(area, 1 << 20):
        raise MindSigmaError("a TIFF whose tiles are larger than the image; save it anew")
    orientation = values.get(274)
    return io.BytesIO(data), orientation if orientation in range(1, 9) else None


def _without_exif(data):
    """An AVIF file whose EXIF blocks, if it holds any, are of no tags: its own boxes tell which way is up."""
    for magic in (b"II*\0", b"MM\0*"):
        place = data.find(magic)
        while place >= 0:
            order = _TIFF_MAGIC[magic]
            offset = place + int.from_bytes(data[place + 4 : place + 8], "little" if order == "<" else "big")
            if offset + 2 <= len(data):
                data[offset : offset + 2] = b"\0\0"
            place = data.find(magic, place + 4)
    return data

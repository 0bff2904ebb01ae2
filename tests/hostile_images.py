"""Image files that ask Pillow for far more memory or time than their pixels are worth, though all look sound.

Run as a script, with the repository in PYTHONPATH, it decodes them and prints by how many megabytes it grew.
"""

import io
import resource
import struct
import sys
import zlib

import numpy as np
from PIL import Image

SIDE = 4096  # of the large ones: 16 million pixels


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks, image=None):
    """A PNG with further chunks behind its header."""
    data = saved(image or Image.new("RGB", (16, 16), "red"))
    return data[:33] + b"".join(chunks) + data[33:]


def overlapping_tags(size, count, first=40000):
    """EXIF of `size` bytes whose tags claim all of it, each."""
    head = b"II*\0" + struct.pack("<IH", 8, count)
    tags = b"".join(struct.pack("<HHII", first + i, 7, size - 1, 0) for i in range(count))
    return (head + tags + b"\0\0\0\0").ljust(size, b"\0")


def jpeg_with(*segments):
    """A JPEG with APP1 segments of these bytes."""
    data = saved(Image.new("RGB", (16, 16), "red"), "JPEG")
    parts = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in segments)
    return data[:2] + parts + data[2:]


def tiff_with(*tags):
    """A TIFF with these further tags (number, kind, count, value) and 300 kB behind it."""
    data = bytearray(saved(Image.new("L", (16, 16), 99), "TIFF"))
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    old = bytes(data[offset + 2 : offset + 2 + 12 * count])
    entries = [old[i : i + 12] for i in range(0, len(old), 12)] + [struct.pack("<HHII", *tag) for tag in tags]
    entries.sort(key=lambda entry: struct.unpack_from("<H", entry)[0])
    struct.pack_into("<I", data, 4, len(data))
    return bytes(data) + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0" * 300004


def scans(count):
    """A progressive JPEG that goes over its pixels `count` times more."""
    data = saved(Image.new("L", (1024, 1024)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def gif_with_comment(size):
    data = saved(Image.new("P", (16, 16), 1), "GIF")
    place = 13 + (3 << ((data[10] & 7) + 1))
    return data[:place] + b"!\xfe" + (b"\xff" + b"c" * 255) * (size // 256) + b"\0" + data[place:]


def large():
    """name -> file whose pixels are many, all of one colour."""
    wide = np.full((SIDE, SIDE), 500, np.uint16)
    return {
        "16 bits": saved(Image.fromarray(wide), compress_level=1),
        "16 bits, TIFF": saved(Image.fromarray(wide), "TIFF", compression="tiff_deflate"),
        "transparent": saved(Image.new("RGBA", (SIDE, SIDE), (1, 2, 3, 4)), compress_level=1),
        "palette": saved(Image.new("P", (SIDE, SIDE), 1), transparency=1),
        "inks": saved(Image.new("CMYK", (SIDE, SIDE), (1, 2, 3, 4)), "JPEG"),
        "upside down": saved(Image.new("RGB", (SIDE, SIDE)), "JPEG", exif=b"Exif\0\0" + orientation(3)),
    }


def orientation(value):
    """EXIF that tells which way is up."""
    return b"II*\0" + struct.pack("<IHHHIHH", 8, 1, 274, 3, 1, value, 0) + b"\0\0\0\0"


def small():
    """name -> file of 256 pixels with hostile tags, texts or frames."""
    tags = overlapping_tags(300_000, 20_000)
    parts = [b"Exif\0\0" + tags[i : i + 65000] for i in range(0, len(tags), 65000)]  # Pillow joins them
    return {
        "EXIF of a PNG": png_with(chunk(b"eXIf", tags)),
        "EXIF of a JPEG": jpeg_with(*parts),
        "EXIF of a WebP": saved(Image.new("RGB", (16, 16)), "WEBP", exif=tags),
        "tags of a TIFF": tiff_with(*((40000 + i, 7, 299_000, 8) for i in range(900))),
        "text of a PNG": png_with(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"y" * 2_000_000))),
        "profile of a PNG": png_with(chunk(b"iCCP", b"a\0\0" + zlib.compress(b"y" * 2_000_000))),
        "broken text": png_with(chunk(b"tEXt", b"a\0b")[:-1] + b"!"),
        "comment of a GIF": gif_with_comment(20_000_000),
    }


if __name__ == "__main__":
    from mindsigma.data.images import decode, read_size

    files = {**large(), **small()}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in files.items():
        size, image = read_size(io.BytesIO(data)), decode(io.BytesIO(data))
        if size != image.size[::-1] or image.mode != "RGB":
            sys.exit(f"{name}: {size}, {image}")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)

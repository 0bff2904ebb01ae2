"""Decoding of image files in every mode, and where the pixels of a crop come from."""

import ast
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import hostile_images
import numpy as np
import pytest
from hostile_images import chunk
from PIL import Image, features

from mindsigma.data.images import FORMATS, cover_and_crop, decode, read_size, to_array, training_array
from mindsigma.data.pixels_only import MAX_PIXELS
from mindsigma.errors import MindSigmaError

ROOT = Path(__file__).resolve().parent.parent


def stored(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def flat(mode, value, size=(6, 4)):
    return Image.new(mode, size, value)


def paletted():
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    "file, colour",
    [
        (stored(flat("RGB", (200, 100, 50))), (200, 100, 50)),
        (stored(flat("L", 77)), (77, 77, 77)),
        (stored(flat("1", 1)), (255, 255, 255)),
        (stored(flat("LA", (40, 255))), (40, 40, 40)),
        (stored(flat("LA", (40, 0))), (255, 255, 255)),
        (stored(flat("RGBA", (200, 100, 50, 255))), (200, 100, 50)),
        (stored(flat("RGBA", (0, 0, 0, 0))), (255, 255, 255)),
        (stored(flat("RGBA", (0, 100, 250, 51))), (204, 224, 254)),  # a fifth of the colour on white
        (stored(paletted()), (200, 100, 50)),
        (stored(paletted(), transparency=1), (255, 255, 255)),
        (stored(flat("RGB", (9, 9, 9)), transparency=(9, 9, 9)), (255, 255, 255)),
        (stored(Image.fromarray(np.full((4, 6), 65535, np.uint16))), (255, 255, 255)),
        (stored(Image.fromarray(np.full((4, 6), 100 * 256 + 200, np.uint16))), (100, 100, 100)),
        (stored(Image.fromarray(np.full((4, 6), 100 * 256, np.uint16)), "TIFF"), (100, 100, 100)),
        (stored(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (stored(flat("RGB", (200, 100, 50)), "WEBP", lossless=True), (200, 100, 50)),
        (stored(flat("RGB", (200, 100, 50)), "GIF"), (200, 100, 50)),
    ],
)
def test_every_mode_becomes_rgb(file, colour):
    image = decode(file)
    assert image.mode == "RGB" and image.size == (6, 4)
    assert np.abs(np.asarray(image).astype(int) - colour).max() <= 1


def test_cmyk_jpeg():
    pixels = np.asarray(decode(stored(flat("CMYK", (0, 255, 255, 0), (16, 16)), "JPEG", quality=100))).astype(int)
    assert np.abs(pixels - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_image_upright(orientation):
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    # What a camera stores for each orientation, so that a viewer sees `upright`.
    inverse = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = stored(Image.fromarray(np.ascontiguousarray(inverse[orientation])), exif=exif)
    assert read_size(file) == (4, 6)
    file.seek(0)
    assert np.array_equal(np.asarray(decode(file))[..., 0], upright)


def empty_png(width, height):
    """A PNG without pixels whose header tells this size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def whole_jpeg():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return stored(Image.fromarray(noise), "JPEG").getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        empty_png(60000, 60000),
        whole_jpeg()[:2000],
        stored(flat("RGB", 0, (64, 64))).getvalue()[:60],
    ],
    ids=["empty", "text", "bomb", "cut jpeg", "cut png"],
)
def test_what_is_no_image_is_named(data):
    with pytest.raises(MindSigmaError):
        decode(io.BytesIO(data))


def test_more_pixels_than_the_limit_are_refused_before_decoding():
    side = int(MAX_PIXELS**0.5)
    assert read_size(io.BytesIO(empty_png(side, side))) == (side, side)
    wide_webp = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0" * 2
    for data in (empty_png(side + 2, side), empty_png(MAX_PIXELS + 1, 1), wide_webp):
        for function in (read_size, decode):
            with pytest.raises(MindSigmaError, match="pixels, more than the"):
                function(io.BytesIO(data))


def test_hostile_images_take_the_memory_of_their_pixels():
    """The largest has 64 MB of pixels; two copies of it may be in use, and what loads with the first image."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, hostile_images.__file__], capture_output=True, text=True, timeout=100, env=environment
    )
    assert run.returncode == 0 and int(run.stdout) < 2.6 * 64, run


@pytest.mark.parametrize(
    "data, words",
    [
        (hostile_images.scans(200), "scans"),
        (
            hostile_images.tiff_with(*((number, 7, 299_000, 8) for number in (301, 332, 338, 532))),
            "larger than the file",
        ),
        (hostile_images.tiff_with((322, 4, 1, 90_000), (323, 4, 1, 90_000)), "tiles are larger"),
        (b"MM*\0" + bytes(100), "not an image"),
    ],
    ids=["scans", "shared tags", "tiles", "wrong TIFF"],
)
def test_more_work_than_pixels_is_refused(data, words):
    with pytest.raises(MindSigmaError, match=words):
        decode(io.BytesIO(data))


@pytest.mark.parametrize("name", ["photo.png", "photo.eps"])
def test_no_image_starts_a_program(tmp_path, monkeypatch, name):
    """Pillow hands an EPS file, however it is called, to Ghostscript."""
    marker, stub = tmp_path / "started", tmp_path / "gs"
    stub.write_text(f"#!/bin/sh\ntouch {marker}\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for function in (read_size, decode):
        with open(tmp_path / name, "rb") as file, pytest.raises(MindSigmaError, match="not an image"):
            function(file)
    assert not marker.exists()


def test_every_call_of_pillow_names_its_formats():
    calls = [
        (path, node)
        for folder in ("mindsigma", "tools")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open")
    ]
    assert len(calls) >= 3
    assert all("formats" in [keyword.arg for keyword in node.keywords] for _, node in calls)
    assert not {"EPS", "PDF", "WMF", "HDF5", "GRIB", "BUFR"} & set(FORMATS)


def test_texts_and_profiles_do_no_harm_and_tell_which_way_is_up():
    plain = Image.new("RGB", (6, 4), "red")
    profile = b"\nexif\n      %d\n" % 26 + hostile_images.orientation(6).hex().encode()
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation="8"/>'
    for text in (
        chunk(b"eXIf", hostile_images.orientation(6)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
        chunk(b"tEXt", b"Raw profile type exif\0" + profile),
        chunk(b"iTXt", xmp),
    ):
        data = hostile_images.png_with(text, image=plain)
        assert decode(io.BytesIO(data)).size == (4, 6) and read_size(io.BytesIO(data)) == (6, 4)
        behind = hostile_images.png_with(image=plain)[:-12] + text + chunk(b"IEND", b"")
        assert decode(io.BytesIO(behind)).size == (4, 6) and read_size(io.BytesIO(behind)) == (6, 4)


@pytest.mark.parametrize(
    "kind, options", [("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {}), ("AVIF", {})]
)
def test_other_formats_are_turned_upright(kind, options):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    image = Image.new("RGB", (64, 32), "red")
    image.paste("blue", (0, 0, 32, 32))
    file = stored(image, kind, exif=exif, **options)
    assert read_size(file) == (64, 32)
    file.seek(0)
    upright = decode(file)
    assert upright.size == (32, 64) and upright.getpixel((16, 16))[2] > 200 and upright.getpixel((16, 48))[0] > 200


def test_a_damaged_tiff_prints_nothing(capfd):
    data = bytearray(stored(flat("RGB", (1, 2, 3), (64, 64)), "TIFF", compression="tiff_lzw").getvalue())
    data[8:60] = bytes(range(52))
    with pytest.raises(MindSigmaError):
        decode(io.BytesIO(data))
    assert capfd.readouterr() == ("", "")


def test_the_first_frame_counts():
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for kind in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        pixel = decode(stored(red, kind, save_all=True, append_images=[blue])).getpixel((4, 4))
        assert np.abs(np.array(pixel) - (255, 0, 0)).max() <= 4, kind


def test_float_pixels_are_refused():
    with pytest.raises(MindSigmaError, match="floating"):
        decode(stored(flat("F", 0.5), "TIFF"))


def ramp(height, width, axis):
    values = np.arange((height, width)[axis], dtype=np.uint8)
    plane = values[:, None] if axis == 0 else values[None]
    return Image.fromarray(np.repeat(np.broadcast_to(plane, (height, width))[..., None], 3, 2))


@pytest.mark.parametrize(
    "size, target, offset",
    [((40, 101), (40, 60), (0, 20)), ((40, 103), (40, 60), (0, 22)), ((101, 40), (60, 40), (20, 0))],
)
def test_a_crop_without_resizing_is_the_exact_centre(size, target, offset):
    # 20.5 and 21.5 pixels are rounded to the even one, as torchvision's CenterCrop does.
    for axis in (0, 1):
        pixels = np.asarray(cover_and_crop(ramp(*size, axis), *target, "bicubic"))[..., 0]
        line = pixels[:, 0] if axis == 0 else pixels[0]
        assert line.tolist() == list(range(offset[axis], offset[axis] + target[axis]))


@pytest.mark.parametrize("resampling", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("size, target", [((120, 240), (60, 80)), ((250, 200), (100, 100)), ((90, 150), (120, 120))])
def test_a_resized_ramp_stays_the_ramp_of_its_places(size, target, resampling):
    height, width = size
    if target[0] * width > target[1] * height:
        full = target[0], width * target[0] // height
    else:
        full = height * target[1] // width, target[1]
    for axis in (0, 1):
        image = cover_and_crop(ramp(*size, axis), *target, resampling)
        assert image.size == (target[1], target[0])
        line = np.asarray(image)[:, 0, 0] if axis == 0 else np.asarray(image)[0, :, 0]
        start = round((full[axis] - target[axis]) / 2)
        places = (np.arange(target[axis]) + start + 0.5) * size[axis] / full[axis] - 0.5
        inside = slice(4, -4)  # at the rim the filter sees the edge
        assert np.abs(line.astype(float) - places)[inside].max() <= 0.75  # half a level of rounding, and the filter's


def test_any_size_is_covered():
    random = np.random.default_rng(0)
    for _ in range(200):
        height, width, a, b = random.integers(1, 90, 4).tolist()
        image = cover_and_crop(Image.new("RGB", (width, height), (10, 20, 30)), a, b, "bicubic")
        assert image.size == (b, a)
        assert np.asarray(image).reshape(-1, 3).ptp(0).max() == 0 and image.getpixel((0, 0)) == (10, 20, 30)


def test_values_and_order_of_axes():
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 1] = (255, 51, 102)
    array = to_array(Image.fromarray(pixels))
    assert array.shape == (3, 2, 3) and array.dtype == np.float32
    assert np.allclose(array[:, 0, 1], (1.0, -0.6, -0.2), atol=1e-6) and array[:, 1].max() == -1.0
    out = np.empty((3, 2, 3), np.float32)
    assert to_array(Image.fromarray(pixels), out) is out and np.array_equal(out, array)
    assert training_array(Image.fromarray(pixels), 16, 32, "bilinear").shape == (3, 16, 32)

"""Decoded arrays to pictures: value range, resizing, grids, PNG files that say how they were made."""

from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from mindsigma.weights.formats.atomic import Taken, naming, replacing


def to_unit_range(images):
    """Decoded images (N, 3, H, W), about [-1, 1], to float32 (N, H, W, 3) in [0, 1]."""
    return np.clip(images.transpose(0, 2, 3, 1) / 2 + 0.5, 0.0, 1.0).astype(np.float32)


def to_pil(images):
    """float images (N, H, W, 3) in [0, 1] to a list of PIL images."""
    return [Image.fromarray(image) for image in np.round(images * 255).astype(np.uint8)]


def through_vae(vae, picture):
    """A PIL image of sides that are multiples of 8 pixels, encoded to the mean of its latents and decoded."""
    from mindspore import Tensor

    from mindsigma.data.images import to_array

    mean = np.split(vae.encode(Tensor(to_array(picture)[None])).asnumpy(), 2, 1)[0]
    return to_pil(to_unit_range(vae.decode(Tensor(mean)).asnumpy()))[0]


def cover_and_crop(images, height, width):
    """Resize float images (N, H, W, 3) to cover height x width, then crop the centre."""
    _, h, w, _ = images.shape
    if (h, w) == (height, width):
        return images
    ratio = max(height / h, width / w)
    size = max(round(w * ratio), width), max(round(h * ratio), height)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2

    def resized(channel):
        whole = Image.fromarray(np.ascontiguousarray(channel)).resize(size, Image.Resampling.LANCZOS)
        return np.asarray(whole)[top : top + height, left : left + width]

    stacked = [np.stack([resized(image[..., c]) for c in range(3)], -1) for image in images]
    return np.clip(np.stack(stacked), 0.0, 1.0)


def image_grid(images, columns=None):
    """One picture of PIL images, row by row; as square as it goes unless `columns` is given.

    Smaller ones stand in the upper left corner of a cell of the largest height and width.
    """
    columns = columns or int(np.ceil(len(images) ** 0.5))
    width, height = (max(sides) for sides in zip(*(image.size for image in images)))
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid


def save_png(image, path, metadata, new=False):
    """Write a PNG with text entries beside the target and rename it into place; returns whether it was.

    `new`: leave what is there, which is the one reason for False.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path, new) as file:
            image.save(file, "PNG", pnginfo=png_texts(metadata))
    except Taken:
        return False
    return True


def png_texts(metadata):
    """PIL's PngInfo of a dict of texts. Those of Latin letters are plain texts, which every tool reads."""
    info = PngImagePlugin.PngInfo()
    for name, value in metadata.items():
        text = str(value).replace("\0", "")
        try:
            text.encode("latin-1")
            info.add_text(name, text)
        except UnicodeEncodeError:
            info.add_itxt(name, text)
    return info

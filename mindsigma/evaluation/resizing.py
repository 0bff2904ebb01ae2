"""Pillow's resize in one order of its two passes."""


def resized(image, size, resampling):
    """A PIL image of `size` (width, height), its columns resized before its rows.

    Pixels of 8 bits are rounded between the passes. Pillow before 13 takes this order, 13 chooses one by the shape.
    """
    return image.resize((size[0], image.height), resampling).resize(size, resampling)

"""Folders of images with texts of the same name beside them, at any depth."""

import os

from mindsigma.data.images import SUFFIXES
from mindsigma.data.record import (
    BROKEN,
    CAPTION_SUFFIXES,
    LARGEST_TEXT,
    NO_CAPTION,
    NOT_READ,
    SIDE_CAR,
    BadRow,
    Record,
    RowError,
    captions_of,
    first_caption,
    side_car_values,
)
from mindsigma.data.unread import remedy_for
from mindsigma.errors import MindSigmaError
from mindsigma.foreign import read_bytes


def listing(folder):
    """List of (path of a folder, sorted names of its files) of a folder and all below, hidden names left out.

    Links are followed, but into no folder twice: they may form a circle. Raises MindSigmaError for one that cannot be
    listed.
    """
    folder, result = os.path.abspath(folder), []
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and _is_new(parent, name, seen)]
        result.append((parent, sorted(name for name in names if not name.startswith("."))))
    return result


def folder_rows(folder, files):
    """Rows of a folder whose `listing` is `files`: every image, and a bad row for what is captioned but not read."""
    folder = os.path.abspath(folder)
    for parent, names in files:
        texts, images = _by_stem(names), set()
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                images.update((stem, name))
                yield _image_row(folder, parent, name, {**texts.get(name, {}), **texts.get(stem, {})})
        for name in names:
            stem, suffix = os.path.splitext(name)
            remedy = remedy_for(name)
            is_text = suffix.lower() in (*CAPTION_SUFFIXES, SIDE_CAR)
            captioned = not is_text and not {stem, name} & images and (stem in texts or name in texts)
            if remedy or captioned and suffix.lower() not in SUFFIXES:
                yield BadRow(os.path.join(parent, name), NOT_READ, remedy or f"'{suffix}' is no suffix of an image")


def is_beside_image(name, names):
    """Whether a text is named as one of the images of the set `names` is."""
    stem = os.path.splitext(name)[0]
    return stem in names or any(f"{stem}{suffix}" in names for suffix in SUFFIXES)


def _by_stem(names):
    """Dict from stem to dict from suffix in lower case to name, of the texts and side-cars."""
    texts = {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in (*CAPTION_SUFFIXES, SIDE_CAR):
            texts.setdefault(stem, {})[suffix.lower()] = name
    return texts


def _image_row(folder, parent, name, texts):
    file = os.path.join(parent, name)

    def read(text):
        return read_bytes(os.path.join(parent, text), LARGEST_TEXT)

    try:
        try:
            caption = first_caption(texts, read)
            if caption:
                values = {"prompt": caption}
            else:
                values = side_car_values(read(texts[SIDE_CAR])) if SIDE_CAR in texts else {}
        except MindSigmaError as error:
            raise RowError(BROKEN, str(error)) from None
        if not values:
            beside = f"{', '.join(sorted(texts.values()))} is empty" if texts else "no text of its name beside it"
            raise RowError(NO_CAPTION, beside)
        return Record(os.path.relpath(file, folder), *captions_of(values), 0, 0, file)
    except RowError as error:
        return BadRow(file, *error.args)


def _is_new(parent, name, seen):
    """Whether the folder is none of `seen`, real paths, to which it is added."""
    real = os.path.realpath(os.path.join(parent, name))
    new = real not in seen
    seen.add(real)
    return new


def unreadable(error):
    """MindSigmaError of an OSError that names a folder."""
    return MindSigmaError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions")


def _raise_unreadable(error):
    raise unreadable(error) from None

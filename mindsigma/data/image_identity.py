"""Whether the image of a record is the one that something was made of: its file's stamp, else its bytes, decide."""

import hashlib
import os

from mindsigma.data.records import open_image
from mindsigma.errors import MindSigmaError

PIECE = 1 << 20  # bytes read at once


def find_identity(record, condition=None):
    """dict of two texts, "stamp" and "digest", of a Record's image as it is now; empty where its bytes cannot be read.

    The stamp is taken before the bytes are read: an image replaced in between then differs from what is stored.
    `condition`: Condition of a ControlNet, whose picture, if it has a file, is then a part of the image.
    """
    try:
        files = _files(record, condition)
        return {name: _joined(told, files) for name, told in TOLD.items()}
    except MindSigmaError:
        return {}


def is_same_image(record, identity, stored=str, condition=None):
    """Whether `identity`, a dict that holds what `find_identity` gave, is of a Record's image as it is now.

    Size, times and inode of the file tell that nobody touched it. Where they differ, as after a copy, its bytes are
    read. `stored`: function of a text that gives what the identity holds in its place. `condition`: of find_identity.
    """
    if "stamp" not in identity or "digest" not in identity:
        return False
    try:
        files = _files(record, condition)
        return any(identity[name] == stored(_joined(told, files)) for name, told in TOLD.items())
    except MindSigmaError:
        return False


def _stamp(record):
    try:
        found = os.stat(record.file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not the name of a file"
        raise MindSigmaError(f"{record.where}: cannot be read ({reason})") from None
    # The time of the last change of the inode differs, too, where somebody set the time of the content back.
    parts = [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, record.offset, record.length]
    return " ".join(map(str, parts))


def _digest(record):
    digest = hashlib.blake2b(digest_size=16)
    with open_image(record) as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


TOLD = {"stamp": _stamp, "digest": _digest}  # in this order


def _files(record, condition):
    """The Records whose files an identity is of. Raises MindSigmaError where a condition's is absent."""
    return (record,) if condition is None else (record, *condition.companions(record))


def _joined(told, files):
    return " ".join(told(one) for one in files)

"""Files that strangers wrote: regular ones only, bounded before they are read, their faults told in one line.

Whatever is read from outside goes through here: `open_regular`, `read_bytes`, `read_text` or `map_file` for the bytes,
`load_json` for documents, and `understanding` around the code that makes something of them.
"""

import json
import os
import stat
import struct
import zlib
from contextlib import contextmanager

from mindsigma.errors import MindSigmaError, one_line

LARGEST_DOCUMENT = 64 << 20  # bytes of a JSON or text file that is read whole
MAX_DIGITS = 20  # no size in a file of this world is longer; Python's int() is quadratic
MAX_DEPTH = 64  # nested lists and objects of a JSON document
MAX_VALUES = 4_000_000  # of a JSON document: an empty list takes three bytes of text and sixty of memory

# What the content of a file can raise in code that makes something of it.
RAISED = (ArithmeticError, AttributeError, EOFError, LookupError, RecursionError, TypeError, ValueError)
RAISED += (struct.error, zlib.error)

_last = None  # the file that was opened last


def last_opened():
    """Path of the file that `open_regular` opened last, or None: for an error that nobody gave a name."""
    return _last


def open_regular(path):
    """A regular file, opened for reading bytes; a link counts as what it leads to.

    A FIFO, device or socket is refused without waiting for it. Raises MindSigmaError, which names `path`.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise MindSigmaError(f"{path}: no such file") from None
    except OSError as error:
        raise MindSigmaError(f"{path}: {_fault(error)}") from None
    except ValueError:  # a NUL, or a lone surrogate that the file system does not take
        raise MindSigmaError(f"{path}: not the name of a file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise MindSigmaError(f"{path}: not a regular file")
    global _last
    _last = path
    return open(descriptor, "rb")


def read_bytes(path, largest=LARGEST_DOCUMENT):
    """All bytes of a regular file of at most `largest` bytes. Raises MindSigmaError."""
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # One byte more, for a file that grows while it is read.
            data = b"" if size > largest else file.read(largest + 1)
        except OSError as error:
            raise MindSigmaError(f"{path}: {_fault(error)}") from None
    if size > largest or len(data) > largest:
        raise MindSigmaError(f"{path}: {max(size, len(data))} bytes, more than the {largest} that are read")
    return data


def read_text(path, largest=LARGEST_DOCUMENT):
    """The text of a regular UTF-8 file, without its byte order mark; line breaks stay. Raises MindSigmaError."""
    try:
        return read_bytes(path, largest).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MindSigmaError(f"{path}: not UTF-8 text (byte {error.start})") from None


def map_file(path):
    """The bytes of a regular file as a read-only, memory-mapped uint8 array (bytes,). Raises MindSigmaError."""
    import numpy as np  # not above: a Python without any of the requirements must get as far as check_environment

    with open_regular(path) as file:
        try:
            if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
                raise MindSigmaError(f"{path}: the file is empty; copy or download it again")
            return np.memmap(file, dtype=np.uint8, mode="r").view(np.ndarray)
        except OSError as error:
            raise MindSigmaError(f"{path}: {_fault(error)}") from None


def load_json(path, text, what):
    """The JSON object in `text` (UTF-8 bytes, or text). Raises MindSigmaError, also where a key comes twice."""
    table = load_json_value(path, text, what)
    if not isinstance(table, dict):
        raise MindSigmaError(f"{path}: {what} is not a JSON object; copy or download the file again")
    return table


def load_json_value(path, text, what):
    """`load_json` of a document that need not be an object."""

    def wrong(fault):
        return MindSigmaError(f"{path}: {what} {fault}; copy or download the file again")

    if isinstance(text, str):
        text = text.encode("utf-8", "surrogatepass")  # a lone surrogate is then no UTF-8
    count = sum(map(text.count, (b",", b"[", b"{")))  # no less than there are values
    if count > MAX_VALUES:
        raise wrong(f"holds some {count} values, more than the {MAX_VALUES} that are read")
    try:
        value = json_decoder(wrong).decode(text.decode("utf-8"))
    except MindSigmaError:
        raise
    except (ValueError, RecursionError) as error:
        raise wrong("is not valid JSON") from error
    require_shallow(value, wrong)
    return value


def json_decoder(wrong):
    """A json.JSONDecoder that raises `wrong(fault)`, a MindSigmaError, for a key given twice and for absurd numbers."""

    def unique(pairs):
        table = dict(pairs)
        if len(table) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise wrong(f"gives the key '{one_line(twice)}' twice")
        return table

    def bounded_int(digits):
        if len(digits) > MAX_DIGITS:
            raise wrong(f"holds a number of {len(digits)} digits")
        return int(digits)

    return json.JSONDecoder(object_pairs_hook=unique, parse_int=bounded_int)


def require_shallow(value, wrong):
    """Raise `wrong(fault)` for a JSON value that is nested deeper than any code here follows."""
    if _deeper_than(value, MAX_DEPTH):
        raise wrong(f"is nested more than {MAX_DEPTH} deep")


@contextmanager
def understanding(path, remedy="copy, download or make it again"):
    """Around code that makes something of a foreign file: whatever its content raises becomes one MindSigmaError.

    Only what damaged or malicious content can raise is caught. A mistake of ours in the block looks the same to a user,
    so keep the block small; the original error stays attached as the cause.
    """
    try:
        yield
    except MindSigmaError:
        raise
    except OSError as error:
        raise MindSigmaError(f"{path}: {_fault(error)}") from error
    except MemoryError as error:
        raise MindSigmaError(f"{path}: asks for more memory than there is; {remedy}") from error
    except RAISED as error:
        fault = one_line(f"{type(error).__name__}: {error}", 200)
        raise MindSigmaError(f"{path}: not what this kind of file holds ({fault}); {remedy}") from error


def _deeper_than(value, depth):
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        level = [
            part
            for node in level
            for part in (node.values() if isinstance(node, dict) else node)
            if isinstance(part, (dict, list))
        ]  # fmt: skip
        if not level:
            return False
    return True


def _fault(error):
    return f"cannot be read ({error.strerror or 'input/output error'}); check the file and its permissions"

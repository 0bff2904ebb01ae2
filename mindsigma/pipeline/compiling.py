"""What is being compiled, and how long that took last time: said before a first call in graph mode, which compiles."""

import contextlib
import json
import sys
import time

import mindspore as ms

from mindsigma.backends.compiled import Unavailable, trusted_folder
from mindsigma.errors import MindSigmaError, say
from mindsigma.foreign import load_json, read_bytes
from mindsigma.progress import duration
from mindsigma.runtime import device
from mindsigma.weights.formats.atomic import write_json

NAME = "compile_seconds.json"
MOST = 500  # times that are kept
WORTH_TELLING = 2.0  # seconds

_seen = set()


@contextlib.contextmanager
def compiling(what, quiet=False):
    """Around a call that compiles the first time it is made: `what`, a text that tells all that decides the graph."""
    if ms.get_context("mode") != ms.GRAPH_MODE or what in _seen:
        yield
        return
    _seen.add(what)
    key = f"{what}; {device()}, MindSpore {ms.__version__}"
    before = _times().get(key)
    known = isinstance(before, (int, float))
    if not quiet and (not known or before > WORTH_TELLING):
        say(f"compiling: {what} ({f'{duration(before)} last time' if known else 'for the first time'})", to=sys.stderr)
    began = time.perf_counter()
    yield
    _note(key, time.perf_counter() - began)


def _times():
    with contextlib.suppress(MindSigmaError, Unavailable, OSError):
        file = trusted_folder() / NAME
        if file.is_file():
            return load_json(file, read_bytes(file, 1 << 20), "the list of times")
    return {}


def _note(key, seconds):
    with contextlib.suppress(MindSigmaError, Unavailable, OSError):
        times = {**_times(), key: round(seconds, 1)}
        write_json(trusted_folder() / NAME, json.loads(json.dumps(dict(list(times.items())[-MOST:]))))

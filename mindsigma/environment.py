"""Whether this Python and this MindSpore can run the project; says so in one line before anything is computed."""

import re
import sys
import warnings

from mindsigma.errors import MindSigmaError

PYTHON = ((3, 9), (3, 11))  # first and last release that MindSpore 2.7.1 has wheels for
TESTED = "2.7.1"
OLDEST = (2, 7)
SLOW_ON_CPU = (2, 9)  # from here on, MindSpore's CPU backend convolves about 250 times slower


def wrong_python(python=None):
    """What is wrong with a version of Python (a tuple, by default the one that runs) in one line, or ""."""
    python = tuple(python or sys.version_info)[:2]
    if PYTHON[0] <= python <= PYTHON[1]:
        return ""
    return f"Python {python[0]}.{python[1]} has no MindSpore {TESTED}; use Python 3.{PYTHON[0][1]} to 3.{PYTHON[1][1]}"


def end_on_wrong_python():
    """End the program with one line and exit code 2 if this Python cannot run it."""
    fault = wrong_python()
    if fault:
        sys.stderr.write(f"error: {fault}\n")
        sys.exit(2)


def check_environment(python=None, mindspore=None):
    """Raise MindSigmaError for a Python or MindSpore that cannot run the project, warn about a slow or unknown one.

    Args:
        python, mindspore: versions as a tuple and a text, by default those that run.
    """
    fault = wrong_python(python)
    if fault:
        raise MindSigmaError(fault)
    if mindspore is None:
        from importlib import metadata  # not above: Python 3.7, which is refused, has none

        try:
            mindspore = metadata.version("mindspore")
        except metadata.PackageNotFoundError:
            raise MindSigmaError("MindSpore is not installed; run: pip install -r requirements.txt") from None
    numbers = re.match(r"(\d+)\.(\d+)", str(mindspore))  # 2.8rc1 and 2.8.0.dev2025 are 2.8
    if numbers is None:
        warnings.warn(f"MindSpore has the unknown version {mindspore!r}; tested is {TESTED}", stacklevel=2)
        return
    version = tuple(map(int, numbers.groups()))
    if version < OLDEST:
        raise MindSigmaError(f"MindSpore {mindspore} is too old; run: pip install mindspore=={TESTED}")
    if version >= SLOW_ON_CPU:
        warnings.warn(
            f"MindSpore {mindspore} convolves about 250 times slower than {TESTED} on a CPU; "
            f"unless an NPU runs this, use: pip install mindspore=={TESTED}",
            stacklevel=2,
        )

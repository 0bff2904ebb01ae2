"""Packages that only some work needs: imported when used, a missing one told with the command that installs it."""

import contextlib
import importlib
import io
import os

from mindsigma.errors import MindSigmaError

COMMANDS = {
    "cv2": 'pip install "mindsigma[conditions]"',
    "mindone": 'pip install "mindsigma[mindone]"',
    "paddleocr": "pip install paddleocr==2.9.1 paddlepaddle==2.6.2",
}


def extra(name, purpose):
    """The module `name`; raises MindSigmaError that says what it is for and how it is installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # mindone and transformers speak of what is none of ours
            return importlib.import_module(name)
    except ImportError as error:
        command = COMMANDS.get(name.partition(".")[0], 'pip install "mindsigma[evaluate]"')
        raise MindSigmaError(f"{purpose} needs {name}, which cannot be imported ({error}); run: {command}") from None

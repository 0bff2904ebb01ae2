"""Text on pictures, read by an engine of the user's choice. Engines read differently: results tell engine and settings.

* rapidocr: PP-OCRv6 by onnxruntime; its wheel holds the models, so nothing is fetched. The default.
* paddleocr: what the paper of TextAtlas used (2.9.1, English, with the angle classifier). It fetches its models.
* tesseract: the program of that name on the PATH; a second opinion on plain pages.
"""

import io
import re
import shutil
import subprocess
from importlib import metadata

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.extras import extra

SECONDS = 300  # that a program may take for one picture


class RapidOcr:
    """rapidocr; settings are its own dotted names, such as Global.text_score or EngineConfig.onnxruntime.use_cann."""

    def __init__(self, settings):
        package = extra("rapidocr", "--ocr rapidocr")
        extra("onnxruntime", "--ocr rapidocr")
        self.settings = settings
        try:
            self._engine = package.RapidOCR(params={"Global.log_level": "error", **settings})
        except Exception as error:  # of its own kinds, for settings and models that do not fit
            raise MindSigmaError(f"--ocr rapidocr does not start ({one_line(error, 300)})") from error
        self.about = {
            "engine": "rapidocr",
            "version": metadata.version("rapidocr"),
            "models": _models(self._engine.cfg),
            "onnxruntime": metadata.version("onnxruntime"),
        }

    def lines(self, image):
        """list of the lines read on a PIL image, RGB."""
        found = self._engine(np.ascontiguousarray(np.asarray(image)[..., ::-1]))
        return list(found.txts or ())


def _models(config):
    """What rapidocr detects and recognises with, in a line."""
    parts = []
    for name in ("Det", "Rec"):
        part = config[name]
        parts.append(str(part.model_path) if part.model_path else f"{_text(part.ocr_version)} {_text(part.model_type)}")
    return ", ".join(dict.fromkeys(parts))


def _text(value):
    return str(getattr(value, "value", value))


class PaddleOcr:
    """paddleocr 2, as TextAtlas calls it; settings are the keyword arguments of PaddleOCR."""

    def __init__(self, settings):
        package = extra("paddleocr", "--ocr paddleocr")
        self.settings = {"use_angle_cls": True, "lang": "en", "show_log": False, **settings}
        try:
            self._engine = package.PaddleOCR(**self.settings)
        except Exception as error:
            raise MindSigmaError(f"--ocr paddleocr does not start ({one_line(error, 300)})") from error
        self.about = {"engine": "paddleocr", "version": getattr(package, "__version__", "unknown")}

    def lines(self, image):
        """list of the lines read on a PIL image, RGB."""
        pages = self._engine.ocr(np.ascontiguousarray(np.asarray(image)[..., ::-1]), cls=True)
        return [line[1][0] for line in (pages[0] if pages and pages[0] else [])]


class Tesseract:
    """The program tesseract; settings: psm (page segmentation mode, 11: sparse text), lang."""

    def __init__(self, settings):
        self.settings = {"psm": 11, "lang": "eng", **settings}
        unknown = set(self.settings) - {"psm", "lang"}
        if unknown:
            raise MindSigmaError(f"--ocr tesseract has the settings psm and lang, not {one_line(min(unknown))}")
        mode, language = (str(self.settings[name]) for name in ("psm", "lang"))
        if not re.fullmatch(r"1?\d", mode) or not re.fullmatch(r"\w[\w+/-]*", language):
            raise MindSigmaError("--ocr tesseract: psm is a number of 0 ... 13, lang as in eng+deu")
        self._program = shutil.which("tesseract")
        if self._program is None:
            raise MindSigmaError("--ocr tesseract: no such program on the PATH; run: apt install tesseract-ocr")
        try:
            version = self._run(["--version"], None).split("\n")[0]
        except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
            raise MindSigmaError(f"--ocr tesseract: {self._program} does not start ({one_line(error)})") from None
        self.about = {"engine": "tesseract", "version": version.removeprefix("tesseract ").strip()}

    def _run(self, arguments, data):
        done = subprocess.run([self._program, *arguments], input=data, capture_output=True, timeout=SECONDS)
        if done.returncode:
            fault = " ".join(done.stderr.decode(errors="replace").split())
            raise RuntimeError(fault or f"exit code {done.returncode}")
        return done.stdout.decode(errors="replace")

    def lines(self, image):
        """list of the lines read on a PIL image, RGB."""
        file = io.BytesIO()
        image.save(file, "PNG")
        options = ["--psm", str(self.settings["psm"]), "-l", str(self.settings["lang"])]
        return self._run(["stdin", "stdout", *options], file.getvalue()).split("\n")


ENGINES = {"rapidocr": RapidOcr, "paddleocr": PaddleOcr, "tesseract": Tesseract}


class Reader:
    """An engine and what is made of its lines.

    Args:
        name: of ENGINES.
        settings: list of texts KEY=VALUE for the engine.

    Attributes:
        about: dict of engine, version and settings, for the result.
    """

    def __init__(self, name="rapidocr", settings=()):
        parsed = parse_settings(settings)
        self._engine = ENGINES[name](parsed)
        self.about = {**self._engine.about, "settings": {str(k): v for k, v in self._engine.settings.items()}}

    def read(self, image):
        """(text, fault) of a PIL image: its lines, stripped, joined by spaces, in the engine's order; "" of none.

        As in TextAtlas, what an engine raises for a picture means that nothing was read; it is told as the fault.
        """
        try:
            lines = self._engine.lines(image)
        except Exception as error:
            return "", one_line(f"{type(error).__name__}: {error}", 200)
        return " ".join(line.strip() for line in lines if line.strip()), ""


def parse_settings(texts):
    """dict of KEY=VALUE texts; values are true, false, numbers or texts."""
    settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise MindSigmaError(f"--ocr-setting {one_line(text)}: expected KEY=VALUE")
        settings[key] = _value(value)
    return settings


def _value(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

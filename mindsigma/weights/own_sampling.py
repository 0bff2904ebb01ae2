"""How a model that a user names wants to be sampled: what the header of its file or of its adapter's tells.

Of a released model the list of releases tells it. What tells nothing is sampled by dpm.
"""

from functools import lru_cache
from pathlib import Path

from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_reader import file_of_adapter
from mindsigma.weights.adapters.merging import parse_adapter
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.locate import component_folder, dit_folders
from mindsigma.weights.released import default_sampler
from mindsigma.weights.sampling_header import told_by


def own_sampling(model=None, lora=()):
    """Fields of SamplingOptions that a model was made for: a "sampler" at least.

    Args:
        model: name or path, as tools/generate.py takes it; None is no model.
        lora: the adapters with it, each `FILE[:WEIGHT]`; the last that tells something decides.

    Nothing is fetched: what is on the hub tells nothing but its name.
    """
    told = told_by_adapters(lora)
    if model is None:
        return told or {"sampler": "dpm"}
    return told or _of_file(model, _file_of_model) or {"sampler": default_sampler(model)}


def told_by_adapters(lora):
    """Fields of SamplingOptions that the last of the adapters tells that tells any, or {}."""
    told = (_of_file(parse_adapter(text)[0], file_of_adapter) for text in reversed(lora))
    return next(filter(None, told), {})


def _file_of_model(path):
    folder = component_folder(path, dit_folders())
    return folder / "model.safetensors" if folder.is_dir() else folder


def _of_file(text, find):
    try:
        path = Path(text).expanduser()
        if not path.exists():
            return {}
        file = find(path)
        status = file.stat()
    except (MindSigmaError, OSError, RuntimeError, ValueError):
        return {}  # who opens it says what is wrong
    return dict(_of_header(file, status.st_mtime_ns, status.st_size)) if file.suffix == ".safetensors" else {}


@lru_cache(maxsize=64)
def _of_header(file, changed, size):
    try:
        source = open_checkpoint(file)
    except MindSigmaError:
        return {}  # likewise
    return told_by(source)

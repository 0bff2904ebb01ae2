"""Where models are: bundled with the package, on disk, or on the Hugging Face hub."""

import json
import re
from pathlib import Path

from mindsigma.errors import MindSigmaError

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
DEFAULT_MODEL = "sigma-mini"

# Of a folder on the hub: what a pipeline here reads, without copies of the weights in other precisions.
HUB_FILES = ("*.json", "*.safetensors", "*.model")
HUB_IGNORE = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")


def bundled_names():
    """Names of the models inside the package."""
    return sorted(folder.name for folder in BUNDLED.iterdir() if folder.is_dir()) if BUNDLED.is_dir() else []


def locate(name_or_path, subfolders=None):
    """Path of a model given as a path, a bundled name or a hub id `owner/name`.

    A hub id is looked up in huggingface-hub's cache and fetched if absent; HF_HUB_OFFLINE=1 forbids fetching and
    HF_HOME moves the cache. A weight file on the hub is named `owner/name/file.pth`. Of a folder on the hub only
    `subfolders` are fetched, if given.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    text = str(name_or_path)
    if text in bundled_names():
        return BUNDLED / text
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", text) and not text.startswith(".") and not path.is_absolute():
        return _from_hub(text, subfolders)
    raise MindSigmaError(
        f"{text}: no such file or folder, and no bundled model of that name (bundled: {', '.join(bundled_names())}); "
        "a hub id has the form owner/name"
    )


def _from_hub(text, subfolders):
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, *file = text.split("/")
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(file)))
        wanted = list(HUB_FILES)
        if subfolders is not None:
            wanted = ["*.json"] + [f"{folder}/{pattern}" for folder in subfolders for pattern in HUB_FILES]
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted, ignore_patterns=list(HUB_IGNORE)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MindSigmaError(
            f"{text}: no such path here, and not to be had from the hub ({type(error).__name__}: {reason}); "
            "check the name, the network and HF_HUB_OFFLINE, or give a local folder"
        ) from None


def component_folder(name_or_path, subfolders):
    """Path of one component: a weight file as it is, the first existing of `subfolders`, else the folder itself."""
    path = locate(name_or_path, subfolders)
    if path.is_dir():
        for subfolder in subfolders:
            if (path / subfolder).is_dir():
                return path / subfolder
        if not (path / "config.json").is_file():
            raise MindSigmaError(
                f"{path}: holds neither {' nor '.join(f'{name}/' for name in subfolders)} nor a config.json"
            )
    return path


def read_json(file):
    """A JSON object from a file, as a dict."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MindSigmaError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise MindSigmaError(f"{file}: not readable as JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise MindSigmaError(f"{file}: expected a JSON object")
    return value

"""Where models are: bundled with the package, on disk, or on the Hugging Face hub."""

import contextlib
import re
from pathlib import Path

from mindsigma.choices import FAST
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes
from mindsigma.weights.released import SIGMA_COMPONENTS, advice, release_named, release_of

BUNDLED = Path(__file__).resolve().parent.parent / "bundled"
MAX_JSON = 2**24  # bytes
DIT_FOLDERS = ("dit", "transformer")
EMA_FOLDERS = ("dit_ema", "transformer_ema", "ema_model", "ema")  # averaged weights, as training scripts save them

# Of a folder on the hub: what a pipeline here reads, without copies of the weights in other precisions.
HUB_FILES = ("*.json", "*.safetensors", "*.model")
HUB_IGNORE = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")


def bundled_names(parts=("dit",)):
    """Names of the models inside the package, those that have one of these parts."""
    return sorted({folder.parent.name for part in parts for folder in BUNDLED.glob(f"*/{part}")})


def locate(name_or_path, subfolders=None):
    """Path of a model given as a path, a bundled name, the name of a released model or a hub id `owner/name`.

    The name of a released model stands for its hub id (weights/released.py). A hub id is looked up in
    huggingface-hub's cache and fetched if absent; HF_HUB_OFFLINE=1 forbids fetching and HF_HOME moves the cache. A
    weight file on the hub is named `owner/name/file.pth`. Of a folder on the hub only `subfolders` are fetched, if
    given and there.
    """
    text = str(name_or_path)
    try:
        path = Path(name_or_path).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError, ValueError) as error:  # too long, of an unknown user, with a NUL
        raise MindSigmaError(f"{one_line(text)}: not the name of a file or model ({one_line(error)})") from None
    if text in {FAST, *bundled_names(), *bundled_names(subfolders or ())}:
        return BUNDLED / text
    release = release_named(text)
    if release is not None:
        text = release.repository
    if len(path.parts) > 2 and not path.is_absolute() and Path(*path.parts[:2]).is_dir():  # not meant for the hub
        there = next(parent for parent in path.parents if parent.is_dir())
        names = ", ".join(sorted(entry.name for entry in there.iterdir())[:8])
        raise MindSigmaError(f"{text}: no such file or folder; {there} holds {names or 'nothing'}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(/[\w./-]+)?", text) and not text.startswith(".") and not path.is_absolute():
        return _from_hub(text, subfolders, [] if release is None else [f"transformer/{release.weight_file}"])
    raise MindSigmaError(
        f"{text}: no such file or folder, and no bundled model of that name (bundled: {', '.join(bundled_names())}); "
        f"a hub id has the form owner/name{advice(text)}"
    )


def _from_hub(text, subfolders, besides=()):
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, name, *file = text.split("/")
    try:
        if file:
            return Path(hf_hub_download(f"{owner}/{name}", "/".join(file)))
        wanted = list(HUB_FILES)
        if subfolders is not None:
            wanted = ["*.json"] + [f"{folder}/{pattern}" for folder in subfolders for pattern in HUB_FILES]
        wanted += [file for file in besides if file.endswith(".bin")]
        folder = Path(snapshot_download(f"{owner}/{name}", allow_patterns=wanted, ignore_patterns=list(HUB_IGNORE)))
        if subfolders is None or any((folder / subfolder).is_dir() for subfolder in subfolders):
            return folder
        # A repository of that one network, without subfolders.
        return Path(
            snapshot_download(f"{owner}/{name}", allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORE))
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MindSigmaError(
            f"{text}: no such path here, and not to be had from the hub ({type(error).__name__}: {reason}); "
            f"check the name, the network and HF_HUB_OFFLINE, or give a local folder{advice(text)}"
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
                f"{meant_of_run(path)}"
            )
    return path


def meant_of_run(path):
    """A phrase to end an error with: what to give instead of the folder of a training run or its adapter, or ""."""
    path = Path(path)
    if (path / "adapter.safetensors").is_file():
        return f"; it is the checkpoint of an adapter: give --lora {path} and the model that it was trained on"
    steps = sorted((path / "checkpoints").glob("step_*")) or sorted(path.glob("step_*"))
    if not steps:
        return ""
    latest = steps[-1]
    product = next((latest / name for name in ("ema", "dit") if (latest / name).is_dir()), None)
    if product is None:
        return f"; it is the folder of a run that trained an adapter: give --lora {latest}"
    return f"; it is the folder of a run: give {product}{components_of_run(latest)}"


def components_of_run(path):
    """ " and --components NAME" of the run that a folder or file (Path) belongs to, as its options tell, or ""."""
    for folder in Path(path).absolute().parents:
        file = folder / "options.json"
        if (folder / "checkpoints").is_dir() and file.is_file():
            with contextlib.suppress(MindSigmaError):
                options = read_json(file)
                name = options.get("components") or options.get("model")
                return f" and --components {one_line(name)}" if isinstance(name, str) else ""
    return ""


def components_beside(path):
    """Where VAE, T5 and tokenizer of a model's folder (Path) are: None if in it, else what its released name tells.

    Raises MindSigmaError for a folder that holds a DiT alone and has no released name.
    """
    if any((path / name).is_dir() for name in ("vae", "text_encoder", "tokenizer")):
        return None
    release = release_of(component_folder(path, dit_folders()))
    if release is not None:
        return release.components
    where = components_of_run(path) or f" (--components; of the released Sigma models {SIGMA_COMPONENTS})"
    raise MindSigmaError(
        f"{path}: holds the DiT alone; give the folder or hub id with vae/, text_encoder/ and tokenizer/{where}"
    )


def dit_folders(ema=False):
    """Names of the subfolders that may hold a DiT, the preferred first; averaged ones are taken unasked if alone."""
    return (*EMA_FOLDERS, *DIT_FOLDERS) if ema else (*DIT_FOLDERS, *EMA_FOLDERS)


def read_json(file):
    """A JSON object from a small file, as a dict; raises MindSigmaError, also where a key comes twice."""
    return load_json(file, read_bytes(file, MAX_JSON), "this file")

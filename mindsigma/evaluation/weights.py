"""Weights of the networks that judge, from a path or the hub; a missing one is told with the command to fetch it."""

import re
import zipfile
from pathlib import Path

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import open_regular
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.locate import locate


def open_weights(path, command):
    """TensorSource of a file, which must be no program.

    Args:
        path: path of the file, or owner/name/file on the hub.
        command: what fetches it, for the message where it is missing.
    """
    try:
        path = locate(path)
    except MindSigmaError:
        path = Path(path)
    if not path.is_file():
        raise MindSigmaError(f"{path}: no such file; fetch it with: {command}")
    refuse_torchscript(path)
    return open_checkpoint(path)


def refuse_torchscript(path):
    """Raise MindSigmaError for a TorchScript archive, which holds code beside its weights."""
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            return
        try:
            names = zipfile.ZipFile(file).namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError):
            return  # the reader says what is wrong
    if any("/code/" in name or name.endswith("constants.pkl") for name in names):
        raise MindSigmaError(
            f"{path}: a TorchScript program, which is not run; give a state dict, as pytorch-fid's "
            "pt_inception-2015-12-05-6726825d.pth"
        )


def model_folder(name_or_path, files, weights):
    """Path of a folder with a model: as it is, or fetched from the hub under its id.

    Args:
        files: patterns of the files beside the weights.
        weights: names of which the folder must hold one; of the hub the first that is there is fetched.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        path = _from_hub(str(name_or_path), files, weights)
    if not any((path / name).is_file() for name in weights) or not (path / "config.json").is_file():
        raise MindSigmaError(f"{path}: lacks config.json or weights ({' or '.join(weights)}); fetch the model again")
    return path


def _from_hub(name, files, weights):
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise MindSigmaError(f"{one_line(name)}: no such folder; give one, or a hub id owner/name")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        for choice in weights:
            folder = Path(snapshot_download(name, allow_patterns=[*files, choice]))
            if (folder / choice).is_file():
                break
        return folder
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise MindSigmaError(
            f"{name}: no such folder, and not to be had from the hub ({type(error).__name__}); fetch it where there is "
            f"a network: hf download {name} --local-dir {name.rpartition('/')[2]}"
        ) from None

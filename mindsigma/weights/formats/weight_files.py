"""Which file, or shards, of a folder hold its weights: every spelling of variants, indices and shards, told by name.

With `.fp16` for any variant, and .bin likewise (diffusers/utils/hub_utils.py and transformers/modeling_utils.py, of old
and new releases):

    diffusion_pytorch_model.safetensors                          diffusion_pytorch_model.fp16.safetensors
    diffusion_pytorch_model.safetensors.index.json               diffusion_pytorch_model.safetensors.index.fp16.json
                                                                 diffusion_pytorch_model.fp16.safetensors.index.json
    diffusion_pytorch_model-00001-of-00002.safetensors           diffusion_pytorch_model.fp16-00001-of-00002.safetensors
                                                                 diffusion_pytorch_model-00001-of-00002.fp16.safetensors
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes

MAX_SHARDS = 2**12
MAX_INDEX = 100_000_000  # bytes
FORMATS = (("safetensors",), ("bin", "pth", "pt", "ckpt"))  # the first that a folder holds wins
USUAL_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # those that variants are told for

_SUFFIX = "|".join(suffix for suffixes in FORMATS for suffix in suffixes)
_NAME = re.compile(
    rf"(?P<stem>.+?)(?:-(?P<number>[0-9]{{5}})-of-(?P<count>[0-9]{{5}})(?P<after>\.\w+)?)?"
    rf"\.(?P<suffix>{_SUFFIX})(?P<index>\.index(?:\.(?P<variant>[\w-]+))?\.json)?"
)
_AVERAGED = re.compile(r"(?:^|[._-])ema(?:$|[._-])")
_PLAIN = re.compile(r"non[._-]?ema")


@dataclass(frozen=True)
class Weights:
    """Where the weights are.

    Attributes:
        file: Path of a file or of an index.
        averaged: whether the name says that they are averages (EMA).
        note: what was assumed, or "".
    """

    file: Path
    averaged: bool = False
    note: str = ""


@dataclass(frozen=True)
class _Name:
    text: str
    stem: str
    variant: str
    format: int  # index into FORMATS
    index: bool
    number: int
    count: int

    @property
    def averaged(self):
        return is_averaged(self.text)

    @property
    def group(self):
        return self.stem, self.variant, self.format, self.count


def is_averaged(name):
    """Whether the name of a file, folder or group of tensors says that it holds averages (EMA) of weights."""
    return _AVERAGED.search(_PLAIN.sub("", name.lower())) is not None


def find_weights(path, ema=False):
    """Weights of a folder, or of a file, an index or one shard of several.

    Args:
        path: Path.
        ema: prefer averaged weights where a folder holds both.

    Raises:
        MindSigmaError: a folder holds none, or several that could be meant; shards have no index. Such shards are not
            joined: they may be those of two revisions, as a writer leaves them that is killed while it replaces some.
    """
    if path.is_dir():
        return _in_folder(path, ema)
    name = _parse(path.name)
    hidden = path.name.startswith(".")
    if name is None or name.count < 2 or name.index or hidden or not path.is_file():
        return Weights(path, averaged=is_averaged(path.name))
    folder = path.parent
    for other in _names(folder):
        if other.index and other.format == name.format and path.name in set(read_index(folder / other.text).values()):
            return Weights(folder / other.text, averaged=other.averaged)
    raise MindSigmaError(f"{path}: one shard of {name.count}, and no index beside it lists it; download the index, too")


def _parse(text):
    """The _Name of a weight file or index, or None."""
    match = _NAME.fullmatch(text)
    if match is None:
        return None
    stem, variant = match["stem"], (match["variant"] or (match["after"] or "")[1:])
    for usual in USUAL_STEMS:
        if not variant and stem.startswith(f"{usual}."):
            stem, variant = usual, stem[len(usual) + 1 :]
    number = next(i for i, suffixes in enumerate(FORMATS) if match["suffix"] in suffixes)
    return _Name(text, stem, variant, number, bool(match["index"]), int(match["number"] or 0), int(match["count"] or 0))


def _names(folder):
    try:
        texts = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise MindSigmaError(f"{folder}: cannot be read ({error.strerror})") from error
    return [name for name in map(_parse, texts) if name is not None]


def _in_folder(folder, ema):
    names = _names(folder)
    if not names:
        raise MindSigmaError(
            f"{folder}: holds no weights; expected one .safetensors file, .safetensors.index.json, .pth, .bin or .ckpt"
        )

    def rank(name):
        """What is preferred: a format, averages or not, no variant, an index, a file of the usual name."""
        kind = 0 if name.index else 1 if name.count < 2 and name.stem in USUAL_STEMS else 2
        return name.format, name.averaged != ema, bool(name.variant), kind

    best = min(map(rank, names))
    found = [name for name in names if rank(name) == best]
    if best[-1] == 0 and len(found) > 1:
        found = [name for name in found if name.stem in USUAL_STEMS] or found
    loose = any(name.count > 1 and not name.index for name in found)
    # two spellings of the index of one variant are one choice
    choices = {name.group if name.index else name.text for name in found}
    if len(choices) > 1 or loose:
        remedy = "download the index of the shards, too" if loose else "give the path of one"
        listed = ", ".join(one_line(name.text, 60) for name in found[:4]) + (", ..." if len(found) > 4 else "")
        raise MindSigmaError(f"{folder}: {len(found)} files could be meant ({listed}); {remedy}")
    note = f"only averaged (EMA) weights are there: {found[0].text}" if found[0].averaged and not ema else ""
    return Weights(file_in_folder(folder, found[0].text), averaged=found[0].averaged, note=note)


def read_index(file):
    """The weight_map of a sharded index, dict tensor name -> file name."""
    places = load_json(file, read_bytes(file, MAX_INDEX), "the sharded index").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise MindSigmaError(
            f"{file}: a JSON file without the weight_map of a sharded index; give the path of the weights"
        )
    if len(set(places.values())) > MAX_SHARDS:
        raise MindSigmaError(f"{file}: lists {len(set(places.values()))} shards, over the limit of {MAX_SHARDS}")
    return places


def file_in_folder(folder, name):
    """`folder / name`, refused where `name` or the symlink it may be leads out of the folder.

    The Hugging Face hub's cache is let through: `snapshots/<revision>/...` holds symlinks to `blobs/<hash>` beside it.
    """
    plain = {name} == {PurePosixPath(name).name, PureWindowsPath(name).name} and name not in ("", "..")
    if not plain or not name.isprintable() or len(name.encode()) > 255:
        raise MindSigmaError(f"{folder}: the index names the shard '{one_line(name)}', which is no plain file name")
    try:
        home, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError) as error:
        raise MindSigmaError(f"{folder / one_line(name)}: cannot be resolved; is the symlink a loop?") from error
    blobs = next((parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots"), None)
    if home not in target.parents and blobs not in target.parents:
        raise MindSigmaError(
            f"{folder / one_line(name)}: a symlink out of its folder; put the file itself there, or give its own path"
        )
    return folder / name

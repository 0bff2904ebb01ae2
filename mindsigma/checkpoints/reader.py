"""The one way to open a checkpoint: a file, folder or sharded index, recognised by content, as a source of tensors."""

import re
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np

from mindsigma.checkpoints.exchange import ASIDE, PLAN
from mindsigma.checkpoints.mindspore_file import read_mindspore_ckpt
from mindsigma.checkpoints.safetensors_file import MAX_HEADER, MAX_TENSORS, read_safetensors
from mindsigma.checkpoints.scaled import unscaled
from mindsigma.checkpoints.torch_file import read_torch
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, map_file

WRAPPERS = ("module.", "_orig_mod.", "model.", "base_model.")  # of DDP, torch.compile and training scripts
MAX_SHARDS = 2**12
MAX_NAME = 200  # characters; names go into messages of one line
# what a folder is searched for, the first kind found wins
FOLDER_SUFFIXES = (
    (".safetensors.index.json",),
    (".safetensors",),
    (".bin.index.json",),
    (".bin", ".pth", ".pt", ".ckpt"),
)
USUAL_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")  # preferred to a variant such as `model.fp16`
# of protobuf `Checkpoint { repeated Value { string tag = 1; TensorProto tensor = 2 } = 1 }`: length, tag, tensor
MINDSPORE_HEAD = re.compile(rb"\n[\x80-\xff]{0,9}[\x00-\x7f]\n([\x01-\x7f])")


class TensorSource:
    """Named tensors of one checkpoint, mapped from disk and read only when used.

    `path`: the Path given by the caller. `metadata`: dict[str, str] of the safetensors header(s), or the texts a
    MindSpore checkpoint holds beside its tensors, else empty.
    `extra`: dict of the numbers, texts, bools and None a PyTorch file holds beside its state dict, such as epoch, step.
    `scaled`: names of float8 weights with a scale of their own; what is read is their product, float32.
    `left_out`: names of tensors that only quantised forms have, and that are not there for the reader.
    """

    def __init__(self, path, tensors, metadata=None, extra=None):
        if len(tensors) > MAX_TENSORS:
            raise MindSigmaError(f"{path}: holds {len(tensors)} tensors, over the limit of {MAX_TENSORS}")
        for name in tensors:
            if not name or not name.isprintable():
                raise MindSigmaError(f"{path}: the tensor name '{one_line(name)}' is empty or unprintable; rename it")
            if len(name) > MAX_NAME:
                raise MindSigmaError(
                    f"{path}: the tensor name '{one_line(name)}' has {len(name)} characters; rename it"
                )
        self.path = Path(path)
        self.metadata = dict(metadata or {})
        self.extra = dict(extra or {})
        self._tensors, self.scaled, self.left_out = unscaled(path, tensors)

    def __contains__(self, name):
        return name in self._tensors

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self):
        return len(self._tensors)

    def names(self):
        """list[str] in the order of the file."""
        return list(self._tensors)

    def shape(self, name):
        """tuple[int, ...]; raises MindSigmaError for a name the checkpoint lacks, as the next two do."""
        return self._find(name).shape

    def dtype(self, name):
        """NumPy dtype, `ml_dtypes.bfloat16` included."""
        return self._find(name).dtype

    def read(self, name):
        """Read-only array mapped from the file: its bytes are read when used. It may be strided or unaligned.

        Only what a MindSpore checkpoint holds in slices, a tensor of more than 512 MB, is put together in memory.
        """
        return np.asarray(self._find(name))

    def _find(self, name):
        if name not in self._tensors:
            raise MindSigmaError(f"{self.path}: holds no tensor '{one_line(name)}' among its {len(self)}")
        return self._tensors[name]


def open_checkpoint(path, ema=False):
    """Open a weights file (safetensors, PyTorch zip, MindSpore .ckpt), a sharded index or a folder, as a TensorSource.

    Of a PyTorch file the state dict is `state_dict_ema` if `ema`, else `state_dict`, else `model`, else the whole dict;
    of WRAPPERS, the prefixes that all its names share are stripped. Nothing in a file is executed, no tensor is read
    before it is used. Raises MindSigmaError, of one line, for whatever is wrong with the path or the content.
    """
    path = Path(path)
    try:
        file = _weights_in_folder(path) if path.is_dir() else path
    except OSError as error:
        raise MindSigmaError(f"{path}: cannot be read ({error.strerror})") from error
    kind = _recognise(file)
    if kind == "torch":
        tensors, extra = _state_dict(file, read_torch(file), ema)
        return TensorSource(path, _unwrap(file, tensors), extra=extra)
    if ema:
        raise MindSigmaError(f"{file}: only a PyTorch training file holds EMA weights; open it without EMA")
    return TensorSource(path, *READERS[kind](file))


def _recognise(file):
    """A key of READERS or 'torch', by the first bytes; whatever is known but not read has its own remedy."""
    head = map_file(file)[:512].tobytes()
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head[:2] == b"PK":
        return "torch"
    if head.lstrip()[:1] == b"{":
        return "index"
    if head[:1] == b"\x80" and head[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"):
        raise MindSigmaError(
            f"{file}: an old PyTorch pickle; re-save it with torch.save(torch.load(...)) in PyTorch >= 1.6, "
            "or as safetensors"
        )
    mindspore = MINDSPORE_HEAD.match(head)
    if mindspore and head[mindspore.end() + mindspore[1][0] :][:1] == b"\x12":
        return "mindspore"
    if head[:4] == b"GGUF":
        raise MindSigmaError(
            f"{file}: a GGUF file, quantised for llama.cpp, is not read; use fp32, fp16 or bf16 weights as safetensors"
        )
    if head.startswith(b"version https://git-lfs"):
        raise MindSigmaError(f"{file}: a Git LFS pointer instead of the weights; fetch them with `git lfs pull`")
    if file.suffix == ".safetensors":
        read_safetensors(file)  # says what is wrong with the header
    raise MindSigmaError(
        f"{file}: neither a safetensors file, nor a PyTorch zip file, nor a MindSpore .ckpt, nor a sharded index; "
        "it is damaged or of another kind: copy or download it again, or convert it to safetensors"
    )


def _weights_in_folder(folder):
    """The one file of a folder that holds, or lists, its weights."""
    for home in (folder, folder.parent):
        if (home / ASIDE / PLAN).exists():
            raise MindSigmaError(
                f"{home}: what wrote it ended while its files moved in; run it again, the old ones are then put back"
            )
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    for suffixes in FOLDER_SUFFIXES:
        found = [name for name in names if name.endswith(suffixes)]
        usual = [name for name in found if name in [stem + suffix for stem in USUAL_STEMS for suffix in suffixes]]
        if len(found) == 1 or len(usual) == 1:
            return file_in_folder(folder, (usual or found)[0])
        if found:
            listed = ", ".join(one_line(name, 60) for name in found[:4]) + (", ..." if len(found) > 4 else "")
            raise MindSigmaError(f"{folder}: {len(found)} files could be meant ({listed}); give the path of one")
    raise MindSigmaError(
        f"{folder}: holds no weights; expected one .safetensors file, .safetensors.index.json, .pth, .bin or .ckpt"
    )


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


def _read_index(file):
    """(tensors, metadata) of all shards of an index; the index and its shards must agree on every name."""
    content = map_file(file)
    if content.size > MAX_HEADER:
        raise MindSigmaError(
            f"{file}: {content.size} bytes are too many for a sharded index; give the path of the weights"
        )
    places = load_json(file, content.tobytes(), "the sharded index").get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise MindSigmaError(
            f"{file}: a JSON file without the weight_map of a sharded index; give the path of the weights"
        )
    if len(set(places.values())) > MAX_SHARDS:
        raise MindSigmaError(f"{file}: lists {len(set(places.values()))} shards, over the limit of {MAX_SHARDS}")
    shards = {name: file_in_folder(file.parent, name) for name in dict.fromkeys(places.values())}
    opened, metadata = {}, {}
    for name, shard in shards.items():
        if not shard.is_file():
            raise MindSigmaError(f"{shard}: the shard is absent, though {file.name} lists it; download it")
        opened[name], more = _read_shard(shard)
        metadata.update(more)
        for tensor in opened[name]:
            if places.get(tensor) != name:
                raise MindSigmaError(
                    f"{shard}: holds tensor '{one_line(tensor)}', which {file.name} does not give to it; "
                    "download index and shards of one revision"
                )
    for tensor, name in places.items():
        if tensor not in opened[name]:
            raise MindSigmaError(
                f"{shards[name]}: lacks tensor '{one_line(tensor)}', which {file.name} gives to it; "
                "download index and shards of one revision"
            )
    return {tensor: opened[name][tensor] for tensor, name in places.items()}, metadata


def _read_shard(shard):
    kind = _recognise(shard)
    if kind == "index":
        raise MindSigmaError(f"{shard}: a shard must hold weights, but this is a JSON file; download it again")
    return (_state_dict(shard, read_torch(shard), ema=False)[0], {}) if kind == "torch" else READERS[kind](shard)


READERS = {"safetensors": read_safetensors, "mindspore": read_mindspore_ckpt, "index": _read_index}


def _state_dict(file, saved, ema):
    """(tensors, extra) of the object saved in a PyTorch file."""
    if not isinstance(saved, dict):
        raise MindSigmaError(
            f"{file}: holds a {type(saved).__name__.strip('_')}, not a state dict; save model.state_dict()"
        )
    wanted = ("state_dict_ema",) if ema else ("state_dict", "model")
    key = next((key for key in wanted if isinstance(saved.get(key), dict)), None)
    if ema and key is None:
        raise MindSigmaError(f"{file}: holds no state_dict_ema; open it without EMA")
    if key is None and isinstance(saved.get("state_dict_ema"), dict):
        raise MindSigmaError(f"{file}: holds state_dict_ema only; open it with EMA")
    tensors, extra = saved, {}
    if key is not None:
        tensors = saved[key]
        extra = {k: v for k, v in saved.items() if isinstance(k, str) and isinstance(v, (int, float, str, type(None)))}
    wrong = [k for k, v in tensors.items() if not isinstance(k, str) or not isinstance(v, np.ndarray)]
    if wrong:
        listed = ", ".join(f"'{one_line(k, 60)}'" for k in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise MindSigmaError(
            f"{file}: {len(wrong)} entries of its state dict are no named tensors: {listed}; save the state dict alone"
        )
    if not tensors:
        raise MindSigmaError(f"{file}: its state dict is empty; save model.state_dict()")
    return tensors, extra


def _unwrap(file, tensors):
    """Strip the WRAPPERS all names share; a name that some share would stand beside its own plain form is refused."""
    while True:
        shared = next((w for w in WRAPPERS if all(name.startswith(w) for name in tensors)), None)
        if shared is None:
            break
        tensors = {name[len(shared) :]: tensor for name, tensor in tensors.items()}
    for name in tensors:
        twin = next((w + name for w in WRAPPERS if w + name in tensors), None)
        if twin:
            raise MindSigmaError(
                f"{file}: '{one_line(name)}' and '{one_line(twin)}' clash: wrapped and plain names of one tensor; "
                "save model.state_dict() of the plain model"
            )
    return tensors

"""The one way to open a checkpoint: a file, folder or sharded index, recognised by content, as a source of tensors."""

import re
from pathlib import Path

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import map_file
from mindsigma.weights.formats.exchange import ASIDE, PLAN
from mindsigma.weights.formats.mindspore_file import read_mindspore_ckpt
from mindsigma.weights.formats.safetensors_file import MAX_HEADER, MAX_TENSORS, read_safetensors
from mindsigma.weights.formats.scaled import unscaled
from mindsigma.weights.formats.state_dict import find_state_dict
from mindsigma.weights.formats.torch_file import read_torch
from mindsigma.weights.formats.torch_legacy import is_legacy, read_torch_legacy
from mindsigma.weights.formats.weight_files import file_in_folder, find_weights, is_averaged, read_index
from mindsigma.weights.names.prefixes import find_part, has_averages

MAX_NAME = 200  # characters; names go into messages of one line
# of protobuf `Checkpoint { repeated Value { string tag = 1; TensorProto tensor = 2 } = 1 }`: length, tag, tensor
MINDSPORE_HEAD = re.compile(rb"\n[\x80-\xff]{0,9}[\x00-\x7f]\n([\x01-\x7f])")


class TensorSource:
    """Named tensors of one checkpoint, mapped from disk and read only when used.

    `path`: the Path given by the caller. `metadata`: dict[str, str] of the safetensors header(s), or the texts a
    MindSpore checkpoint holds beside its tensors, else empty.
    `extra`: dict of the numbers, texts, bools and None a PyTorch file holds beside its state dict, such as epoch, step.
    `scaled`: names of float8 weights with a scale of their own; what is read is their product, float32.
    `left_out`: names of tensors that only quantised forms have, and that are not there for the reader.
    `averaged`: whether the weights were chosen as averages (EMA), by the name of the file or the key they stood under.
    `notes`: list[str], what was assumed while looking for them. `beside`: list[str], keys that a PyTorch file holds
    beside its state dict.
    """

    def __init__(self, path, tensors, metadata=None, extra=None, averaged=False, notes=(), beside=()):
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
        self.averaged = averaged
        self.notes = [note for note in notes if note]
        self.beside = list(beside)
        self._tensors, self.scaled, self.left_out = unscaled(path, tensors)

    def part(self, kind, ema=False):
        """The TensorSource of one network, "dit", "vae" or "t5", its names without prefix; itself if it has none such.

        `ema`: take the averaged one of two. Raises MindSigmaError if several could be meant.
        """
        found = find_part(self.path, self.names(), kind, ema and not self.averaged)
        if found is None:
            return self
        tensors = {short: self._tensors[name] for short, name in found.names.items()}
        averaged, notes = self.averaged or found.averaged, [*self.notes, *found.notes]
        source = TensorSource(self.path, tensors, self.metadata, self.extra, averaged, notes)
        source.scaled = [short for short, name in found.names.items() if name in self.scaled]
        source.left_out = list(self.left_out)
        return source

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
    """Open a weights file (safetensors, PyTorch, MindSpore .ckpt), a sharded index or a folder, as a TensorSource.

    A shard of several stands for all of them. Names are those of the file: `TensorSource.part` finds a network among
    them. `ema` asks for averaged weights: of a folder the file that is called so, of a PyTorch file the state dict
    under a key like `state_dict_ema`. Where there are no others, averaged weights are taken unasked, with a note.
    Nothing in a file is executed, no tensor is read before it is used. Raises MindSigmaError, of one line, for whatever
    is wrong with the path or the content.
    """
    path = Path(path)
    for home in (path, path.parent) if path.is_dir() else ():
        if (home / ASIDE / PLAN).exists():
            raise MindSigmaError(
                f"{home}: what wrote it ended while its files moved in; run it again, the old ones are then put back"
            )
    try:
        weights = find_weights(path, ema)
    except OSError as error:
        raise MindSigmaError(f"{path}: cannot be read ({error.strerror})") from error
    notes, averaged = [weights.note], weights.averaged or is_averaged(path.name)
    metadata, extra, beside = {}, {}, []
    kind = _recognise(weights.file)
    if kind in SAVED:
        tensors, extra, beside, key = find_state_dict(weights.file, SAVED[kind](weights.file), ema)
        if key and not ema:
            notes.append(f"only averaged (EMA) weights are there: {key}")
        averaged = averaged or bool(key)
    else:
        tensors, metadata = READERS[kind](weights.file)
    source = TensorSource(path, tensors, metadata, extra, averaged, notes, beside)
    if ema and not averaged and not has_averages(source.names()):
        raise MindSigmaError(f"{weights.file}: holds no state_dict_ema or other averaged weights; open it without EMA")
    return source


def _recognise(file):
    """A key of READERS or of SAVED, by the first bytes; whatever is known but not read has its own remedy."""
    head = map_file(file)[:512].tobytes()
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER:
        return "safetensors"
    if head[:2] == b"PK":
        return "torch"
    if head.lstrip()[:1] == b"{":
        return "index"
    if is_legacy(head):
        return "legacy"
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


def _read_index(file):
    """(tensors, metadata) of all shards of an index; the index and its shards must agree on every name."""
    places = read_index(file)
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
    return (find_state_dict(shard, SAVED[kind](shard))[0], {}) if kind in SAVED else READERS[kind](shard)


SAVED = {"torch": read_torch, "legacy": read_torch_legacy}  # objects, of which a state dict is a part
READERS = {"safetensors": read_safetensors, "mindspore": read_mindspore_ckpt, "index": _read_index}

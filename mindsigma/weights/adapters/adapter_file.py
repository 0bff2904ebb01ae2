"""Low-rank adapters (LoRA, DoRA) of a DiT: what one is, and this project's file of it, read and written.

The file is one safetensors file. Its tensors, with `<name>` a linear layer of the DiT (`blocks.0.mlp.fc1`,
`x_embedder.proj`) or one part of a fused one (`blocks.0.attn.qkv.q`):

    <name>.lora_A      (r, in), for the patch convolution `x_embedder.proj` (r, channels, p, p)
    <name>.lora_B      (out, r)
    <name>.magnitude   (out,), of a DoRA; or (1, in) of a DoRA that has a magnitude for each input, as LyCORIS may

A part is a range of rows of the fused layer: `qkv` has the thirds q, k, v, `kv_linear` the halves k, v. A layer has
either an entry for the whole of it or entries for some of its parts, so that an adapter of separate layers, ranks and
magnitudes is held as it is, without padding. The header's metadata: `format`, `format_version`, `version`,
`kind` = "adapter", `sha256` of the tensors, `source`, `record`, and `config`, a JSON object

    {"_class_name": "Adapter", "rslora": false, "modules": {name: {"rank": 8, "alpha": 8.0, "scale": 1.0}}}

and, of a distilled one, `sampling` (weights/sampling_header.py).
"""

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from mindsigma import __version__
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, load_json_value
from mindsigma.weights.formats.floats import is_float, is_float8
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.names.dit_names import DIFFUSERS
from mindsigma.weights.names.name_map import slots
from mindsigma.weights.sampling_header import header_texts, told_by

FORMAT = {"format": "mindsigma", "format_version": "1", "kind": "adapter"}
PARTS = {"attn.qkv": "qkv", "cross_attn.kv_linear": "kv"}  # fused layers, their parts in the order of the rows
CONVOLUTION = "x_embedder.proj"


@dataclass(frozen=True)
class Entry:
    """The change of one layer W (out, in), or part: W + scale B A, for a DoRA with rows brought to its magnitudes.

    Attributes:
        a: (r, *W.shape[1:]).
        b: (out, r).
        alpha: as trained with.
        scale: float64, `scale_of(alpha, r, rslora)`.
        magnitude: None; (out,), norms of the rows; or (1, in), norms of the columns.
    """

    a: Any
    b: Any
    alpha: float
    scale: float
    magnitude: Optional[Any] = None

    @property
    def rank(self):
        """r."""
        return self.a.shape[0]


@dataclass
class Adapter:
    """Entries by name (see above), rank-stabilised or not, where they came from, and how the model is then sampled."""

    entries: Dict[str, Entry]
    rslora: bool = False
    path: Path = Path("adapter")
    record: list = field(default_factory=list)
    sampling: Dict[str, Any] = field(default_factory=dict)

    @property
    def dora(self):
        """Whether any entry has magnitudes."""
        return any(entry.magnitude is not None for entry in self.entries.values())


def scale_of(alpha, rank, rslora=False):
    """alpha / rank, or alpha / sqrt(rank) of a rank-stabilised adapter (arXiv 2312.03732)."""
    return float(alpha) / (math.sqrt(rank) if rslora else rank)


def place(name):
    """(layer, index, count) of an entry: (`blocks.0.attn.qkv`, 1, 3) for `blocks.0.attn.qkv.k`, a whole is 0 of 1."""
    layer, _, part = name.rpartition(".")
    for fused, parts in PARTS.items():
        if layer.endswith(f".{fused}") and len(part) == 1 and part in parts:
            return layer, parts.index(part), len(parts)
    return name, 0, 1


def part_names(layer):
    """Names of the parts of a fused layer, in order; empty for any other."""
    parts = next((parts for fused, parts in PARTS.items() if layer.endswith(f".{fused}")), "")
    return [f"{layer}.{part}" for part in parts]


def check(adapter, table=DIFFUSERS):
    """Raise MindSigmaError unless an Adapter's names, shapes and dtypes are those the format speaks of.

    `table`: Rules whose names are those of the network's tensors.
    """
    path = adapter.path
    if not adapter.entries:
        raise MindSigmaError(f"{path}: holds no adapter of a DiT")
    for name, entry in adapter.entries.items():
        where = f"{path}: adapter module '{one_line(name)}'"
        layer, _, count = place(name)
        if "norm" in layer or slots(table, f"{layer}.weight") is None:
            raise MindSigmaError(f"{where} is no linear layer of a PixArt DiT; the adapter belongs to another model")
        if count > 1 and layer in adapter.entries:
            raise MindSigmaError(f"{where} is a part of '{layer}', which has an entry too; keep one of the two")
        if entry.b.ndim != 2 or entry.a.ndim != (4 if layer == CONVOLUTION else 2) or entry.a.size == 0:
            raise MindSigmaError(f"{where} has the shapes A {entry.a.shape}, B {entry.b.shape}")
        if entry.b.shape[1] != entry.rank or entry.b.shape[0] == 0:
            raise MindSigmaError(f"{where}: A {entry.a.shape} and B {entry.b.shape} do not have one rank")
        count = len(part_names(name))
        if count and entry.b.shape[0] % count:
            raise MindSigmaError(f"{where}: the {entry.b.shape[0]} rows of B are no {count} parts")
        shapes = ((entry.b.shape[0],), (1, entry.a.shape[1]))
        if entry.magnitude is not None and entry.magnitude.shape not in shapes:
            raise MindSigmaError(f"{where} has magnitudes of shape {entry.magnitude.shape}, expected {shapes[0]}")
        for array in tensors_of(name, entry).values():
            if not is_float(array.dtype) or is_float8(array.dtype):
                raise MindSigmaError(f"{where} holds {array.dtype}, expected floating-point numbers")
        if not (math.isfinite(entry.alpha) and entry.alpha and math.isfinite(entry.scale)):
            raise MindSigmaError(f"{where} has alpha {entry.alpha}; it must be a number other than 0")
        if entry.scale != scale_of(entry.alpha, entry.rank, adapter.rslora):
            raise MindSigmaError(
                f"{where} has scale {entry.scale}, which alpha {entry.alpha} and rank {entry.rank} do not give"
            )


def tensors_of(name, entry):
    """dict tensor name -> array of one entry, as in the file."""
    tensors = {f"{name}.lora_A": entry.a, f"{name}.lora_B": entry.b}
    if entry.magnitude is not None:
        tensors[f"{name}.magnitude"] = entry.magnitude
    return tensors


def write_adapter(path, adapter, progress=None):
    """Write an Adapter into a `.safetensors` file, replaced whole or not at all.

    Raises MindSigmaError if the adapter is not as the format wants it, or the file cannot be written.
    """
    check(adapter)
    tensors, modules = {}, {}
    for name, entry in adapter.entries.items():
        tensors.update(tensors_of(name, entry))
        modules[name] = {"rank": entry.rank, "alpha": entry.alpha, "scale": entry.scale}
    config = {"_class_name": "Adapter", "rslora": adapter.rslora, "modules": modules}
    metadata = {
        **FORMAT,
        "version": __version__,
        "sha256": _digest(tensors),
        "source": adapter.path.name,
        "config": json.dumps(config, separators=(",", ":")),
        "record": json.dumps(adapter.record),
        **header_texts(adapter.sampling),
    }
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_safetensors(Path(path), specs, lambda name: np.ascontiguousarray(tensors[name]), metadata, progress)


def is_own(source):
    """Whether a TensorSource is a file of this format."""
    return all(source.metadata.get(key) == FORMAT[key] for key in ("format", "kind"))


def read_adapter(path):
    """Read an Adapter from a file of this format; its arrays are mapped from the file.

    Raises MindSigmaError for another kind of file, and for a damaged one: names, shapes, scales and the checksum of
    the tensors are verified.
    """
    source = open_checkpoint(path)
    if not is_own(source):
        raise MindSigmaError(
            f"{path}: no adapter file of this project; translate it with tools/convert.py --to mindspore"
        )
    damaged = MindSigmaError(f"{path}: damaged adapter file: metadata and tensors do not agree; copy it again")
    config = load_json(path, source.metadata.get("config", ""), "the adapter's config")
    record = load_json_value(path, source.metadata.get("record", "[]"), "the adapter's record")
    left, entries, sampling = set(source.names()), {}, told_by(source)
    try:
        for name, values in config["modules"].items():
            names = [f"{name}.lora_A", f"{name}.lora_B", f"{name}.magnitude"]
            a, b, magnitude = (source.read(key) if key in source else None for key in names)
            entries[name] = Entry(a, b, float(values["alpha"]), float(values["scale"]), magnitude)
            left -= set(names)
            if a.shape[0] != values["rank"]:
                raise damaged
        lines = [one_line(line) for line in record]
        adapter = Adapter(entries, config["rslora"], Path(path), lines, sampling)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RecursionError):
        raise damaged from None
    if left or type(adapter.rslora) is not bool or any(entry.b is None for entry in entries.values()):
        raise damaged
    check(adapter)
    if _digest({name: source.read(name) for name in source.names()}) != source.metadata.get("sha256"):
        raise MindSigmaError(f"{path}: damaged adapter file: its tensors are not those written; copy it again")
    return adapter


def _digest(tensors):
    """SHA-256 of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return digest.hexdigest()

"""An adapter in the form of a target: our file, peft's folder, a diffusers or kohya-style file; written and proven.

What the targets can hold (facts and sources: weights/adapters/adapter_names.py): a fused layer's entry becomes one
entry for each of q, k, v with the same A. peft tells scales in its config, rank-stabilised ones too; a diffusers file
has an `alpha` for each module unless all scales are 1, a kohya-style file always, so that there a rank-stabilised
adapter becomes a plain one with alpha = scale * rank. peft and diffusers hold magnitudes of rows only, for all
modules or none. The official code reads peft's folder.
"""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from mindsigma.conversion.targets import NUMPY
from mindsigma.errors import MindSigmaError
from mindsigma.weights.adapters.adapter_file import part_names, tensors_of, write_adapter
from mindsigma.weights.adapters.adapter_names import diffusers_name
from mindsigma.weights.adapters.adapter_reader import CONFIG, FILES, joined, open_adapter
from mindsigma.weights.formats.atomic import write_json
from mindsigma.weights.formats.folder_writer import check_file_target, check_folder_target, replacing_files
from mindsigma.weights.formats.reader import TensorSource
from mindsigma.weights.formats.safetensors_writer import write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec
from mindsigma.weights.names.views import Cast

FILE_NAMES = {"mindspore": "adapter.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}


def prepare(adapter, target, dtype=None):
    """An Adapter as a target gets it: its tensors in "fp32", "fp16", "bf16" or as they are, what changes recorded.

    Raises MindSigmaError for a value beyond the dtype.
    """
    if adapter.rslora and target in ("diffusers", "kohya"):
        adapter = replace(adapter, record=[*adapter.record, "rank-stabilised: written with alpha = scale * rank"])
    if dtype is None:
        return adapter

    def one(name, array):
        return None if array is None else Cast(TensorSource(adapter.path, {name: array}), NUMPY[dtype]).read(name)

    entries = {
        name: replace(
            entry,
            a=one(f"{name}.lora_A", entry.a),
            b=one(f"{name}.lora_B", entry.b),
            magnitude=one(f"{name}.magnitude", entry.magnitude),
        )
        for name, entry in adapter.entries.items()
    }
    return replace(adapter, entries=entries, record=[*adapter.record, f"dtype {dtype}"])


def tensors_for(adapter, target):
    """dict name -> ndarray under a target's names. Raises MindSigmaError for what the target cannot hold."""
    target = "peft" if target == "official" else target
    if target == "mindspore":
        return {key: array for name, entry in adapter.entries.items() for key, array in tensors_of(name, entry).items()}
    entries = _apart(adapter, target)
    spell = {"peft": _peft, "diffusers": _diffusers, "kohya": _kohya}[target]
    return spell(entries, any(entry.scale != 1 for entry in entries.values()))


def _apart(adapter, target):
    """dict diffusers name -> Entry, fused layers taken apart."""
    entries = {}
    plain = [name for name, entry in adapter.entries.items() if entry.magnitude is None]
    if target != "kohya" and adapter.dora and plain:
        raise MindSigmaError(
            f"{adapter.path}: --to {target} takes DoRA for all modules or for none, but '{plain[0]}' has no "
            "magnitudes; use --to kohya or --to mindspore"
        )
    for name, entry in adapter.entries.items():
        columns = entry.magnitude is not None and entry.magnitude.ndim == 2
        parts = part_names(name)
        if columns and (target != "kohya" or parts):
            raise MindSigmaError(
                f"{adapter.path}: '{name}' has DoRA magnitudes of its inputs, which --to {target} cannot hold"
            )
        rows = entry.b.shape[0] // max(len(parts), 1)
        for i, part in enumerate(parts or [name]):
            of_part = slice(i * rows, (i + 1) * rows)
            magnitude = entry.magnitude if columns or entry.magnitude is None else entry.magnitude[of_part]
            entries[diffusers_name(part)] = replace(entry, b=entry.b[of_part], magnitude=magnitude)
    return entries


def _up(entry):
    """B with the axes of A."""
    return entry.b.reshape(entry.b.shape + (1,) * (entry.a.ndim - 2))


def _peft(entries, _, prefix="base_model.model."):
    tensors = {}
    for name, entry in entries.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = entry.a
        tensors[f"{prefix}{name}.lora_B.weight"] = _up(entry)
        if entry.magnitude is not None:
            shape = (1, -1, 1, 1) if entry.a.ndim == 4 else (-1,)
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = entry.magnitude.reshape(shape)
    return tensors


def _diffusers(entries, scaled):
    tensors = _peft(entries, scaled, "transformer.")
    if scaled:
        tensors.update((f"transformer.{name}.alpha", _alpha(entry)) for name, entry in entries.items())
    return tensors


def _kohya(entries, _):
    tensors = {}
    for name, entry in entries.items():
        name = f"lora_transformer_{name.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = entry.a
        tensors[f"{name}.lora_up.weight"] = _up(entry)
        tensors[f"{name}.alpha"] = _alpha(entry)
        if entry.magnitude is not None:
            rowwise, ones = entry.magnitude.ndim == 1, (1,) * (entry.a.ndim - 2)
            tensors[f"{name}.dora_scale"] = entry.magnitude.reshape(((-1, 1) if rowwise else (1, -1)) + ones)
    return tensors


def _alpha(entry):
    """alpha for a reader that divides by the rank: float32 where that is exact, as these tools write it."""
    value = np.float64(entry.scale * entry.rank)
    if value / entry.rank != entry.scale:  # the neighbour that gives the scale back, if there is one
        near = [np.nextafter(value, way) for way in (-np.inf, np.inf)]
        value = next((one for one in near if one / entry.rank == entry.scale), value)
    with np.errstate(over="ignore"):
        return np.array(value, np.float32 if np.float32(value) == value else np.float64)


def peft_config(adapter):
    """adapter_config.json for peft's LoraConfig, modules under diffusers' names."""
    entries = _apart(adapter, "peft")
    rank = Counter(entry.rank for entry in entries.values()).most_common(1)[0][0]
    alpha = Counter(entry.alpha for entry in entries.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(entries),
        "rank_pattern": {name: entry.rank for name, entry in entries.items() if entry.rank != rank},
        "alpha_pattern": {name: _whole(entry.alpha) for name, entry in entries.items() if entry.alpha != alpha},
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
    }


def _whole(number):
    return int(number) if number == int(number) else number


def output_file(root, target):
    """The weight file that a target path stands for."""
    root = Path(root)
    if target in ("peft", "official"):
        if root.suffix in (".safetensors", ".bin", ".pth", ".ckpt"):
            raise MindSigmaError(f"{root}: --to {target} writes an adapter as a folder")
        return root / FILES[0]
    if root.suffix == ".safetensors":
        return root
    if root.suffix in (".ckpt", ".pth", ".bin", ".pt"):
        raise MindSigmaError(f"{root}: adapters are written as .safetensors")
    if target == "kohya":
        raise MindSigmaError(f"{root}: --to kohya writes one .safetensors file")
    return root / FILE_NAMES[target]


def write(adapter, root, target, overwrite=False, progress=None):
    """Write an Adapter for a target of tools/convert.py; returns the path that `open_adapter` takes."""
    file = check_target(root, target, overwrite)
    root, tensors = Path(root), tensors_for(adapter, target)
    metadata = {"format": "pt"}
    if target == "kohya":
        metadata.update(_kohya_metadata(adapter))
    specs = [TensorSpec(name, array.dtype, array.shape) for name, array in tensors.items()]

    def put(path):
        if target == "mindspore":
            write_adapter(path, adapter, progress)
        else:
            write_safetensors(path, specs, tensors.__getitem__, metadata, progress)

    if file == root:
        put(file)
        return file
    peft = target in ("peft", "official")
    # Beside peft's config the new file would be taken for peft's weights.
    with replacing_files(root, leaving=() if peft else (CONFIG,)) as place:
        put(place / file.name)
        if peft:
            write_json(place / CONFIG, peft_config(adapter))
    return root if peft else file


def check_target(root, target, overwrite=False):
    """Raise, before anything is written, where `write` cannot put its files; returns the weight file."""
    root, file = Path(root), output_file(root, target)
    if file == root:
        check_file_target(root, overwrite)
    else:
        check_folder_target(root, overwrite)
    return file


def _kohya_metadata(adapter):
    """What sd-scripts' tools show of a file; a value that differs between modules is "Dynamic" there."""
    ranks = {entry.rank for entry in adapter.entries.values()}
    alphas = {_whole(entry.scale * entry.rank) for entry in adapter.entries.values()}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
        "ss_base_model_version": "pixart_sigma",
        "record": json.dumps(adapter.record),
    }


def verify(adapter, path):
    """Read a written adapter back and compare every tensor's bytes and every scale with what was to be written.

    Returns the number of modules compared; raises MindSigmaError that names the first that differs.
    """
    expected, found = joined(adapter.entries), joined(open_adapter(path).adapter.entries)
    missing = sorted(set(expected) ^ set(found))
    if missing:
        raise MindSigmaError(f"{path}: module '{missing[0]}' is not on both sides")
    for name, one in expected.items():
        two = found[name]
        same = _bits(one.a) == _bits(two.a) and _bits(one.b) == _bits(two.b)
        # alpha of a rank-stabilised adapter is scale * rank elsewhere, which may be off by a rounding of float64
        if (
            not same
            or _bits(one.magnitude) != _bits(two.magnitude)
            or not math.isclose(one.scale, two.scale, rel_tol=1e-15)
        ):
            raise MindSigmaError(f"{path}: module '{name}' differs from the source; convert again")
    return len(expected)


def _bits(array):
    return None if array is None else (array.dtype, array.shape, array.tobytes())

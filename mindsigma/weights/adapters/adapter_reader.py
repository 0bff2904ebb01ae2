"""Adapters of every source (peft folder, diffusers file, kohya style, ours), recognised by content, as an Adapter.

The scale of an entry comes from its `alpha` tensor (alpha / rank), else from adapter_config.json or diffusers'
`lora_adapter_metadata` (lora_alpha, alpha_pattern, use_rslora), else alpha is the rank, as every loader has it.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import List

import numpy as np

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.foreign import load_json, read_bytes
from mindsigma.weights.adapters.adapter_file import (
    CONVOLUTION,
    Adapter,
    Entry,
    check,
    is_own,
    part_names,
    place,
    read_adapter,
    scale_of,
)
from mindsigma.weights.adapters.adapter_names import (
    OF_CONTROLNET,
    TEXT_PREFIXES,
    diffusers_name,
    entry_name,
    other_kind,
    split_key,
)
from mindsigma.weights.adapters.module_patterns import Patterns
from mindsigma.weights.formats.floats import is_float8
from mindsigma.weights.formats.reader import open_checkpoint
from mindsigma.weights.locate import dit_folders
from mindsigma.weights.names import controlnet_names
from mindsigma.weights.names.dit_names import DIFFUSERS
from mindsigma.weights.names.prefixes import kinds_in

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
OTHER_FILES = ("adapter.safetensors", "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")
METADATA = "lora_adapter_metadata"
MAX_PATTERNS = 10_000
MAX_CONFIG = 4 << 20  # bytes
# ways of peft to start an adapter that also change the weights it belongs to
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
# of peft's config: kinds of LoRA that compute something else
VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "monteclora_config"),
    *("use_bdlora", "use_qalora", "velora_config"),
)


@dataclass
class Opened:
    """An adapter and what its source held beside it.

    Attributes:
        adapter: Adapter; a fused layer whose parts have one A is one entry.
        tensors: how many tensors it was made of.
        dropped: names that are knowingly left out, of the text encoder.
        texts: keys of the header's texts that say nothing of the weights and are left out.
        assumed: what the source did not tell, in words; they stand in the adapter's record, too.
    """

    adapter: Adapter
    tensors: int
    dropped: List[str] = field(default_factory=list)
    assumed: List[str] = field(default_factory=list)
    texts: List[str] = field(default_factory=list)


def is_adapter(path):
    """Whether a file or folder holds an adapter of any kind, also of one that is not read."""
    path = Path(path)
    try:
        if path.is_dir():
            if any((path / name).is_dir() for name in dit_folders()):
                return False  # a model, which an adapter may lie beside
            if any((path / name).is_file() for name in (CONFIG, *FILES, *OTHER_FILES)):
                return True
            if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
                return False
        names = open_checkpoint(path).names()
    except (MindSigmaError, OSError):
        return False  # who opens it as a network says what is wrong
    return other_kind(names) is not None or any((split_key(name) or ("", ""))[1] in ("a", "b") for name in names)


def is_controlnet_adapter(path):
    """Whether a file or folder holds an adapter of a ControlNet."""
    path = Path(path)
    try:
        if path.is_dir() and not any((path / name).is_file() for name in (*FILES, *OTHER_FILES)):
            return False
        names = open_checkpoint(_files(path)[0]).names()
    except (MindSigmaError, OSError):
        return False  # who opens it as something else says what is wrong
    return any(OF_CONTROLNET in name and (split_key(name) or ("", ""))[1] in ("a", "b") for name in names)


def open_adapter(path, controlnet=False):
    """Open an adapter as Opened. Its arrays are mapped from the file.

    `controlnet`: it is one of a ControlNet, whose layers have our names of these.

    Raises MindSigmaError, of one line, for whatever is wrong with the file, for an adapter of another kind (LoKr, LoHa,
    with biases ...) or of another model.
    """
    path = Path(path)
    file, config_file = _files(path)
    if file.is_dir() and any((file / name).is_dir() for name in dit_folders()):
        raise MindSigmaError(f"{path}: holds a whole DiT, no adapter; give it as the model (--model), not as --lora")
    source = open_checkpoint(file)
    if is_own(source):
        return Opened(replace(read_adapter(file), path=path), len(source))
    if "dit" in kinds_in(source.names()):
        raise MindSigmaError(f"{path}: a whole DiT, no adapter; give it as the model (--model), not as --lora")
    if not controlnet and any(OF_CONTROLNET in name for name in source.names()):
        raise MindSigmaError(
            f"{path}: an adapter of a ControlNet, not of a DiT: give it as --controlnet, with the picture that it takes"
        )
    config = _config(config_file) if config_file else _metadata_config(path, source)
    kept, dropped = _sorted_keys(path, source, controlnet)
    bare = file.name in FILES or all(name.startswith("base_model.model.") for name in source.names())
    if bare and config_file is None and not config and not any("alpha" in keys for keys in kept.values()):
        raise MindSigmaError(
            f"{path}: peft's weights without their {CONFIG}, which tells the scale; put it beside them"
        )
    scaled = sum("alpha" in keys for keys in kept.values())
    if config.get("use_rslora") and 0 < scaled < len(kept):
        raise MindSigmaError(f"{path}: rank-stabilised, with alpha for {scaled} of {len(kept)} modules; save it again")
    adapter = Adapter({}, bool(config.get("use_rslora")) and not scaled, path)
    patterns = Patterns(path, config.get("alpha_pattern") or {})
    unscaled = 0
    for name, keys in kept.items():
        entry, told = _entry(path, source, name, keys, config, patterns, adapter.rslora, controlnet)
        adapter.entries[name] = entry
        unscaled += not told
    if config.get("use_dora") and not all(entry.magnitude is not None for entry in adapter.entries.values()):
        raise MindSigmaError(f"{path}: {CONFIG} says DoRA, but not every module has its magnitudes; save it again")
    assumed = [f"no alpha given for {unscaled} modules: taken as the rank, scale 1"] if unscaled else []
    assumed += source.notes
    adapter.record += assumed
    adapter.entries = joined(adapter.entries)
    check(adapter, controlnet_names.DIFFUSERS if controlnet else DIFFUSERS)
    texts = [key for key in source.metadata if key not in ("format", METADATA)]
    return Opened(adapter, sum(len(keys) for keys in kept.values()), dropped, assumed, texts)


def joined(entries):
    """Entries with the parts of a fused layer as one wherever that is the same: one A, one scale, all or no DoRA."""
    result = {}
    for name, entry in entries.items():
        layer, index, count = place(name)
        parts = [entries.get(part) for part in part_names(layer)]
        if count > 1 and None not in parts and _alike(parts):
            if index == 0:
                magnitude = None if entry.magnitude is None else np.concatenate([part.magnitude for part in parts])
                result[layer] = replace(entry, b=np.concatenate([part.b for part in parts]), magnitude=magnitude)
            continue
        result[name] = entry
    return result


def _alike(parts):
    first, *rest = parts
    return all(
        part.alpha == first.alpha
        and part.a.dtype == first.a.dtype
        and part.b.dtype == first.b.dtype
        and part.b.shape == first.b.shape
        and _same_bits(part.a, first.a)
        and _rowwise(part) == _rowwise(first) is not None
        for part in rest
    )


def _rowwise(entry):
    """The dtype of magnitudes of rows, "" without magnitudes, None for magnitudes of columns."""
    if entry.magnitude is None:
        return ""
    return entry.magnitude.dtype.name if entry.magnitude.ndim == 1 else None


def _same_bits(one, two):
    return one.shape == two.shape and one.tobytes() == two.tobytes()


def file_of_adapter(path):
    """The weight file of an adapter that the user named: a file or a folder. Raises MindSigmaError."""
    return _files(Path(path))[0]


def _files(path):
    """(weights, config of peft or None) of what the user named."""
    if not path.is_dir():
        config = path.parent / CONFIG
        return path, config if path.name in FILES and config.is_file() else None
    if (path / CONFIG).is_file():
        weights = next((path / name for name in FILES if (path / name).is_file()), None)
        if weights is None:
            raise MindSigmaError(f"{path}: holds {CONFIG}, but neither {' nor '.join(FILES)}; copy it again")
        return weights, path / CONFIG
    return next((path / name for name in OTHER_FILES if (path / name).is_file()), path), None


def _config(file):
    config = load_json(file, read_bytes(file, MAX_CONFIG), "peft's config")
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise MindSigmaError(f"{file}: an adapter of the kind {one_line(kind, 40)}; only LoRA and DoRA are read")
    return _checked(file, config)


def _metadata_config(path, source):
    """diffusers' copy of peft's config in the header, for the transformer, or {}."""
    if METADATA not in source.metadata:
        return {}
    config = load_json(path, source.metadata[METADATA], METADATA)
    for prefix in ("transformer.", "unet.", "controlnet."):
        inner = {key[len(prefix) :]: value for key, value in config.items() if key.startswith(prefix)}
        if inner:
            return _checked(path, inner)
    return _checked(path, config if "lora_alpha" in config else {})


def _checked(path, config):
    """The config, if what is used of it has the kinds it should have."""

    def number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    patterns = config.get("alpha_pattern") or {}
    if (
        not number(config.get("lora_alpha", 1))
        or not isinstance(patterns, dict)
        or len(patterns) > MAX_PATTERNS
        or not all(number(value) for value in patterns.values())
        or any(type(config.get(key, False)) is not bool for key in ("use_rslora", "use_dora"))
    ):
        raise MindSigmaError(f"{path}: lora_alpha, alpha_pattern, use_rslora or use_dora is not as peft writes it")
    variant = next((key for key in VARIANTS if config.get(key)), None)
    if variant:
        raise MindSigmaError(f"{path}: a LoRA with {variant}; merge it into the model with peft")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise MindSigmaError(
            f"{path}: started with init_lora_weights {one_line(start, 40)}, it fits changed base weights only; "
            "save it with peft's path_initial_model_for_weight_conversion"
        )
    return config


def _sorted_keys(path, source, controlnet):
    """(dict our entry -> dict role -> key, names left out)."""
    kept, dropped = {}, []
    other = other_kind(source.names())
    if other:
        raise MindSigmaError(
            f"{path}: an adapter of the kind {other[1]} (tensor '{one_line(other[0])}'); only LoRA and DoRA are read: "
            "merge it into the model with the tool that made it"
        )
    for key in source.names():
        if key.startswith(TEXT_PREFIXES):
            dropped.append(key)
            continue
        found = split_key(key)
        if found is None:
            raise MindSigmaError(
                f"{path}: tensor '{one_line(key)}' is neither A, B, alpha nor magnitude of a LoRA or DoRA "
                "(a bias, modules_to_save?); merge it into the model with the tool that made it"
            )
        name = entry_name(found[0], controlnet)
        if name is None:
            raise MindSigmaError(
                f"{path}: tensor '{one_line(key)}' speaks of no linear layer of a PixArt "
                f"{'ControlNet' if controlnet else 'DiT'}; the adapter belongs to another model"
            )
        if kept.setdefault(name, {}).setdefault(found[1], key) != key:
            raise MindSigmaError(
                f"{path}: '{one_line(key)}' and '{one_line(kept[name][found[1]])}' are the same thing twice; "
                "save one adapter a file"
            )
    if not kept:
        raise MindSigmaError(f"{path}: holds no adapter of a DiT, only {len(dropped)} tensors for a text encoder")
    for name, keys in kept.items():
        for role, what in (("a", "lora_A"), ("b", "lora_B")):
            if role not in keys:
                raise MindSigmaError(
                    f"{path}: {what} (lora_{'down' if role == 'a' else 'up'}) of '{name}' is missing "
                    f"beside '{one_line(next(iter(keys.values())))}'"
                )
    return kept, dropped


def _entry(path, source, name, keys, config, patterns, rslora, controlnet):
    """(Entry, whether the source told its scale)."""
    layer = place(name)[0]
    a, b = _numbers(source.read(keys["a"])), _numbers(source.read(keys["b"]))
    b = _squeezed(b)
    a = a if layer == CONVOLUTION else _squeezed(a)
    if a.ndim < 2 or b.ndim != 2 or 0 in a.shape:
        raise MindSigmaError(f"{path}: the tensors of '{name}' have the shapes A {a.shape}, B {b.shape}")
    magnitude = None
    if "magnitude" in keys:
        stored = _numbers(source.read(keys["magnitude"]))
        magnitude = _magnitude(path, stored, keys["magnitude"], a.shape[1], b.shape[0])
    rank, told = a.shape[0], True
    if "alpha" in keys:
        value = source.read(keys["alpha"])
        if value.size != 1:
            raise MindSigmaError(f"{path}: '{one_line(keys['alpha'])}' has shape {value.shape}, expected one number")
        alpha = float(value.reshape(-1)[0].astype(np.float64))
    elif "lora_alpha" in config:
        names = [name] if part_names(name) else [diffusers_name(name, controlnet), name]
        alpha = float(patterns.find(names, config["lora_alpha"]))
    else:
        alpha, told = float(rank), False
    return Entry(a, b, alpha, scale_of(alpha, rank, rslora), magnitude), told


def _numbers(array):
    """float8 as float16, which is exact."""
    return array.astype(np.float16) if is_float8(array.dtype) else array


def _squeezed(array):
    while array.ndim > 2 and array.shape[-1] == 1:
        array = array[..., 0]
    return array


def _magnitude(path, value, key, inputs, outputs):
    """As in our file: (out,) or, from `dora_scale` of LyCORIS, (1, in)."""
    if value.size == inputs and value.ndim > 1 and value.shape[0] == 1 and key.endswith(".dora_scale"):
        return value.reshape(1, inputs)
    if value.size != outputs:
        raise MindSigmaError(f"{path}: '{one_line(key)}' has shape {value.shape}, expected ({outputs},)")
    return value.reshape(outputs)


def ranks_text(adapter):
    """The ranks of an adapter in words: `rank 8`, or `ranks 4 to 16`."""
    ranks = Counter(entry.rank for entry in adapter.entries.values())
    return f"rank {min(ranks)}" if len(ranks) == 1 else f"ranks {min(ranks)} to {max(ranks)}"

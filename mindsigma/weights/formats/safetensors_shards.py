"""Safetensors in shards with the Hugging Face index, resumed where a killed run stopped."""

import json
import os
import re

from mindsigma.errors import MindSigmaError
from mindsigma.weights.formats.atomic import naming, replacing
from mindsigma.weights.formats.exchange import check_places, exchange, recover
from mindsigma.weights.formats.safetensors_writer import NAMES, check_safetensors, write_safetensors, written_crcs
from mindsigma.weights.formats.tensor_stream import checked_specs
from mindsigma.weights.formats.weight_files import USUAL_STEMS

SHARD = r"(-\d{5}-of-\d{5})?\.safetensors"
INDEX = ".safetensors.index.json"


def write_sharded_safetensors(folder, stem, specs, read, metadata, max_shard_bytes, progress=None):
    """Write `{stem}.safetensors`, or shards and their index where the tensors take more than `max_shard_bytes`.

    Returns dict name -> CRC-32 of its bytes. `folder` (Path) is made; `specs`, `read`, `metadata` and `progress` are
    those of write_safetensors, `metadata` goes into every shard. A shard holds at most `max_shard_bytes` of tensors, or
    one larger tensor. The shards are `{stem}-00001-of-0000N.safetensors`, the index `{stem}.safetensors.index.json`.

    Called again after it was cut short it keeps the finished shards, those whose header is byte for byte what it would
    write, and tells `progress` of their bytes. So `metadata` must hold a fingerprint of the source and of all options,
    else data of another source pass for these. An older checkpoint of the same stem stays whole until the new one is:
    shards of the same names wait hidden beside it, then the two are exchanged.
    Raises MindSigmaError as write_safetensors and `exchange` do; finished shards then stay.
    """
    specs = checked_specs(folder / f"{stem}.safetensors", specs, NAMES, "safetensors")
    shards = _split(stem, specs, max_shard_bytes)
    crcs, arriving = {}, {}
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    index = f"{stem}{INDEX}"
    current = {*shards, index} if len(shards) > 1 else set(shards)
    check_places(folder, current)
    for name, part in shards.items():
        target = folder / name
        written = written_crcs(target, part, metadata, progress)
        if written is None and os.path.lexists(target):
            arriving[name] = f".{name}.staged"
            target = folder / arriving[name]
            written = written_crcs(target, part, metadata, progress)
        crcs.update(written or write_safetensors(target, part, read, metadata, progress))
    if index in current:
        arriving[index] = f".{index}.staged"
        _write_index(folder / arriving[index], shards)
    stale = older_weights(folder, current)
    exchange(folder, arriving, [name for name in stale if name not in arriving.values()])
    return {spec.name: crcs[spec.name] for spec in specs}


def check_sharded(path, stem, specs, metadata, max_shard_bytes):
    """Names of the files that write_sharded_safetensors writes; raises what it refuses before it does.

    `path` is for messages.
    """
    shards = _split(stem, checked_specs(path, specs, NAMES, "safetensors"), max_shard_bytes)
    for part in shards.values():
        check_safetensors(path, part, metadata)
    return [*shards, f"{stem}{INDEX}"] if len(shards) > 1 else list(shards)


def check_room(folder, stem):
    """Raise MindSigmaError where weights of another stem in `folder` would be taken for those to be written there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        usual = entry.name.endswith(".safetensors") and entry.name.split(".")[0] in USUAL_STEMS
        if (usual or entry.name.endswith(INDEX)) and entry.name.split(".")[0] != stem:
            raise MindSigmaError(
                f"{entry}: would stand beside the new {stem}.safetensors; remove it, or give another target"
            )


def older_weights(folder, names):
    """list of the files in `folder` that belong to other weights of the stems that `names` have.

    Args:
        folder: Path; it may be absent.
        names: of the new files; of those that are weights the stem is taken.
    """
    stems = {re.sub(SHARD + "$", "", name) for name in names if name.endswith(".safetensors")}
    found = os.listdir(folder) if folder.is_dir() and not folder.is_symlink() else ()
    parts = [rf"{re.escape(stem)}({SHARD}|{re.escape(INDEX)})" for stem in stems]
    ours = re.compile("|".join(rf"{part}|\.{part}\.staged" for part in parts) or r"(?!)")
    return sorted(name for name in found if name not in names and ours.fullmatch(name))


def _split(stem, specs, limit):
    """dict file name -> list of TensorSpec, filled in order."""
    parts, room = [], -1
    for spec in specs:
        if spec.nbytes > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(spec)
        room -= spec.nbytes
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_index(index, shards):
    places = {spec.name: name for name, part in shards.items() for spec in part}
    total = sum(spec.nbytes for part in shards.values() for spec in part)
    table = {"metadata": {"total_size": total}, "weight_map": places}
    with replacing(index) as file:
        file.write(json.dumps(table, indent=2, ensure_ascii=False).encode() + b"\n")

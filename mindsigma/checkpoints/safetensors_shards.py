"""Safetensors in shards with the Hugging Face index, resumed where a killed run stopped."""

import json
import os
import re
import shutil

from mindsigma.checkpoints.atomic import naming, replacing
from mindsigma.checkpoints.safetensors_writer import NAMES, write_safetensors, written_crcs
from mindsigma.checkpoints.tensor_stream import checked_specs
from mindsigma.checkpoints.weight_files import USUAL_STEMS
from mindsigma.errors import MindSigmaError

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
    shards of the same names wait hidden beside it, the old index goes right before they move in, the new index is
    written last, then what is left of the old one is removed.
    Raises MindSigmaError as write_safetensors does; finished shards then stay.
    """
    specs = checked_specs(folder / f"{stem}.safetensors", specs, NAMES, "safetensors")
    shards = _split(stem, specs, max_shard_bytes)
    index, crcs, waiting = folder / f"{stem}.safetensors.index.json", {}, []
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, part in shards.items():
        target = folder / name
        staged = folder / f".{name}.staged"
        written = written_crcs(target, part, metadata, progress)
        if written is None and len(shards) > 1 and target.exists():
            waiting.append((staged, target))
            written = written_crcs(staged, part, metadata, progress)
            target = staged
        crcs.update(written or write_safetensors(target, part, read, metadata, progress))
    with naming(index if len(shards) > 1 else folder / next(iter(shards))):
        if waiting:
            index.unlink(missing_ok=True)
        for staged, target in waiting:
            os.replace(staged, target)
        if len(shards) > 1:
            _write_index(index, shards)
        _remove_stale(folder, stem, {*shards, index.name} if len(shards) > 1 else set(shards))
    return {spec.name: crcs[spec.name] for spec in specs}


def check_room(folder, stem):
    """Raise MindSigmaError where weights of another stem in `folder` would be taken for those to be written there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        usual = entry.name.endswith(".safetensors") and entry.name.split(".")[0] in USUAL_STEMS
        if (usual or entry.name.endswith(INDEX)) and entry.name.split(".")[0] != stem:
            raise MindSigmaError(
                f"{entry}: would stand beside the new {stem}.safetensors; remove it, or give another target"
            )


def move_in(folder, target):
    """Move all files below `folder` to the same places below `target`, which exists, and remove `folder`.

    Weights that they replace go first, and an index comes last, so that at no instant a mixture can be read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for file in files:
        if file.name.endswith(".safetensors"):
            place = target / file.parent.relative_to(folder)
            if place.is_dir():
                _remove_stale(place, re.sub(SHARD, "", file.name), set())
    for file in sorted(files, key=lambda path: path.name.endswith(INDEX)):
        place = target / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    shutil.rmtree(folder)


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


def _remove_stale(folder, stem, current):
    """Files of an older checkpoint of this stem: the index first, so that none is left that lists absent shards."""
    shard = re.escape(stem) + SHARD
    ours = re.compile(rf"{shard}|{re.escape(stem)}\.safetensors\.index\.json|\.{shard}\.staged")
    stale = [entry for entry in folder.iterdir() if ours.fullmatch(entry.name) and entry.name not in current]
    for entry in sorted(stale, key=lambda entry: not entry.name.endswith(".json")):
        entry.unlink()

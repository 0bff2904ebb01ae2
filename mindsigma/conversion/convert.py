"""Writes prepared components to disk, once and whole, and proves what was written."""

import hashlib
import json
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from mindsigma.checkpoints.atomic import copy_file, naming, write_json
from mindsigma.checkpoints.mindspore_writer import write_mindspore_ckpt
from mindsigma.checkpoints.safetensors_shards import check_room, move_in, write_sharded_safetensors
from mindsigma.checkpoints.safetensors_writer import write_safetensors
from mindsigma.checkpoints.tensor_stream import TensorSpec, checksum
from mindsigma.checkpoints.torch_writer import write_torch
from mindsigma.conversion.component import open_component
from mindsigma.conversion.foreign_configs import SCHEDULER, model_index, tokenizer_config
from mindsigma.conversion.targets import STEMS, target_folder
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.saving import remove_stale_tokenizer
from mindsigma.pipeline.text import TOKENIZER_FILES

MARKER, STAGING = ".converting", ".converting.new"
MAX_SHARD_BYTES = 10 * 10**9


def specs_of(view):
    """TensorSpec of each tensor of a view."""
    return [TensorSpec(name, view.dtype(name), tuple(view.shape(name))) for name in view.names()]


def size_of(view):
    """Bytes of all tensors of a view."""
    return sum(spec.nbytes for spec in specs_of(view))


def fingerprint(outputs, target):
    """What a conversion is about, as a text: names, shapes, dtypes, sources; equal for the same conversion only."""
    digest = hashlib.sha256(target.encode())
    for output in outputs:
        component = output.component
        files = [file for source in component.inputs for file in _weight_files(source)]
        state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        tensors = [[spec.name, str(spec.dtype), list(spec.shape)] for spec in specs_of(output.view)]
        digest.update(json.dumps([state, tensors, component.record]).encode())
    return digest.hexdigest()


def _weight_files(path):
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


@contextmanager
def _folder(root, identity, overwrite):
    """The folder to write to: `root` where it is new, empty or left unfinished by the same conversion, else one in it.

    What was written in a folder of its own moves in at the end, so that what stands at `root` stays whole until all of
    the new is. A marker lets the same conversion go on after a kill or an interrupt; an error removes what was written,
    unless a conversion was being gone on with.
    """
    with naming(root):
        fresh = not root.exists() or not any(root.iterdir()) or _unfinished(root, identity)
        if not fresh and not overwrite:
            raise MindSigmaError(f"{root}: is not empty; give another target, or --overwrite")
        place = root if fresh else root / STAGING
        resumed, moving = _unfinished(place, identity), False
        if not fresh and place.exists() and not resumed:
            shutil.rmtree(place)
        made = next((folder for folder in [*reversed(place.parents), place] if not folder.exists()), None)
    try:
        with naming(root):
            place.mkdir(parents=True, exist_ok=True)
            (place / MARKER).write_text(identity, encoding="utf-8")
            yield place
            (place / MARKER).unlink()
            if not fresh:
                moving = True
                move_in(place, root)
                (root / MARKER).unlink(missing_ok=True)
    except Exception:
        if not resumed and not moving:
            _clear(place, made)
        raise


def _clear(place, made):
    """Empty a folder that was empty, and remove it and those above it up to `made`, the first that was not there."""
    for entry in place.iterdir() if place.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in [place, *place.parents] if made else ():
        with suppress(OSError):  # somebody else's file has come
            folder.rmdir()
        if folder == made:
            break


def _unfinished(folder, identity):
    marker = folder / MARKER
    return marker.is_file() and marker.read_bytes() == identity.encode()


def check_target(target_path, source_path):
    """Raise if the target is the source, or one lies inside the other."""
    try:
        one, two = Path(target_path).resolve(), Path(source_path).resolve()
        same = one.exists() and one.samefile(two)
    except (OSError, RuntimeError):
        raise MindSigmaError(f"{target_path}: cannot be resolved; is a symlink a loop?") from None
    if same or one == two or two in one.parents or (two.is_dir() and one in two.parents):
        raise MindSigmaError(f"{target_path}: is the source, or they lie in each other; give another target")


def write(outputs, root, target, tokenizer=None, overwrite=False, shard_bytes=MAX_SHARD_BYTES, progress=None):
    """Write Outputs (targets.prepare) and return the path of each.

    Args:
        root: a `.ckpt` or `.safetensors` file for one component of "mindspore", a `.pth` file for "official", else a
            folder.
        tokenizer: folder whose spiece.model, tokenizer.json go along with a pipeline.
        overwrite: replace what is there.
        progress: called with each number of bytes written.
    """
    root = Path(root)
    if target == "official" or root.suffix in (".ckpt", ".safetensors", ".pth"):
        return [_write_file(outputs, root, target, overwrite, progress)]
    identity = fingerprint(outputs, target)
    whole = len(outputs) > 1 or tokenizer is not None
    with naming(root):
        for kind in [output.component.kind for output in outputs] if overwrite else ():
            check_room(target_folder(root, target, kind, whole), STEMS[target][kind])
    with _folder(root, identity, overwrite) as place:
        for output in outputs:
            folder = target_folder(place, target, output.component.kind, whole)
            folder.mkdir(parents=True, exist_ok=True)
            metadata = {**output.metadata, "fingerprint": identity}
            write_sharded_safetensors(
                folder,
                STEMS[target][output.component.kind],
                specs_of(output.view),
                output.view.read,
                metadata,
                shard_bytes,
                progress,
            )
            write_json(folder / "config.json", output.config)
        if whole:
            written = _write_pipeline_files(place, target, tokenizer)
    if whole:
        remove_stale_tokenizer(root / "tokenizer", written)
    return [target_folder(root, target, output.component.kind, whole) for output in outputs]


def _write_file(outputs, path, target, overwrite, progress):
    if len(outputs) != 1:
        raise MindSigmaError(f"{path}: one file holds one network; choose with --component, or give a folder")
    if path.exists() and not overwrite:
        raise MindSigmaError(f"{path}: exists; give another target, or --overwrite")
    suffix = {"official": (".pth",), "mindspore": (".ckpt", ".safetensors"), "diffusers": ()}[target]
    if path.suffix not in suffix:
        raise MindSigmaError(f"{path}: --to {target} writes {' or '.join(suffix) or 'a folder'}")
    output = outputs[0]
    specs, read = specs_of(output.view), output.view.read
    if target == "official":
        write_torch(path, specs, read, progress=progress)
    elif path.suffix == ".ckpt":
        write_mindspore_ckpt(path, specs, read, output.metadata, progress)
    else:
        write_safetensors(path, specs, read, output.metadata, progress=progress)
    return path


def _write_pipeline_files(root, target, tokenizer):
    files = [name for name in TOKENIZER_FILES if tokenizer is not None and (tokenizer / name).exists()]
    for name in files:
        copy_file(tokenizer / name, root / "tokenizer" / name)
    if target == "diffusers":
        write_json(root / "tokenizer" / "tokenizer_config.json", tokenizer_config(files))
        write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(root / "model_index.json", model_index(files))
    return files


def verify(output, path, progress=None):
    """Read a written component back under our names and compare every tensor's bytes with what was to be written.

    Returns the number of tensors compared; raises MindSigmaError that names the first that differs.
    """
    expected = output.component
    stored = {"kv_compression": expected.config.kv_compression} if expected.kind == "dit" else {}
    if expected.kind == "dit":
        stored.update(
            num_heads=expected.config.num_heads,
            input_size=expected.config.input_size,
            pe_interpolation=expected.config.pe_interpolation,
        )
    found = open_component(path, expected.kind, **stored)
    missing = sorted(set(expected.view.names()) ^ set(found.view.names()))
    if missing:
        raise MindSigmaError(f"{path}: tensor '{missing[0]}' is not on both sides")
    for name in expected.view.names():
        one, two = checksum(expected.view.read(name), progress), checksum(found.view.read(name))
        if expected.view.dtype(name) != found.view.dtype(name) or one != two:
            raise MindSigmaError(f"{path}: tensor '{name}' differs from the source; convert again")
    return len(expected.view.names())

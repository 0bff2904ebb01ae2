"""Writes prepared components to disk, once and whole, and proves what was written."""

import hashlib
import json
from pathlib import Path, PurePosixPath

from mindsigma.conversion.component import FOLDERS, open_component
from mindsigma.conversion.foreign_configs import SCHEDULER, model_index, tokenizer_config
from mindsigma.conversion.targets import NUMPY, STEMS, SUBFOLDERS, target_folder
from mindsigma.errors import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.atomic import copy_file, write_json
from mindsigma.weights.formats.exchange import check_file, check_places
from mindsigma.weights.formats.floats import is_float
from mindsigma.weights.formats.folder_writer import check_file_target, check_folder_target, replacing_files
from mindsigma.weights.formats.mindspore_writer import check_mindspore_ckpt, write_mindspore_ckpt
from mindsigma.weights.formats.safetensors_shards import (
    check_room,
    check_sharded,
    older_weights,
    write_sharded_safetensors,
)
from mindsigma.weights.formats.safetensors_writer import check_safetensors, write_safetensors
from mindsigma.weights.formats.tensor_stream import TensorSpec, checksum, fetch
from mindsigma.weights.formats.torch_writer import check_torch, write_torch
from mindsigma.weights.saving import stale_tokenizers
from mindsigma.weights.tokenizer import TOKENIZER_FILES

MAX_SHARD_BYTES = 10 * 10**9
FILE_WRITERS = {  # suffix -> (write, check)
    ".pth": (write_torch, check_torch),
    ".ckpt": (write_mindspore_ckpt, check_mindspore_ckpt),
    ".safetensors": (write_safetensors, check_safetensors),
}
SUFFIXES = {"official": (".pth",), "mindspore": (".ckpt", ".safetensors"), "diffusers": ()}


def specs_of(view):
    """TensorSpec of each tensor of a view."""
    return [TensorSpec(name, view.dtype(name), tuple(view.shape(name))) for name in view.names()]


def size_of(view):
    """Bytes of all tensors of a view."""
    return sum(spec.nbytes for spec in specs_of(view))


def fingerprint(outputs, target, shard_bytes=MAX_SHARD_BYTES):
    """What a conversion is about, as a text: names, shapes, dtypes, sources; equal for the same conversion only."""
    digest = hashlib.sha256(f"{target} {shard_bytes}".encode())
    for output in outputs:
        component = output.component
        files = [file for source in component.inputs for file in _weight_files(source)]
        state = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        tensors = [[spec.name, str(spec.dtype), list(spec.shape)] for spec in specs_of(output.view)]
        digest.update(json.dumps([state, tensors, component.record]).encode())
    return digest.hexdigest()


def _weight_files(path):
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def check_target(target_path, source_path):
    """Raise if the target is the source, or one lies inside the other."""
    try:
        one, two = Path(target_path).resolve(), Path(source_path).resolve()
        same = one.exists() and one.samefile(two)
    except (OSError, RuntimeError):
        raise MindSigmaError(f"{target_path}: cannot be resolved; is a symlink a loop?") from None
    if same or one == two or two in one.parents or one in two.parents:
        raise MindSigmaError(f"{target_path}: is the source, or they lie in each other; give another target")


def check(outputs, root, target, tokenizer=None, overwrite=False, shard_bytes=MAX_SHARD_BYTES):
    """Raise, before a byte is written or moved, whatever of `write` (same arguments) can be told by then."""
    root = Path(root)
    for path in dict.fromkeys(path for output in outputs for path in output.component.inputs):
        check_target(root, path)
    if _is_file(root, target):
        _check_file(outputs, root, target, overwrite)
        return
    check_folder_target(root, overwrite)
    whole = _whole(outputs, tokenizer)
    places = [PurePosixPath(place) for place in _pipeline_files(target, tokenizer)] if whole else []
    for output in outputs:
        kind = output.component.kind
        folder, stem = target_folder("", target, kind, whole), STEMS[target][kind]
        specs, metadata = specs_of(output.view), {**output.metadata, "fingerprint": "0" * 64}
        names = check_sharded(root / folder / f"{stem}.safetensors", stem, specs, metadata, shard_bytes)
        places += [folder / name for name in (*names, "config.json")]
    if not root.is_dir():
        return
    for output in outputs:
        _check_layout(root, output.component.kind, target, whole)
    check_places(root, places)
    for folder in {place.parent for place in places}:
        names = {place.name for place in places if place.parent == folder}
        for name in older_weights(root / folder, names):
            check_file(root / folder / name)
    _check_sources(outputs, root)
    for output in outputs:
        kind = output.component.kind
        check_room(target_folder(root, target, kind, whole), STEMS[target][kind])


def _check_layout(root, kind, target, whole):
    """Raise where a network of another layout stands in the folder, which a reader would find first."""
    own = SUBFOLDERS[target][kind] if whole else None
    other = next((root / name for name in FOLDERS[kind] if name != own and (root / name).exists()), None)
    if other is not None:
        raise MindSigmaError(
            f"{other}: would be read instead of what is to be written; remove it, or give another target"
        )


def _check_sources(outputs, root):
    """Raise where a file that is read lies in the folder that is written to."""
    home = root.resolve()
    for output in outputs:
        for file in (file for path in output.component.inputs for file in _weight_files(path)):
            if home in file.resolve().parents:
                raise MindSigmaError(f"{root}: {file} lies in it, which is read; give another target")


def check_values(outputs, progress=None):
    """Compute every tensor that is to be written, as `write` does; raises where a value does not fit its dtype."""
    for output in outputs:
        for spec in specs_of(output.view):
            fetch(output.component.path, spec, output.view.read)
            if progress:
                progress(spec.nbytes)


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
    check(outputs, root, target, tokenizer, overwrite, shard_bytes)
    if _is_file(root, target):
        view = outputs[0].view
        FILE_WRITERS[root.suffix][0](root, specs_of(view), view.read, outputs[0].metadata, progress)
        return [root]
    identity = fingerprint(outputs, target, shard_bytes)
    whole = _whole(outputs, tokenizer)
    leaving = stale_tokenizers(_tokenizer_files(tokenizer)) if whole else ()
    with replacing_files(root, identity, leaving) as place:
        for output in outputs:
            folder = target_folder(place, target, output.component.kind, whole)
            write_sharded_safetensors(
                folder,
                STEMS[target][output.component.kind],
                specs_of(output.view),
                output.view.read,
                {**output.metadata, "fingerprint": identity},
                shard_bytes,
                progress,
            )
            write_json(folder / "config.json", output.config)
        if whole:
            _write_pipeline_files(place, target, tokenizer)
    return [target_folder(root, target, output.component.kind, whole) for output in outputs]


def _is_file(root, target):
    return target == "official" or root.suffix in FILE_WRITERS


def _whole(outputs, tokenizer):
    return len(outputs) > 1 or tokenizer is not None


def _check_file(outputs, path, target, overwrite):
    if len(outputs) != 1:
        raise MindSigmaError(f"{path}: one file holds one network; choose with --component, or give a folder")
    if path.suffix not in SUFFIXES[target]:
        raise MindSigmaError(f"{path}: --to {target} writes {' or '.join(SUFFIXES[target]) or 'a folder'}")
    check_file_target(path, overwrite)
    FILE_WRITERS[path.suffix][1](path, specs_of(outputs[0].view), outputs[0].metadata)


def _tokenizer_files(tokenizer):
    """Names of the files of a tokenizer's folder, or None, that go along."""
    return [name for name in TOKENIZER_FILES if tokenizer is not None and (tokenizer / name).exists()]


def _pipeline_files(target, tokenizer):
    """Places of what `_write_pipeline_files` writes."""
    places = [f"tokenizer/{name}" for name in _tokenizer_files(tokenizer)]
    if target == "diffusers":
        places += ["tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json", "model_index.json"]
    return places


def _write_pipeline_files(root, target, tokenizer):
    files = _tokenizer_files(tokenizer)
    for name in files:
        copy_file(tokenizer / name, root / "tokenizer" / name)
    if target == "diffusers":
        write_json(root / "tokenizer" / "tokenizer_config.json", tokenizer_config(files))
        write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
        write_json(root / "model_index.json", model_index(files))


def verify(output, path, dtype=None, progress=None):
    """Read a written component back and compare it with what was promised.

    Under the target's names: the tensors, their shapes, their dtypes, and `dtype` ("fp32", "fp16", "bf16") for all of
    them, where it was asked for. Under our names: every tensor's bytes.

    Returns the number of tensors compared; raises MindSigmaError that names the first that differs.
    """
    _verify_file(output, open_checkpoint(path), None if dtype is None else NUMPY[dtype])
    count = _verify_component(output.component, path, progress)
    return count + (_verify_component(output.beside, path, progress) if output.beside else 0)


def _verify_component(expected, path, progress):
    """Compare the network of this kind in a file or folder with a Component; returns the number of its tensors."""
    stored = {"kv_compression": expected.config.kv_compression} if expected.kind == "dit" else {}
    if expected.kind == "controlnet":
        stored["num_heads"] = expected.config.num_heads
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


def _verify_file(output, found, dtype):
    """Names, shapes and dtypes of a TensorSource, as it stands in the file."""
    missing = sorted(set(output.view.names()) ^ set(found.names()))
    if missing:
        raise MindSigmaError(f"{found.path}: tensor '{missing[0]}' is not on both sides")
    for name, promised, shape in specs_of(output.view):
        if dtype is not None and is_float(promised):
            promised = dtype
        if found.dtype(name) != promised or found.shape(name) != shape:
            raise MindSigmaError(
                f"{found.path}: tensor '{name}' is {found.dtype(name)} {found.shape(name)}, promised was "
                f"{promised} {shape}; convert again"
            )

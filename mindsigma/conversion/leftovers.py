"""What a source holds and a translation of it does not take along, in words."""

from mindsigma.checkpoints import open_checkpoint
from mindsigma.checkpoints.prefixes import TELLING, WHAT, find_part
from mindsigma.checkpoints.weight_files import find_weights, read_index
from mindsigma.errors import one_line

MADE_ANEW = ("model_index.json", "scheduler", "config.json", "README.md", ".gitattributes", ".git", ".cache")
SHOWN = 3


def left_out(path, parts, wanted, tokenizer):
    """list[str]: networks, tensors and files of a source that go nowhere.

    Args:
        path: of the source, a file or folder.
        parts: paths of the networks found in it.
        wanted: kinds of those that are taken.
        tokenizer: folder of the tokenizer that is taken, or None.
    """
    if path.is_dir() and path not in parts:
        return _of_pipeline(path, parts, tokenizer)
    return _of_file(path, wanted) + (_of_folder(path) if path.is_dir() else [])


def _of_file(path, wanted):
    source = open_checkpoint(path)
    names, told = dict.fromkeys(source.names()), []
    for kind in TELLING:
        part = find_part(path, source.names(), kind) if kind in wanted else None
        for name in part.names.values() if part else ():
            names.pop(name, None)
    for kind in TELLING:
        if kind not in wanted and (part := find_part(path, list(names), kind)):
            told.append(f"the {WHAT[kind]}, {len(part.names)} tensors '{one_line(part.prefix)}...'")
            for name in part.names.values():
                names.pop(name, None)
    return told + _counted("tensors of no network", list(names))


def _of_folder(folder):
    """Weight files beside those that are read."""
    weights = find_weights(folder)
    taken = {weights.file.name, *(file.name for file in weights.shards)}
    if weights.file.suffix == ".json":
        taken |= set(read_index(weights.file).values())
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in (*taken, *MADE_ANEW))
    return _counted(f"files of {folder.name}/", names)


def _of_pipeline(path, parts, tokenizer):
    folders = [part.name for part in parts] + (["tokenizer"] if tokenizer is not None else [])
    names = [entry.name + "/" * entry.is_dir() for entry in path.iterdir() if entry.name not in (*folders, *MADE_ANEW)]
    told = _counted("beside the networks", sorted(names))
    for part in parts:
        told += _of_folder(part)
    return told


def _counted(what, names):
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(one_line(name, 60) for name in names[:SHOWN])}{more}"]

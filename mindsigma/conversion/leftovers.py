"""What a source holds and a translation of it does not take along, in words."""

from mindsigma.conversion.foreign_configs import SCHEDULER
from mindsigma.errors import one_line
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.weight_files import find_weights, read_index
from mindsigma.weights.locate import read_json
from mindsigma.weights.names.prefixes import TELLING, WHAT, find_part
from mindsigma.weights.tokenizer import TOKENIZER_FILES

# What every target has of its own.
MADE_ANEW = ("model_index.json", "scheduler", "config.json", "tokenizer_config.json")
SHOWN = 3


def left_out(path, parts, wanted, tokenizer, ema=False):
    """list[str]: networks, tensors, settings and files of a source that go nowhere.

    Args:
        path: of the source, a file or folder.
        parts: dict kind -> path of each network found in it.
        wanted: kinds of those that are taken.
        tokenizer: folder of the tokenizer that is taken, or None.
        ema: whether averaged weights are taken.
    """
    if path not in parts.values():
        return _of_pipeline(path, parts, tokenizer, ema)
    return _of_file(path, wanted, ema) + (_of_folder(path, ema) if path.is_dir() else [])


def _of_file(path, wanted, ema):
    source = open_checkpoint(path, ema)
    names, told = source.names(), []
    left, ema = dict.fromkeys(names), ema and not source.averaged
    for kind in TELLING:
        part = find_part(path, names, kind, ema and kind == "dit") if kind in wanted else None
        for name in part.names.values() if part else ():
            left.pop(name, None)
    for kind in TELLING:
        part = find_part(path, list(left), kind) if kind not in wanted else None
        if part:
            told.append(f"the {WHAT[kind]}, {len(part.names)} tensors '{one_line(part.prefix, 60)}...'")
            for name in part.names.values():
                left.pop(name)
    told += _counted("tensors", list(left)) + _counted("entries beside the state dict", source.beside)
    if source.metadata.get("format") != "mindsigma":
        told += _counted("texts of the header", [key for key in source.metadata if key != "format"])
    return told


def _of_folder(folder, ema=False):
    """Files beside the weights that are read."""
    weights = find_weights(folder, ema)
    taken = {weights.file.name}
    if weights.file.suffix == ".json":
        taken |= set(read_index(weights.file).values())
    return _counted(f"files of {folder.name}/", _names(folder, taken))


def _of_pipeline(path, parts, tokenizer, ema):
    folders = [part.name for part in parts.values()]
    told = _counted("beside the networks", _names(path, [*folders, *["tokenizer"] * (tokenizer is not None)]))
    for kind, part in parts.items():
        told += _of_folder(part, ema and kind == "dit")
    if tokenizer is not None:
        told += _counted("files of tokenizer/", _names(tokenizer, TOKENIZER_FILES))
    return told + _of_scheduler(path / "scheduler" / "scheduler_config.json")


def _of_scheduler(file):
    """Settings of sampling that are not those which a target gets, and which sampling here has."""
    if not file.is_file():
        return []
    theirs = read_json(file)
    odd = [key for key, own in SCHEDULER.items() if key[1:] != "diffusers_version" and theirs.get(key, own) != own]
    texts = [f"{key} {one_line(repr(theirs[key]), 40)} (here {SCHEDULER[key]!r})" for key in odd]
    return _counted("settings of the scheduler", texts)


def _names(folder, taken):
    """What a folder holds beside what is taken or made anew; of folders with a slash."""
    entries = [entry for entry in folder.iterdir() if entry.name not in (*taken, *MADE_ANEW)]
    return sorted(entry.name + "/" * entry.is_dir() for entry in entries if not entry.name.startswith("."))


def _counted(what, names):
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"{len(names)} {what}: {', '.join(one_line(name, 80) for name in names[:SHOWN])}{more}"]

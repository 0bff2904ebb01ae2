"""What a weight file or folder holds, in words: kind, config, tensors, dtypes, texts of its header, training step."""

import json
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path

from mindsigma.conversion.component import open_source
from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights import open_checkpoint
from mindsigma.weights.adapters.adapter_reader import is_adapter, open_adapter, ranks_text
from mindsigma.weights.locate import locate, meant_of_run, read_json
from mindsigma.weights.names.prefixes import kinds_in

WHAT = {"dit": "DiT", "vae": "VAE", "t5": "T5 encoder", "controlnet": "ControlNet"}
LONGEST_TEXT = 300  # characters of a text of a header
SHOWN = 12  # texts of a header, names of tensors


def inspect(name_or_path):
    """list[str] about a path, bundled or released name or hub id; no weight is read. Raises MindSigmaError."""
    path = locate(name_or_path)
    if (path / "checkpoints").is_dir():
        raise MindSigmaError(f"{path}: holds no weights itself{meant_of_run(path)}")
    if is_adapter(path):
        return [f"file     {path}", *_adapter(path), *_training(path)]
    try:
        source = open_source(name_or_path)
    except MindSigmaError as error:
        return [f"file     {path}", *_bare(path, error), *_training(path)]
    lines = [f"file     {source.path}"]
    for component in source.components:
        lines += ["", f"{WHAT[component.kind]}, {component.path}", *_component(component), *_training(component.path)]
    if source.tokenizer is not None:
        lines += ["", f"tokenizer, {source.tokenizer}"]
    return lines + [f"also     {line}" for line in source.left]


def _adapter(path):
    opened = open_adapter(path)
    adapter = opened.adapter
    kind = ("DoRA" if adapter.dora else "LoRA") + (", rank-stabilised" if adapter.rslora else "")
    scales = sorted({round(entry.scale, 6) for entry in adapter.entries.values()})
    lines = [
        f"kind     {kind}, an adapter of a DiT: {ranks_text(adapter)}, {len(adapter.entries)} modules",
        f"scale    {', '.join(f'{scale:g}' for scale in scales[:SHOWN])}",
        f"modules  {_some(adapter.entries)}",
    ]
    lines += [f"note     {line}" for line in adapter.record]
    return lines + ([f"left     {_some(opened.dropped)}"] if opened.dropped else [])


def _bare(path, error):
    """Lines about weights that make no network as they are, for the reason `error`; raises if there are none."""
    source = open_checkpoint(path)
    kinds = ", ".join(WHAT[kind] for kind in kinds_in(source.names()))
    first = f"  names    {_some(source.names())}"
    return [kinds or "no network that is known here", *_tensors(source), first, *_texts(source), f"  note     {error}"]


def _tensors(view):
    """Lines about number, size and dtypes of tensors."""
    names = view.names()
    numbers = {name: prod(view.shape(name)) for name in names}
    dtypes = Counter()
    for name in names:
        dtypes[str(view.dtype(name))] += numbers[name]
    total = sum(numbers[name] * view.dtype(name).itemsize for name in names)
    return [
        f"  tensors  {len(names)}, {sum(numbers.values()):,} numbers, {total / 1e9:.3f} GB",
        f"  dtype    {', '.join(f'{name} ({count:,} numbers)' for name, count in dtypes.most_common())}",
    ]


def _component(component):
    """Lines about one network."""
    lines = _tensors(component.view)
    config = asdict(component.config)
    lines += [f"  config   {key}: {one_line(json.dumps(value, default=str), 200)}" for key, value in config.items()]
    lines += [f"  note     {line}" for line in component.record]
    if component.dropped:
        lines.append(f"  ignored  {_some(component.dropped)}")
    return lines + _texts(open_checkpoint(component.path))


def _texts(source):
    """Lines about the texts of a header, and about what a PyTorch file holds beside its weights, as epoch and step."""
    texts = [(key, value) for key, value in source.metadata.items() if key != "config"]
    lines = [f"  header   {one_line(key, 60)}: {one_line(value, LONGEST_TEXT)}" for key, value in texts[:SHOWN]]
    if len(texts) > SHOWN:
        lines.append(f"  header   and {len(texts) - SHOWN} more texts")
    entries = list(source.extra.items())[:SHOWN]
    return lines + [f"  entry    {one_line(key, 60)}: {one_line(value)}" for key, value in entries]


def _training(path):
    """Lines about the run that a checkpoint's folder belongs to, from the state.json that lies above it."""
    for folder in (Path(path), Path(path).parent):
        file = folder / "state.json"
        if file.is_file():
            try:
                state = read_json(file)
            except MindSigmaError as error:
                return [f"  training {error}"]
            identity = state.get("identity") if isinstance(state.get("identity"), dict) else {}
            told = {"step": state.get("step"), "validation_loss": state.get("validation_loss")}
            told.update((key, identity.get(key)) for key in ("batch", "optimizer", "learning_rate", "resolution"))
            texts = [f"{key} {one_line(value, 40)}" for key, value in told.items() if value is not None]
            return [f"  training {', '.join(texts)}"] if texts else []
    return []


def _some(names):
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)}: {', '.join(one_line(name, 60) for name in names[:SHOWN])}{more}"

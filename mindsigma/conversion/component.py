"""What a source holds: its networks, each as a view under our names with its config and what was left out."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, List, Optional

from mindsigma.checkpoints import open_checkpoint
from mindsigma.checkpoints.dit_names import NULL_CAPTION, stored_null_caption
from mindsigma.checkpoints.reader import file_in_folder
from mindsigma.checkpoints.views import Extended
from mindsigma.errors import MindSigmaError
from mindsigma.pipeline.loading import open_dit, open_t5, open_vae
from mindsigma.pipeline.locate import locate
from mindsigma.pipeline.text import TOKENIZER_FILES, Tokenizer

FOLDERS = {"dit": ("dit", "transformer"), "vae": ("vae",), "t5": ("text_encoder",)}


# A name that only one kind of network has, under each of its namings.
TELLING = {
    "dit": ("x_embedder.proj.weight", "pos_embed.proj.weight"),
    "vae": ("decoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"),
    "t5": ("encoder.final_layer_norm.weight",),
}


@dataclass
class Component:
    """One network of a source.

    Attributes:
        kind: "dit", "vae" or "t5".
        view: its tensors under our names; a DiT's null caption among them, if the source has one.
        config: DiTConfig, VAEConfig or T5Config.
        path: where it came from.
        dropped: names of the source that are knowingly left out.
        made: our names that no source holds.
        record: what was changed on the way, in words.
        inputs: paths that the tensors come from; of a merged network several.
    """

    kind: str
    view: Any
    config: Any
    path: Path
    dropped: List[str] = field(default_factory=list)
    made: List[str] = field(default_factory=list)
    record: List[str] = field(default_factory=list)
    inputs: List[Path] = field(default_factory=list)

    def changed(self, text, **fields):
        """A copy with fields replaced and a line added to the record."""
        return replace(self, record=[*self.record, text], **fields)


@dataclass
class Source:
    """Everything that a path holds: components, and the tokenizer's folder if it has one."""

    path: Path
    components: List[Component]
    tokenizer: Optional[Path] = None


def open_component(path, kind, ema=False, **config):
    """Open one network of a weight file or folder; `config` overrides what a DiT's file does not tell."""
    if kind == "dit":
        pending = open_dit(path, "fp32", ema, "math", **config)
    else:
        pending = (open_vae if kind == "vae" else open_t5)(path, "fp32", "math")
    tensors = pending.tensors
    view, dropped = tensors, tensors.dropped
    stored = stored_null_caption(tensors.source) if kind == "dit" else None
    if stored is not None:
        view = Extended(tensors, {NULL_CAPTION: tensors.source.read(stored)})
        dropped = [name for name in dropped if name != stored]
    return Component(kind, view, pending.config, Path(path), list(dropped), inputs=[Path(path)])


def kind_of(path):
    """Kind of the network in a weight file or in a folder without subfolders for its parts."""
    source = open_checkpoint(path)
    for kind, names in TELLING.items():
        if any(name in source for name in names):
            return kind
    raise MindSigmaError(
        f"{path}: holds no DiT, VAE or T5 that is known here; its first tensor is {source.names()[:1]}"
    )


def open_source(name_or_path, component=None, ema=False, **config):
    """Open a weight file, the folder of one network or of a whole pipeline, a bundled or released name or a hub id.

    Args:
        component: "dit", "vae" or "t5": that part alone, and of a hub id no more than that is fetched; "pipeline" or
            None: all there is.
        ema: averaged weights of an official training checkpoint.
        config: DiTConfig fields the DiT's file does not tell.
    """
    path = locate(name_or_path, FOLDERS.get(component))
    found = _parts_of(path)
    wanted = [kind for kind in found if component in (None, "pipeline", kind)]
    if not wanted:
        raise MindSigmaError(f"{path}: holds no {component}; it holds {', '.join(found)}")
    components = [
        open_component(found[kind], kind, ema, **config) if kind == "dit" else open_component(found[kind], kind)
        for kind in wanted
    ]
    return Source(path, components, _tokenizer(path / "tokenizer"))


def _tokenizer(folder):
    """The folder, if it holds a tokenizer, which must be sound; else None."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            Tokenizer(file_in_folder(folder, name))
    return folder


def _parts_of(path):
    """dict kind -> path of its weights."""
    if path.is_dir():
        parts = {kind: path / name for kind, names in FOLDERS.items() for name in names if (path / name).is_dir()}
        if parts:
            return parts
    return {kind_of(path): path}

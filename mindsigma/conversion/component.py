"""What a source holds: its networks, each as a view under our names with its config and what was left out."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Optional

from mindsigma.conversion.leftovers import left_out
from mindsigma.errors import MindSigmaError
from mindsigma.weights import open_checkpoint
from mindsigma.weights.formats.floats import computed_dtype, is_float8
from mindsigma.weights.formats.weight_files import file_in_folder
from mindsigma.weights.loading import digest_of_base, open_controlnet, open_dit, open_t5, open_vae
from mindsigma.weights.locate import DIT_FOLDERS, EMA_FOLDERS, dit_folders, locate
from mindsigma.weights.names.dit_names import NULL_CAPTION, stored_null_caption
from mindsigma.weights.names.prefixes import kinds_in
from mindsigma.weights.names.views import Extended
from mindsigma.weights.tokenizer import TOKENIZER_FILES, Tokenizer

FOLDERS = {"dit": DIT_FOLDERS, "vae": ("vae",), "t5": ("text_encoder",), "controlnet": ("controlnet",)}
OPENERS = {"vae": open_vae, "t5": open_t5, "controlnet": open_controlnet}


@dataclass
class Component:
    """One network of a source.

    Attributes:
        kind: "dit", "vae", "t5" or "controlnet".
        view: its tensors under our names; a DiT's null caption among them, if the source has one.
        config: DiTConfig, VAEConfig, T5Config or ControlNetConfig.
        path: where it came from.
        dropped: names of the source that are knowingly left out.
        made: our names that no source holds.
        record: what was changed on the way, in words.
        inputs: paths that the tensors come from; of a merged network several.
        sampling: fields of SamplingOptions that a distilled DiT tells of itself.
    """

    kind: str
    view: Any
    config: Any
    path: Path
    dropped: List[str] = field(default_factory=list)
    made: List[str] = field(default_factory=list)
    record: List[str] = field(default_factory=list)
    inputs: List[Path] = field(default_factory=list)
    sampling: Dict[str, Any] = field(default_factory=dict)

    def changed(self, text, **fields):
        """A copy with fields replaced and a line added to the record."""
        return replace(self, record=[*self.record, text], **fields)

    @property
    def computed_dtype(self):
        """NumPy dtype for tensors that are made for this network."""
        return computed_dtype(self.view.dtype("x_embedder.proj.weight"))

    @property
    def float8(self):
        """Whether some weights are float8, which cannot hold what is computed from them."""
        return any(is_float8(self.view.dtype(name)) for name in self.view.names())


@dataclass
class Source:
    """Everything that a path holds: components, the tokenizer's folder if it has one, and the names of what is left."""

    path: Path
    components: List[Component]
    tokenizer: Optional[Path] = None
    left: List[str] = field(default_factory=list)


def open_component(path, kind, ema=False, **config):
    """Open one network of a weight file or folder; `config` overrides what a DiT's or ControlNet's does not tell."""
    if kind == "dit":
        pending = open_dit(path, "fp32", ema, **config)
    else:
        pending = OPENERS[kind](path, "fp32", **config)
    tensors = pending.tensors
    view, dropped = tensors, tensors.dropped
    stored = stored_null_caption(tensors.source) if kind == "dit" else None
    if stored is not None:
        view = Extended(tensors, {NULL_CAPTION: tensors.source.read(stored)})
        dropped = [name for name in dropped if name != stored]
    source = tensors.source
    record = list(pending.notes)
    if source.scaled:
        record.append(f"scaled float8: {len(source.scaled)} weights times their scales, float32")
    dropped = [*dropped, *source.left_out]
    inputs = [Path(path)]
    return Component(kind, view, pending.config, Path(path), dropped, [], record, inputs, dict(pending.sampling))


def kinds_of(path, ema=False):
    """list of the kinds of network in a weight file, or in a folder without subfolders for its parts."""
    source = open_checkpoint(path, ema)
    found = kinds_in(source.names())
    if not found:
        raise MindSigmaError(
            f"{path}: holds no DiT, VAE, T5 or ControlNet that is known here; its first tensor is {source.names()[:1]}"
        )
    return found


def open_source(name_or_path, component=None, ema=False, **config):
    """Open a weight file, the folder of one network or of a whole pipeline, a bundled or released name or a hub id.

    Args:
        component: "dit", "vae", "t5" or "controlnet": that part alone, and of a hub id no more than that is fetched;
            "pipeline" or None: all there is.
        ema: averaged weights of an official training checkpoint.
        config: DiTConfig fields the DiT's file does not tell.
    """
    path = locate(name_or_path, FOLDERS.get(component))
    found = _parts_of(path, ema and component in (None, "pipeline", "dit"))
    wanted = [kind for kind in found if component in (None, "pipeline", kind)]
    if not wanted:
        raise MindSigmaError(f"{path}: holds no {component}; it holds {', '.join(found)}")
    heads = {"num_heads": config["num_heads"]} if "num_heads" in config else {}
    given = {"dit": config, "controlnet": heads}
    components = [open_component(found[kind], kind, kind == "dit" and ema, **given.get(kind, {})) for kind in wanted]
    if "dit" in wanted and found["dit"].name in EMA_FOLDERS and found["dit"] != path and not ema:
        i = wanted.index("dit")
        components[i] = components[i].changed(f"only averaged (EMA) weights are there: {found['dit'].name}")
    tokenizer = _tokenizer(path / "tokenizer")
    return Source(path, components, tokenizer, left_out(path, found, wanted, tokenizer, ema))


def adapted_copies(path, name_or_path, **config):
    """Source of a ControlNet that is an adapter's file and the first blocks of a base, which it does not hold.

    `name_or_path`, `config`: of the base, see open_source. Raises MindSigmaError.
    """
    if name_or_path is None:
        raise MindSigmaError(
            f"{path}: an adapter of a ControlNet, which has only what was learnt; name the model that it was trained "
            "beside (--base MODEL)"
        )
    base = open_dit(locate(name_or_path, FOLDERS["dit"]), "fp32", **config)
    pending = open_controlnet(path, "fp32", base)
    inputs = [Path(path), Path(base.tensors.path)]
    return Source(path, [Component("controlnet", pending.tensors, pending.config, path, [], [], pending.notes, inputs)])


def with_base(components, name_or_path, **config):
    """The Component of a DiT and, after it, those of a ControlNet that was trained beside it. Raises MindSigmaError."""
    base = open_source(name_or_path, "dit", **config).components[0]
    for component in components:
        digest = component.config.base_digest
        if digest and digest != digest_of_base(base.view):
            raise MindSigmaError(
                f"{component.path}: was trained beside another model than {base.path}, or one of another precision; "
                "name that (--base MODEL)"
            )
    return [base, *components]


def _tokenizer(folder):
    """The folder, if it holds a tokenizer, which must be sound; else None."""
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            Tokenizer(file_in_folder(folder, name))
    return folder


def _parts_of(path, ema):
    """dict kind -> path of its weights."""
    if path.is_dir():
        folders = {**FOLDERS, "dit": dit_folders(ema)}
        parts = {}
        for kind, names in folders.items():
            found = next((path / name for name in names if (path / name).is_dir()), None)
            if found is not None:
                parts[kind] = found
        if parts:
            return parts
    return dict.fromkeys(kinds_of(path, ema), path)

"""Networks within a file: the prefixes that wrappers and tools put before names, and files that hold several networks.

Where they come from: DistributedDataParallel and DeepSpeed (`module.`), torch.compile (`_orig_mod.`), FSDP and
activation checkpointing (within names), Lightning (`model.`), ComfyUI and Stable Diffusion files
(`model.diffusion_model.`, `first_stage_model.`, `vae.`, `cond_stage_model.`, `text_encoders.t5xxl.transformer.`),
diffusers' training scripts (`transformer.`, `text_encoder.`), averages (`ema.`, `ema_model.`, `model_ema.`).
"""

from dataclasses import dataclass, field
from typing import Dict, List

from mindsigma.errors import MindSigmaError, one_line
from mindsigma.weights.formats.weight_files import is_averaged

# Names that one kind of network has, under each of its namings, and no other.
TELLING = {
    "dit": ("x_embedder.proj.weight", "pos_embed.proj.weight"),
    "vae": ("decoder.conv_in.weight",),
    "t5": ("encoder.final_layer_norm.weight",),
    "controlnet": (
        "after_proj.0.weight",
        "controlnet.0.after_proj.weight",
        "controlnet_blocks.0.after_proj.weight",
    ),
}
WHAT = {"dit": "DiT", "vae": "VAE", "t5": "T5", "controlnet": "ControlNet"}
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_forward_module", "_checkpoint_wrapped_module")
HOLDERS = (
    "model",
    "base_model",
    "network",
    "net",
    "online_model",
    "wrapped_model",
    "inner_model",
    "student",
    "generator",
)
HOLDERS += ("pipe", "pipeline", "state_dict", "params", "weights")
NETWORKS = (
    "diffusion_model",
    "transformer",
    "dit",
    "denoiser",
    "unet",
    "backbone",
    "pixart",
    "first_stage_model",
    "vae",
)
NETWORKS += ("autoencoder", "text_encoder", "text_encoders", "text_encoder_3", "text_model", "t5xxl", "t5xl", "t5")
NETWORKS += ("cond_stage_model", "conditioner", "embedders", "controlnet")
KNOWN = frozenset(WRAPPERS + HOLDERS + NETWORKS)
COUNTERS = ("decay", "num_updates", "initted", "step")  # of averages, beside their weights
WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # wrappers of single blocks


@dataclass
class Part:
    """One network of a file.

    Attributes:
        kind: "dit", "vae", "t5" or "controlnet".
        prefix: what its names begin with in the file, "" or text that ends with a dot.
        names: dict name without the prefix -> name in the file.
        averaged: whether the prefix says that these are averages (EMA).
        notes: what was assumed.
    """

    kind: str
    prefix: str
    names: Dict[str, str]
    averaged: bool = False
    notes: List[str] = field(default_factory=list)


def kinds_in(names):
    """list of the kinds of network, "dit", "vae", "t5", "controlnet", that tensor names speak of."""
    return [kind for kind in TELLING if _prefixes(names, kind)]


def has_averages(names):
    """Whether a network stands under a prefix that says that it is an average."""
    return any(is_averaged(prefix[:-1]) for kind in TELLING for prefix in _prefixes(names, kind))


def find_part(path, names, kind, ema=False):
    """The Part of a kind in a file, or None.

    Args:
        path: of the file, for messages.
        names: list of all its tensor names.
        ema: take the averaged one of two.

    Raises:
        MindSigmaError: several could be meant, or a name stands there both with and without a wrapper's prefix.
    """
    found = _prefixes(names, kind)
    if not found:
        return None
    averaged = [prefix for prefix in found if is_averaged(prefix[:-1])]
    plain = [prefix for prefix in found if prefix not in averaged]
    pool = (averaged or plain) if ema else (plain or averaged)
    notes = []
    if averaged and not plain and not ema:
        notes.append(f"only averaged (EMA) weights are there: '{one_line(averaged[0], 60)}'")
    known = [prefix for prefix in pool if _is_known(prefix)]
    if len(known or pool) > 1:
        listed = " and ".join(f"'{one_line(prefix, 60)}'" for prefix in (known or pool)[:4])
        raise MindSigmaError(f"{path}: holds several {WHAT[kind]}s, named {listed}; save the one that is meant alone")
    prefix = (known or pool)[0]
    if not known:
        notes.append(f"the {WHAT[kind]} is taken from the names '{one_line(prefix, 60)}'")
    others = tuple(
        other
        for of in TELLING
        for other in _prefixes(names, of)
        if other != prefix and other.startswith(prefix) and (of != kind or other in averaged)
    )
    taken = {}
    for name in names:
        if not name.startswith(prefix) or (others and name.startswith(others)):
            continue
        short = name[len(prefix) :]
        if short in COUNTERS:
            continue
        for wrapper in WITHIN:
            short = short.replace(f".{wrapper}", ".")
        if short in taken:
            raise _clash(path, taken[short], name)
        taken[short] = name
    if prefix:
        twin = next((name for name in names if taken.get(name, name) != name), None)
        if twin is not None:
            raise _clash(path, twin, taken[twin])
    return Part(kind, prefix, taken, is_averaged(prefix[:-1]), notes)


def _prefixes(names, kind):
    """Prefixes under which a kind of network stands, in the order of the names."""
    endings = TELLING[kind]
    found = {}
    for name in names:
        for ending in endings:
            if name.endswith(ending):
                prefix = name[: len(name) - len(ending)]
                if not prefix or prefix.endswith("."):
                    found[prefix] = None
    return list(found)


def _is_known(prefix):
    return all(part in KNOWN or is_averaged(part) or part.isdigit() for part in prefix.split(".")[:-1])


def _clash(path, one, two):
    return MindSigmaError(
        f"{path}: '{one_line(one)}' and '{one_line(two)}' clash: wrapped and plain names of one tensor; "
        "save model.state_dict() of the plain model"
    )

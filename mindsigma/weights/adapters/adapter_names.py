"""Names of adapter tensors elsewhere: which layer of the DiT, and what of it, a key speaks of.

Facts, with where they are written down:
* peft prefixes `base_model.model.`; the official train_pixart_lora_hf.py applies peft to the diffusers transformer
  (target modules to_q, to_k, to_v, to_out.0, proj_in, proj_out, ff.net.0.proj, ff.net.2, proj, linear, linear_1,
  linear_2; `proj` is the patch convolution), saves the peft folder, and beside it a file with
  `unet.base_model.model.` names and no alpha. ComfyUI's comfy/lora.py (PixArt) reads both and `transformer.` names,
  and the official names under `diffusion_model.` and, flattened, `lora_unet_`.
* OneTrainer (modules/util/convert_lora_util.py) writes diffusers names flattened under `lora_transformer_` ("legacy"),
  dotted under `transformer.` with alpha folded into B, and the official ones under `lora_unet_`, `diffusion_model.`;
  an older map of it has `attn.qkv.0` ... `attn.qkv.2` for q, k, v. T5 is `lora_te_`, `text_encoder.` or `t5.`;
  `bundle_emb.` are embeddings of new words.
* SimpleTuner (helpers/models/pixart/model.py, get_lora_target_layers) trains the attention of a ControlNet's copies and
  its linear maps, and saves peft's names with `controlnet.controlnet_blocks.{i}.` before them; it begins with copies of
  the base's blocks and maps of zeros, which its file does not hold.
* kohya-ss sd-scripts (networks/lora.py): `lora_down`, `lora_up`, `alpha`, scale alpha / rank.
* The DoRA magnitude is `lora_magnitude_vector` in peft (with or without `.weight`), (out,) or (1, out, 1, 1), and
  `dora_scale` in LyCORIS and OneTrainer: (out, 1), or, by default there, (1, in): KohakuBlueleaf/LyCORIS issue 216.
"""

import re

from mindsigma.weights.adapters.adapter_file import part_names
from mindsigma.weights.names import controlnet_names
from mindsigma.weights.names.dit_names import DIFFUSERS

PREFIXES = (
    *("base_model.model.", "transformer.", "unet.", "diffusion_model.", "lora_transformer.", "lora_unet."),
    *("base_model.", "model.", "module.", "_orig_mod.", "dit.", "net.", "network.", "denoiser.", "pipe."),
    "controlnet.",
)
OF_CONTROLNET = "controlnet_blocks."  # in every name of an adapter of a ControlNet, and in no other
FLAT_PREFIXES = ("lora_transformer_", "lora_unet_", "lycoris_")
TEXT_PREFIXES = ("text_encoder", "lora_te", "lora_text", "lora_t5", "lycoris_text", "t5.", "t5xxl.", "bundle_emb.")

_NAME = r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.weight)?"  # peft may put the adapter's name there
_OLD = r"\.(?:lora|lora_layer|lora_linear_layer)"  # of diffusers before it used peft
ROLES = {
    "a": (
        rf"(.+)\.lora_A{_NAME}",
        r"(.+)\.lora_down\.weight",
        rf"(.+){_OLD}\.down\.weight",
        r"(.+)_lora\.down\.weight",
    ),
    "b": (rf"(.+)\.lora_B{_NAME}", r"(.+)\.lora_up\.weight", rf"(.+){_OLD}\.up\.weight", r"(.+)_lora\.up\.weight"),
    "alpha": (r"(.+)\.alpha",),
    "magnitude": (rf"(.+)\.lora_magnitude_vector{_NAME}", r"(.+)\.dora_scale", r"(.+)\.magnitude"),
}
# adapters of other kinds, told apart by a word in their keys
OTHERS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "boft_": "BOFT",
    "lora_mid": "LoRA with a Tucker core (lora_mid)",
    "lora_embedding_": "LoRA of an embedding",
    "vera_": "VeRA",
    "ia3_": "IA3",
    "on_input": "IA3",
}
_ROLES = [(role, re.compile(pattern)) for role, patterns in ROLES.items() for pattern in patterns]


def split_key(key):
    """(layer's text, role "a", "b", "alpha" or "magnitude") of a tensor name, or None if it is none of an adapter."""
    for role, pattern in _ROLES:
        match = pattern.fullmatch(key)
        if match:
            return match[1], role
    return None


def other_kind(names):
    """(tensor name, kind) of the first tensor that belongs to an adapter of another kind, or None."""
    return next(((name, kind) for name in names for word, kind in OTHERS.items() if f".{word}" in name), None)


def entry_name(text, controlnet=False):
    """Our name of the layer, or part of a fused one, that a foreign text speaks of; None if there is none such.

    `controlnet`: the layer is one of a ControlNet, else of a DiT.
    """
    stripped = True
    while stripped:
        prefix = next((prefix for prefix in PREFIXES if text.startswith(prefix)), None)
        text, stripped = text[len(prefix or "") :], prefix is not None
    text = re.sub(r"\.processor\.(to_out$)?", lambda match: ".to_out.0" if match[1] else ".", text)
    flat = next((prefix for prefix in FLAT_PREFIXES if text.startswith(prefix)), "")
    dotted = _CONTROLNET if controlnet else _DOTTED
    for pattern, ours in _FLAT if flat and not controlnet else dotted:
        match = pattern.fullmatch(text[len(flat) :])
        if match:
            return ours.format(*match.groups())
    return None


def diffusers_name(name, controlnet=False):
    """diffusers' name of one of our entries, of a DiT or a ControlNet, that is not a whole fused layer."""
    table = _THEIRS_OF_CONTROLNET if controlnet else _THEIRS
    return next(theirs.format(*match.groups()) for pattern, theirs in table if (match := pattern.fullmatch(name)))


def _template(text, separator="."):
    return re.compile(r"([0-9]{1,4})".join(re.escape(part) for part in text.replace(".", separator).split("{}")))


def _spellings(table=DIFFUSERS):
    """(our entry's template, diffusers' or None for a whole fused layer, further ones) of every linear layer."""
    for rule in table:
        layer, suffix = rule.ours[: -len(".weight")], rule.ours[-len(".weight") :]
        if suffix != ".weight" or "norm" in layer:
            continue
        theirs = [name[: -len(".weight")] for name in rule.theirs]
        parts = part_names(layer)
        yield (layer, None if parts else theirs[0], ())
        for i, part in enumerate(parts):
            yield (part, theirs[i], (f"{layer}.{i}",))


_ALL = [(ours, [ours, *filter(None, [theirs]), *more]) for ours, theirs, more in _spellings()]
_DOTTED = [(_template(text), ours) for ours, texts in _ALL for text in texts]
_FLAT = [(_template(text, "_"), ours) for ours, texts in _ALL for text in texts]
_THEIRS = [(_template(ours), theirs) for ours, theirs, _ in _spellings() if theirs]
_CONTROLNET = [(_template(theirs), ours) for ours, theirs, _ in _spellings(controlnet_names.DIFFUSERS) if theirs]
_THEIRS_OF_CONTROLNET = [
    (_template(ours), theirs) for ours, theirs, _ in _spellings(controlnet_names.DIFFUSERS) if theirs
]

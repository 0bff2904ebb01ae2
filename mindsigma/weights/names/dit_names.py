"""Names of a DiT's tensors: ours are the official checkpoint's; diffusers' are mapped."""

from mindsigma.weights.names.name_map import MappedSource, Rule, rules

_SAME = (
    "x_embedder.proj",
    "y_embedder.y_proj.fc1",
    "y_embedder.y_proj.fc2",
    "t_embedder.mlp.0",
    "t_embedder.mlp.2",
    "csize_embedder.mlp.0",
    "csize_embedder.mlp.2",
    "ar_embedder.mlp.0",
    "ar_embedder.mlp.2",
    "t_block.1",
    "blocks.{}.attn.qkv",
    "blocks.{}.attn.proj",
    "blocks.{}.attn.q_norm",
    "blocks.{}.attn.k_norm",
    "blocks.{}.attn.sr",
    "blocks.{}.attn.norm",
    "blocks.{}.cross_attn.q_linear",
    "blocks.{}.cross_attn.kv_linear",
    "blocks.{}.cross_attn.proj",
    "blocks.{}.mlp.fc1",
    "blocks.{}.mlp.fc2",
    "final_layer.linear",
)
_TABLES = ("blocks.{}.scale_shift_table", "final_layer.scale_shift_table")

OFFICIAL = rules(*((name, name) for name in _SAME)) + rules(*((name, name) for name in _TABLES), suffixes=())

# Recomputed (the position embedding) or used by training alone (the caption of dropped captions, T5 of "").
NULL_CAPTION = "y_embedder.y_embedding"
OFFICIAL_DROP = ("pos_embed", NULL_CAPTION)

_BLOCK = "transformer_blocks.{}."
DIFFUSERS = (
    rules(
        ("x_embedder.proj", "pos_embed.proj"),
        ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
        ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
        ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
        ("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
        ("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
        ("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
        ("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
        ("t_block.1", "adaln_single.linear"),
        ("blocks.{}.attn.qkv", *(f"{_BLOCK}attn1.to_{part}" for part in "qkv")),
        ("blocks.{}.attn.proj", f"{_BLOCK}attn1.to_out.0"),
        ("blocks.{}.attn.q_norm", f"{_BLOCK}attn1.q_norm"),
        ("blocks.{}.attn.k_norm", f"{_BLOCK}attn1.k_norm"),
        ("blocks.{}.cross_attn.q_linear", f"{_BLOCK}attn2.to_q"),
        ("blocks.{}.cross_attn.kv_linear", *(f"{_BLOCK}attn2.to_{part}" for part in "kv")),
        ("blocks.{}.cross_attn.proj", f"{_BLOCK}attn2.to_out.0"),
        ("blocks.{}.mlp.fc1", f"{_BLOCK}ff.net.0.proj"),
        ("blocks.{}.mlp.fc2", f"{_BLOCK}ff.net.2"),
        ("final_layer.linear", "proj_out"),
    )
    + (Rule("final_layer.scale_shift_table", ("scale_shift_table",)),)
    + (Rule("blocks.{}.scale_shift_table", (f"{_BLOCK}scale_shift_table",)),)
)
# Older diffusers kept the null caption: the released alpha transformers have it.
DIFFUSERS_NULL_CAPTION = "caption_projection.y_embedding"
DIFFUSERS_DROP = ("pos_embed.pos_embed", DIFFUSERS_NULL_CAPTION)


# A tensor that only files of a naming have: the naming's Rules, and names that it has beside weights. Else OFFICIAL.
NAMINGS = {"pos_embed.proj.weight": (DIFFUSERS, DIFFUSERS_DROP)}


def stored_null_caption(source):
    """Name of the null caption in a TensorSource with official or diffusers names, or None."""
    return next((name for name in (NULL_CAPTION, DIFFUSERS_NULL_CAPTION) if name in source), None)


def map_dit(source, ema=False):
    """See the DiT of a TensorSource, with names of any naming, under ours; `ema` takes the averaged of two."""
    source = source.part("dit", ema)
    naming = next((naming for telling, naming in NAMINGS.items() if telling in source), (OFFICIAL, OFFICIAL_DROP))
    return MappedSource(source, *naming)

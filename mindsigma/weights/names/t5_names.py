"""Names of a T5 encoder's tensors: ours are Hugging Face's."""

from mindsigma.weights.names.name_map import MappedSource, Rule

_LAYERS = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    "layer.0.SelfAttention.relative_attention_bias",
    "layer.0.layer_norm",
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
    "layer.1.layer_norm",
)
NAMES = tuple(f"encoder.block.{{}}.{name}.weight" for name in _LAYERS) + ("encoder.final_layer_norm.weight",)
TIED = "encoder.embed_tokens.weight"

# A full T5 brings its decoder along, which text to image does not use.
DROP = (TIED, "decoder.embed_tokens.weight", "decoder.final_layer_norm.weight", "lm_head.weight") + tuple(
    f"decoder.block.{{}}.layer.{{}}.{name}.weight"
    for name in (
        *(f"{kind}.{part}" for kind in ("SelfAttention", "EncDecAttention") for part in "qkvo"),
        "SelfAttention.relative_attention_bias",
        *(f"DenseReluDense.{part}" for part in ("wi_0", "wi_1", "wo")),
        "layer_norm",
    )
)


def map_t5(source):
    """See a TensorSource of a T5, whole or encoder alone, under our names."""
    source = source.part("t5")
    embedding = "shared.weight" if "shared.weight" in source else TIED
    table = tuple(Rule(name, (name,)) for name in NAMES) + (Rule("shared.weight", (embedding,)),)
    return MappedSource(source, table, DROP)

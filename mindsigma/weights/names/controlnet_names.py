"""Names of a ControlNet's tensors: ours; the official ones, in a file with its base; diffusers' research project's."""

from mindsigma.weights.names import dit_names
from mindsigma.weights.names.name_map import MappedSource, Rule, rules


def _copies(table, theirs, prefix):
    """The Rules of a DiT's blocks for the copies, whose names begin with `prefix` where a block's do with `theirs`."""
    blocks = [rule for rule in table if rule.ours.startswith("blocks.{}.")]
    return tuple(Rule(rule.ours, tuple(name.replace(theirs, prefix, 1) for name in rule.theirs)) for rule in blocks)


OURS = _copies(dit_names.OFFICIAL, "blocks.{}.", "blocks.{}.") + rules(
    ("before_proj", "before_proj"), ("after_proj.{}", "after_proj.{}")
)
OFFICIAL = _copies(dit_names.OFFICIAL, "blocks.{}.", "controlnet.{}.copied_block.") + rules(
    ("before_proj", "controlnet.0.before_proj"), ("after_proj.{}", "controlnet.{}.after_proj")
)
# examples/research_projects/pixart, and SimpleTuner.
DIFFUSERS = _copies(dit_names.DIFFUSERS, "transformer_blocks.{}.", "controlnet_blocks.{}.transformer_block.") + rules(
    ("before_proj", "controlnet_blocks.0.before_proj"), ("after_proj.{}", "controlnet_blocks.{}.after_proj")
)

# A tensor that only files of a naming have.
NAMINGS = {"controlnet.0.after_proj.weight": OFFICIAL, "controlnet_blocks.0.after_proj.weight": DIFFUSERS}


def map_controlnet(source):
    """See the ControlNet of a TensorSource, with names of any naming, under ours."""
    source = source.part("controlnet")
    return MappedSource(source, next((naming for telling, naming in NAMINGS.items() if telling in source), OURS))

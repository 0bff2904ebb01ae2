"""Which block of a network each node of its graph belongs to, told by the parameters that it reads."""

import re

NORMS = ("LayerNorm", "LayerNormExt", "AddLayerNormV2", "RmsNorm", "AddRmsNorm", "GroupNorm")
BEFORE = "inputs"

_NUMBERED = re.compile(r"((?:[A-Za-z_]\w*\.)*?(?:\w*blocks?\.\d+|mid_block))(?:\.|$)")


def block_of_parameter(name):
    """blocks.3 of blocks.3.attn.qkv.weight, encoder.block.0 of T5's, the first part of a name without a number."""
    match = _NUMBERED.match(name.split(":")[0])
    return match[1] if match else name.split(".")[0].split(":")[0]


def blocks_of(graph, is_small):
    """List of the block's name of each node.

    A node that reads a parameter, or what is made of parameters alone (a cast weight), is its block's; any other
    belongs with the latest such node that it depends on. Two corrections: what leads from a norm without parameters to
    the next block's first weight is that block's, and so is what is small, such as slices of a modulation, and serves
    one block. Backward and update of a training step are told apart less well than forward passes.

    Args:
        is_small: function of a Node: whether its results are not as large as activations.
    """
    labels, touched, own, is_weight = [], [], [], []
    for i, node in enumerate(graph.nodes):
        names = []
        for value in node.values():
            if value.origin == "parameter":
                names.append(block_of_parameter(value.name))
            elif value.origin == "node" and is_weight[value.node]:
                names.append(labels[value.node])
        variable = [value for value in node.values() if not _is_fixed(value, is_weight)]
        is_weight.append(bool(names) and not variable)
        latest = max((touched[value.node] for value in node.values() if value.origin == "node"), default=-1)
        own.append(bool(names))
        touched.append(i if names else latest)
        labels.append(names[-1] if names else labels[latest] if latest >= 0 else BEFORE)
    readers = graph.consumers()
    for i, node in enumerate(graph.nodes):
        if node.kind in NORMS and not own[i]:
            _move_to_next(i, labels, own, readers)
    for i in reversed(range(len(graph.nodes))):
        ahead = {labels[reader] for reader in readers[i]}
        if not own[i] and len(ahead) == 1 and is_small(graph.nodes[i]):
            labels[i] = ahead.pop()
    return labels


def _is_fixed(value, is_weight):
    if value.origin == "node":
        return is_weight[value.node]
    return value.origin in ("parameter", "constant")


def _move_to_next(start, labels, own, readers):
    """Give a norm, and what leads from it to the next node with a parameter or of another block, its label."""
    path, waiting, found = set(), [start], []
    while waiting:
        i = waiting.pop()
        if i in path:
            continue
        path.add(i)
        for reader in readers[i]:
            if own[reader] or labels[reader] != labels[start]:
                found.append(reader)
            else:
                waiting.append(reader)
    if found:
        label = labels[min(found)]
        for i in path:
            labels[i] = label

"""What the Ascend kernels refuse and an export without an NPU does not notice (by the pages of both)."""

from mindsigma.inspect.cost import ATTENTION, ATTENTION_GRAD, layout_of
from mindsigma.inspect.graph import Value

MAX_HEAD_WIDTH = 512
HEAD_WIDTH_UNIT = 16
MASK_INPUT = 6  # place of attn_mask among the arguments of FlashAttentionScore
DTYPES = ("fp16", "bf16", "fp32")


def violations(graph):
    """List of texts, one for each rule that a fused attention breaks."""
    found = []
    for node in graph.nodes:
        if node.kind in (ATTENTION, ATTENTION_GRAD):
            found += [f"{node.kind} {_place(node)}: {text}" for text in attention_violations(node)]
    return found


def attention_violations(node):
    """Rules that one FlashAttentionScore or its gradient breaks, as texts."""
    arrays = [value.array if isinstance(value, Value) else None for value in node.inputs]
    q, k, v = arrays[:3]
    found = []
    dtypes = {array.dtype for array in (q, k, v)}
    if len(dtypes) > 1:
        found.append(f"q, k and v have different dtypes {', '.join(array.dtype for array in (q, k, v))}")
    elif not dtypes <= set(DTYPES):
        found.append(f"q, k and v are {q.dtype}, the kernel takes {', '.join(DTYPES)}")
    heads, layout = layout_of(node)
    shapes = [_extents(array.dims, heads, layout) for array in (q, k, v)]
    if None in shapes:
        return [*found, f"shapes {q.dims}, {k.dims}, {v.dims} do not fit {heads} heads in layout {layout}"]
    (batch, queries, width), *others = shapes
    for name, (other_batch, _, other_width) in zip("kv", others):
        if other_batch != batch:
            found.append(f"batch of q {batch} and of {name} {other_batch} differ")
        if name == "k" and other_width != width:
            found.append(f"head width of q {width} and of k {other_width} differ")
    keys = others[0][1]
    if others[1][1] != keys:
        found.append(f"{keys} keys but {others[1][1]} values")
    for name, (_, _, one) in zip("qkv", shapes):
        if one % HEAD_WIDTH_UNIT or one > MAX_HEAD_WIDTH:
            found.append(
                f"head width {one} of {name}: the kernel takes multiples of {HEAD_WIDTH_UNIT} up to {MAX_HEAD_WIDTH}"
            )
    mask = arrays[MASK_INPUT] if node.kind == ATTENTION and len(arrays) > MASK_INPUT else None
    if mask is not None:
        allowed = [(batch, heads, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)]
        if mask.dtype not in ("bool", "uint8"):
            found.append(f"mask of {mask.dtype}, the kernel takes bool and uint8")
        if mask.dims not in [*allowed, (2048, 2048)]:
            found.append(f"mask of shape {mask.dims}, the kernel takes {', '.join(map(str, allowed))}")
    return found


def _extents(dims, heads, layout):
    """(batch, length, head width) of a tensor in a layout, or None."""
    if layout in ("BSH", "SBH") and len(dims) == 3 and dims[2] % heads == 0:
        batch, length = (dims[0], dims[1]) if layout == "BSH" else (dims[1], dims[0])
        return batch, length, dims[2] // heads
    if layout == "BSND" and len(dims) == 4 and dims[2] == heads:
        return dims[0], dims[1], dims[3]
    if layout == "BNSD" and len(dims) == 4 and dims[1] == heads:
        return dims[0], dims[2], dims[3]
    if layout == "TND" and len(dims) == 3 and dims[1] == heads:
        return 1, dims[0], dims[2]
    return None


def _place(node):
    return f"at {node.source[0]}:{node.source[1]}" if node.source else f"in {node.scope}"

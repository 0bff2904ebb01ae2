"""What a graph costs, estimated from shapes: floating-point operations, bytes moved, and memory alive at once.

Assumptions: every node runs by itself, in the graph's order, reads its inputs and writes its outputs once; a slice
reads what it keeps; views (reshapes) cost nothing; no workspace, no in-place results, no fusion by the backend. A fused
attention never writes its scores.
"""

from dataclasses import dataclass

from mindsigma.inspect.graph import Value

# The same memory, seen otherwise.
VIEWS = (
    "Reshape", "ExpandDims", "Squeeze", "Flatten", "StopGradient", "View", "ViewExt", "NarrowView", "UnstackExtView",
)  # fmt: skip

MATMULS = (
    "MatMul",
    "MatMulExt",
    "BatchMatMul",
    "BatchMatMulExt",
    "Dense",
    "MatMulV2",
    "BMMExt",
    "Mm",
    "Addmm",
    "Baddbmm",
)
CONVOLUTIONS = ("Conv2D", "Conv2DExt", "Convolution", "Conv2DPadding", "Conv2DBackpropInput", "Conv2DBackpropFilter")
ATTENTION, ATTENTION_GRAD = "FlashAttentionScore", "FlashAttentionScoreGrad"
SLICES = ("StridedSlice", "Slice", "SliceExt", "Gather", "GatherNd", "EmbeddingLookup", "Embedding", "IndexSelect")

# Operations of the vector unit for each output element, where it is not about one. Rough.
VECTOR_OPERATIONS = {
    "LayerNorm": 8, "LayerNormExt": 8, "AddLayerNormV2": 9, "RmsNorm": 6, "GroupNorm": 8, "LayerNormGradExt": 16,
    "LayerNormGrad": 16, "Softmax": 5, "SoftmaxExt": 5, "GeLU": 10, "GeluExt": 10, "GeLUGrad": 16, "GeluGradExt": 16,
    "Sigmoid": 4, "SiLU": 5, "Addcmul": 2, "AddcmulExt": 2, "AddLayerNormGrad": 17,
    "Exp": 4, "Sin": 8, "Cos": 8, "Sqrt": 2, "Rsqrt": 2,
}  # fmt: skip
NO_ARITHMETIC = SLICES + VIEWS + (
    "Transpose", "Concat", "Split", "SplitWithSize", "SplitTensor", "Tile", "BroadcastTo", "Pad", "PadV3",
    "ConstantPadND", "Cast", "Assign", "InplaceCopy", "Stack", "StackExt", "Contiguous",
)  # fmt: skip

CUBE, VECTOR, NONE = "cube", "vector", "none"


@dataclass(frozen=True)
class Cost:
    """unit: which part of an AI core works, "cube", "vector" or "none"; operations; bytes read and written."""

    unit: str
    operations: int
    bytes: int


def cost_of(node):
    """Cost of a Node."""
    if node.kind in VIEWS:
        return Cost(NONE, 0, 0)
    written = sum(array.bytes for array in node.outputs)
    if node.kind in SLICES:
        return Cost(VECTOR, 0, 2 * written)
    read = sum(value.array.bytes for value in node.values() if value.array is not None)
    operations = _cube_operations(node)
    if operations is not None:
        return Cost(CUBE, operations, read + written)
    each = 0 if node.kind in NO_ARITHMETIC else VECTOR_OPERATIONS.get(node.kind, 1)
    largest = max([array.size for array in node.outputs] or [0])
    if node.kind.startswith("Reduce") or node.kind in ("SumExt", "MeanExt"):
        largest = max([value.array.size for value in node.values() if value.array is not None] or [0])
    return Cost(VECTOR, each * largest, read + written)


def dtype_of(node):
    """Dtype that decides the speed: the first tensor that it reads, else its output."""
    arrays = [value.array for value in node.values() if value.array is not None] + list(node.outputs)
    return arrays[0].dtype if arrays else "none"


def _cube_operations(node):
    """Multiplications and additions of a matrix product, convolution or attention; None for anything else."""
    arrays = [value.array if isinstance(value, Value) else None for value in node.inputs]
    if node.kind in MATMULS:
        first, second = arrays[:2] if node.kind not in ("Addmm", "Baddbmm") else arrays[1:3]
        return 2 * node.outputs[0].size * _inner(node, first, second)
    if node.kind == ATTENTION:
        return _attention(node)
    if node.kind == ATTENTION_GRAD:
        return _attention(node) * 5 // 2  # five products of the forward's size, where the forward has two
    if node.kind in CONVOLUTIONS:
        weight = next((array for array in arrays[1:] if array is not None), None)
        return 2 * node.outputs[0].size * weight.size // weight.dims[0]
    return None


def _inner(node, first, second):
    """Extent that a matrix product sums over."""
    transposed = node.inputs[2].number if len(node.inputs) > 2 and isinstance(node.inputs[2], Value) else False
    if node.kind in ("MatMul", "BatchMatMul", "MatMulV2") and transposed:
        return first.dims[-2]
    return first.dims[-1]


def attention_shape(node):
    """(batch, heads, queries, keys, head width) of a FlashAttentionScore or its gradient, by its layout."""
    q, k = (value.array.dims for value in node.inputs[:2])
    heads, layout = layout_of(node)
    if layout == "BNSD":
        return q[0], q[1], q[2], k[2], q[3]
    if layout == "BSND":
        return q[0], q[2], q[1], k[1], q[3]
    if layout == "SBH":
        return q[1], heads, q[0], k[0], q[2] // heads
    if layout == "TND":
        return 1, q[1], q[0], k[0], q[2]
    return q[0], heads, q[1], k[1], q[2] // heads


# Values of the primitive's enumeration FASInputLayoutMode.
LAYOUTS = {0: "BSH", 1: "BNSD", 2: "SBH", 3: "BSND", 4: "TND"}


def layout_of(node):
    """(number of heads, name of the layout) of a FlashAttentionScore or its gradient."""
    numbers = [value.number for value in node.inputs if isinstance(value, Value) and value.origin == "constant"]
    numbers = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
    # The integers among its arguments: head_num, pre_tokens, next_tokens, inner_precise, input_layout, sparse_mode.
    return numbers[0], LAYOUTS.get(numbers[4], str(numbers[4]))


def _attention(node):
    batch, heads, queries, keys, width = attention_shape(node)
    return 4 * batch * heads * queries * keys * width


def peak_memory(graph):
    """(bytes, index of the node) of the most memory that results of nodes take at once, and where.

    Inputs, parameters and constants of the graph are not counted; a view is its original's memory.
    """
    storage, last = {}, {}

    def held(value):
        return storage.get((value.node, value.output)) if value.origin == "node" else None

    sizes = {}
    for i, node in enumerate(graph.nodes):
        for value in node.values():
            if held(value) is not None:
                last[held(value)] = i
        original = next((value for value in node.values() if value.array is not None), None)
        for j, array in enumerate(node.outputs):
            alias = held(original) if node.kind in VIEWS and original is not None else None
            if node.kind in VIEWS or node.kind in ("Assign", "InplaceCopy"):
                storage[i, j] = alias
                if alias is not None:
                    last[alias] = max(last[alias], i)
            else:
                storage[i, j] = (i, j)
                sizes[i, j], last[i, j] = array.bytes, i
    for value in _results(graph.results):
        if held(value) is not None:
            last[held(value)] = len(graph.nodes)
    alive, peak, where = 0, 0, -1
    ends = {}
    for key, end in last.items():
        ends.setdefault(end, []).append(key)
    starts = {}
    for key in sizes:
        starts.setdefault(key[0], []).append(key)
    for i in range(len(graph.nodes)):
        alive += sum(sizes[key] for key in starts.get(i, ()))
        if alive > peak:
            peak, where = alive, i
        alive -= sum(sizes[key] for key in ends.get(i, ()))
    return peak, where


def _results(value):
    if isinstance(value, tuple):
        for one in value:
            yield from _results(one)
    elif isinstance(value, Value):
        yield value

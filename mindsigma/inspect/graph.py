"""An exported graph (MINDIR) as a list of nodes with shapes, dtypes, what they read, and the source line of each."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mindspore.train import mind_ir_pb2

# What only passes values on, or orders side effects: no kernel.
PLUMBING = (
    "Constant",
    "Load",
    "UpdateState",
    "Depend",
    "MakeTuple",
    "TupleGetItem",
    "MakeList",
    "ListGetItem",
    "Return",
)

_TYPES = {value: name.lower() for name, value in mind_ir_pb2.TensorProto.DataType.items()}
_NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64", "float64": "fp64"}
_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8, "int64": 8, "uint64": 8, "int32": 4, "uint32": 4}


@dataclass(frozen=True)
class Array:
    """Shape and dtype ("fp16", "bf16", "fp32", "int32", ...) of a tensor; an unknown extent is -1."""

    dims: Tuple[int, ...]
    dtype: str

    @property
    def size(self):
        """Number of elements."""
        size = 1
        for extent in self.dims:
            size *= max(extent, 1)
        return size

    @property
    def bytes(self):
        """Bytes in memory."""
        return self.size * _BYTES.get(self.dtype, 2 if self.dtype.endswith("16") else 1)


@dataclass(frozen=True)
class Value:
    """What a node reads.

    Attributes:
        origin: "parameter", "input", "constant" or "node".
        name: of the parameter or input.
        array: Array, or None of a constant that is no tensor.
        node, output: index of the node and which of its outputs, if the origin is a node.
        number: the constant, if it is a number, a text or a tuple of these.
    """

    origin: str
    name: str = ""
    array: Optional[Array] = None
    node: int = -1
    output: int = 0
    number: Any = None


@dataclass
class Node:
    """One operation.

    Attributes:
        kind: name of the primitive.
        scope: path of cells and a number, unique in the graph; the path is not that of the caller where functions share
            code.
        inputs: Values, tuples of them, or None.
        outputs: Arrays.
        source: (file, line) inside the package that made the node, or None. What differentiation added without a line
            has that of what it reads.
    """

    name: str
    kind: str
    scope: str
    inputs: List[Any]
    outputs: Tuple[Array, ...]
    source: Optional[Tuple[str, int]] = None

    def values(self):
        """The Values it reads, tuples flattened."""
        return list(_flat(self.inputs))


@dataclass
class Graph:
    """Nodes in an order in which they can run, without plumbing and without what no result needs.

    Attributes:
        parameters: dict name -> Array of what the graph reads.
        inputs: dict name -> Array.
        results: Values that the graph returns, nested as it returns them.
        plumbing: dict kind -> number of nodes that compute nothing.
        dead: number of nodes that no result needs.
        subgraphs: number of functions beside the main graph (control flow).
        constants: Arrays of the constant tensors.
    """

    nodes: List[Node] = field(default_factory=list)
    parameters: Dict[str, Array] = field(default_factory=dict)
    inputs: Dict[str, Array] = field(default_factory=dict)
    results: Any = None
    plumbing: Dict[str, int] = field(default_factory=dict)
    dead: int = 0
    subgraphs: int = 0
    constants: List[Array] = field(default_factory=list)

    def consumers(self):
        """List of the indices of the nodes that read each node."""
        readers = [[] for _ in self.nodes]
        for i, node in enumerate(self.nodes):
            for origin in {value.node for value in node.values() if value.origin == "node"}:
                readers[origin].append(i)
        return readers


def kind_of(proto):
    """Primitive's name of a node's op_type, such as REF::FlashAttentionScore:25."""
    return proto.op_type.split("::")[-1].split(":")[0]


def parse_model(model, sources=None):
    """Graph of a MINDIR ModelProto.

    Args:
        sources: dict scope -> (file, line), of the node of that scope, from `read_sources`; without it no node has one.
    """
    graph = Graph(subgraphs=len(model.functions))
    parser = _Parser(graph, sources or {})
    for proto in model.graph.parameter:
        name = proto.name.partition(":")[2] or proto.name
        graph.parameters[name] = Array(tuple(proto.dims), _dtype(proto.data_type))
        parser.values[proto.name] = Value("parameter", name, graph.parameters[name])
    for function in [*model.functions, model.graph]:
        parser.read(function)
    for node in graph.nodes:
        if node.source is None:
            read = (graph.nodes[value.node].source for value in node.values() if value.origin == "node")
            node.source = next((source for source in read if source), None)
    graph.parameters = {
        name: graph.parameters[name]
        for name in {value.name: None for node in graph.nodes for value in node.values() if value.origin == "parameter"}
    }
    return graph


def read_sources(text, root):
    """dict scope -> (file, line) from MindSpore's text of a graph: of each node the innermost line under a folder.

    Args:
        text: content of the .ir file that `save_graphs` writes.
        root: folder that files are named from.
    """
    root = Path(root).resolve()
    sources, found, scope = {}, None, None
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("%"):
            found, scope = None, None
        elif line.startswith("# Fullname with scope: ("):
            scope = line[len("# Fullname with scope: (") : -1]
        elif line.startswith("# In file "):
            match = _FRAME.match(line)
            if match is None or match["code"].lstrip().startswith(("def ", "class ")):
                continue
            file = Path(match["file"])
            if not file.is_relative_to(root) or "site-packages" in file.parts:  # an environment may lie below root
                continue
            found = (str(file.relative_to(root)), int(match["line"]))
            if scope is not None:
                sources[scope] = found
    return sources


_FRAME = re.compile(r"# In file (?P<file>.+?):(?P<line>\d+)(?:~\d+)?(?:, \d+~\d+)?/(?P<code>.*)")


def _flat(values):
    for value in values:
        if isinstance(value, tuple):
            yield from _flat(value)
        elif value is not None:
            yield value


def _dtype(number):
    name = _TYPES.get(number, "unknown")
    return _NAMES.get(name, name)


def _arrays(proto):
    """Arrays of a node's inferred result, flattened."""
    attribute = next((one for one in proto.attribute if one.name == "shape"), None)
    return tuple(_tensors(attribute)) if attribute is not None else ()


def _tensors(attribute):
    for tensor in attribute.tensors:
        yield Array(tuple(tensor.dims), _dtype(tensor.data_type))
    for value in attribute.values:
        yield from _tensors(value)


class _Parser:
    """Reads functions one after the other into a Graph."""

    def __init__(self, graph, sources):
        self.graph = graph
        self.sources = sources
        self.values = {}  # name of a node's output, a parameter or an input: Value or a tuple of them

    def read(self, function):
        graph = self.graph
        for proto in function.input:
            array = next((Array(tuple(t.dims), _dtype(t.data_type)) for t in proto.tensor), None)
            name = proto.name.partition(":")[2] or proto.name
            self.values[proto.name] = Value("input", name, array)
            if array is not None:
                graph.inputs[name] = array
        needed = _needed(function)
        for proto in function.node:
            kind = kind_of(proto)
            if kind != "Constant" and proto.output[0] not in needed:
                graph.dead += kind not in PLUMBING
                continue
            if kind in PLUMBING:
                graph.plumbing[kind] = graph.plumbing.get(kind, 0) + 1
                self.values[proto.output[0]] = self._passed_on(kind, proto)
                continue
            inputs = [self.values.get(name) for name in proto.input]
            outputs = _arrays(proto)
            node = Node(proto.output[0], kind, proto.domain, inputs, outputs, self.sources.get(proto.domain))
            index = len(graph.nodes)
            graph.nodes.append(node)
            made = tuple(Value("node", proto.output[0], array, index, i) for i, array in enumerate(outputs))
            self.values[proto.output[0]] = made[0] if len(made) == 1 else made
        results = tuple(self.values.get(output.name) for output in function.output)
        graph.results = results[0] if len(results) == 1 else results

    def _passed_on(self, kind, proto):
        if kind == "Constant":
            return self._constant(proto)
        inputs = [self.values.get(name) for name in proto.input]
        if kind in ("MakeTuple", "MakeList"):
            return tuple(inputs)
        if kind in ("TupleGetItem", "ListGetItem"):
            index = inputs[1].number if isinstance(inputs[1], Value) else None
            if isinstance(inputs[0], tuple) and isinstance(index, int) and index < len(inputs[0]):
                return inputs[0][index]
            return inputs[0]
        return inputs[0] if inputs and kind != "UpdateState" else None

    def _constant(self, proto):
        attribute = next((one for one in proto.attribute if one.name == "value"), None)
        if attribute is None:
            return Value("constant", proto.output[0])
        arrays = list(_tensors(attribute))
        if arrays:
            self.graph.constants += arrays
            made = tuple(Value("constant", proto.output[0], array) for array in arrays)
            return made[0] if len(made) == 1 else made
        return Value("constant", proto.output[0], number=_number(attribute))


def _number(attribute):
    kinds = mind_ir_pb2.AttributeProto.AttributeType
    if attribute.type in (kinds.TUPLE, kinds.LIST):
        return tuple(_number(value) for value in attribute.values)
    if attribute.type == kinds.NONE:
        return None
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type in (kinds.FLOAT, kinds.DOUBLE):
        return attribute.f or (attribute.floats[0] if attribute.floats else attribute.d)
    if attribute.ints:
        return attribute.ints[0]
    return bool(attribute.i) if attribute.type == kinds.BOOL else attribute.i


def _needed(function):
    """Names of the node outputs that the function's results, or the side effects before them, depend on."""
    inputs = {proto.output[0]: proto.input for proto in function.node}
    needed, waiting = set(), [output.name for output in function.output]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting.extend(inputs.get(name, ()))
    return needed

"""What a graph holds, as a dict for JSON and as text: nodes by kind and block, data movement, memory, work."""

from collections import Counter
from dataclasses import asdict

import mindspore as ms

from mindsigma.inspect.blocks import blocks_of
from mindsigma.inspect.cost import ATTENTION, CONVOLUTIONS, CUBE, MATMULS, NONE, VIEWS, cost_of, dtype_of, peak_memory
from mindsigma.inspect.legality import violations
from mindsigma.sampling.options import SamplingOptions

FORMAT = 1

# Kinds that only move or convert data, each listed with the line that made it.
MOVEMENTS = (
    "Cast", "Transpose", "TransposeExtView", "Pad", "PadV3", "ConstantPadND", "Concat", "Stack", "Tile", "BroadcastTo",
    "Split", "SplitWithSize", "SplitTensor", "StridedSlice", "Slice", "SliceExt", "Gather", "Contiguous", "TransData",
)  # fmt: skip

# Kinds for which the host must wait or decide: values that leave the device, shapes that depend on them, control flow.
HOST = (
    "PyExecute", "PyInterpret", "TensorToScalar", "TensorToTuple", "TensorToList", "Switch", "SwitchLayer", "Partial",
    "NonZero", "NonZeroExt", "MaskedSelect", "Unique", "Print", "Assert", "TensorSummary", "ScalarSummary",
)  # fmt: skip

ACTIVATIONS, SMALL, WEIGHTS = "activations", "small", "weights"

# A result is as large as activations if it has at least this part of the largest result's elements.
LARGE = 64


def node_class(graph):
    """List of ACTIVATIONS, SMALL or WEIGHTS for each node: large results, small ones, those of parameters alone."""
    largest = max((array.size for node in graph.nodes for array in node.outputs), default=1)
    classes = []
    for node in graph.nodes:
        size = max([array.size for array in node.outputs] or [0])
        origins = [
            classes[value.node] if value.origin == "node" else WEIGHTS if value.origin == "parameter" else value.origin
            for value in node.values()
        ]
        if origins and set(origins) <= {WEIGHTS, "constant"}:
            classes.append(WEIGHTS)
        else:
            classes.append(ACTIVATIONS if size * LARGE >= largest else SMALL)
    return classes


def report_of(graph, request):
    """Report of a Graph and the Request it was exported for, as a dict of plain values."""
    classes = node_class(graph)
    largest = max((array.size for node in graph.nodes for array in node.outputs), default=1)
    labels = blocks_of(graph, lambda node: max([a.size for a in node.outputs] or [0]) * LARGE < largest)
    costs = [cost_of(node) for node in graph.nodes]
    peak, where = peak_memory(graph)
    return {
        "format": FORMAT,
        "request": asdict(request),
        "mindspore": ms.__version__,
        "sampler": _sampler(request) if request.part == "step" else None,
        "nodes": _counts(node.kind for node in graph.nodes),
        "plumbing": dict(sorted(graph.plumbing.items())),
        "dead": graph.dead,
        "subgraphs": graph.subgraphs,
        "blocks": _blocks(graph, labels, costs, classes),
        "parameters": _sizes(graph.parameters.values()),
        "constants": _sizes(graph.constants),
        "inputs": _sizes(graph.inputs.values()),
        "activations": {
            "peak_bytes": peak,
            "at": _place(graph.nodes[where]) if where >= 0 else "",
            "all_bytes": sum(array.bytes for node in graph.nodes if node.kind not in VIEWS for array in node.outputs),
        },
        "flops": _flops(graph, costs),
        "bytes": sum(cost.bytes for cost in costs),
        "costs": _costs(graph, costs),
        "movements": _listed(graph, classes, labels, MOVEMENTS),
        "host": _host(graph),
        "repeated": _repeated(graph, classes, costs),
        "violations": violations(graph),
    }


def _sampler(request):
    """What the sampler of a step takes besides the latents."""
    sampler = SamplingOptions(sampler=request.sampler).solver("diffusers")
    numbers = len(sampler.table(sampler.steps)[0].numbers)
    noise = "drawn ahead by the host, an input of the step" if sampler.draws else "none"
    return {"name": request.sampler, "numbers": numbers, "kept": sampler.kept, "noise": noise}


def _counts(kinds):
    return dict(sorted(Counter(kinds).items()))


def _sizes(arrays):
    arrays = list(arrays)
    return {
        "tensors": len(arrays),
        "elements": sum(array.size for array in arrays),
        "bytes": sum(array.bytes for array in arrays),
    }


def _place(node):
    return f"{node.kind} {node.source[0]}:{node.source[1]}" if node.source else f"{node.kind} {node.scope}"


def _blocks(graph, labels, costs, classes):
    """dict block -> its nodes by kind, those on activations, operations and bytes; in the order in which they end."""
    result = {}
    ends = {label: i for i, label in enumerate(labels)}
    for label in sorted(ends, key=ends.get):
        rows = [i for i, one in enumerate(labels) if one == label]
        moved = [i for i in rows if graph.nodes[i].kind in MOVEMENTS and classes[i] == ACTIVATIONS]
        result[label] = {
            "nodes": _counts(graph.nodes[i].kind for i in rows),
            "moving_activations": _counts(graph.nodes[i].kind for i in moved),
            "flops": sum(costs[i].operations for i in rows if costs[i].unit == CUBE),
            "bytes": sum(costs[i].bytes for i in rows),
        }
    return result


def _flops(graph, costs):
    parts = {"matmul": 0, "attention": 0, "convolution": 0, "vector": 0}
    for node, cost in zip(graph.nodes, costs):
        if node.kind.startswith(ATTENTION):
            parts["attention"] += cost.operations
        elif node.kind in MATMULS:
            parts["matmul"] += cost.operations
        elif node.kind in CONVOLUTIONS:
            parts["convolution"] += cost.operations
        else:
            parts["vector"] += cost.operations
    return {**parts, "total": sum(parts.values())}


def _costs(graph, costs):
    """Rows (kind, unit, dtype, operations, bytes, count): what `roofline` needs of every node."""
    rows = Counter(
        (node.kind, cost.unit, dtype_of(node), cost.operations, cost.bytes)
        for node, cost in zip(graph.nodes, costs)
        if cost.unit != NONE
    )
    return [[*row, count] for row, count in sorted(rows.items())]


def _listed(graph, classes, labels, kinds):
    """Nodes of some kinds: rows of kind, output, class, source and the blocks they are in."""
    rows = {}
    for i, node in enumerate(graph.nodes):
        if node.kind not in kinds:
            continue
        array = node.outputs[0] if node.outputs else None
        shape = "" if array is None else f"{array.dtype} {list(array.dims)}"
        before = next((value.array for value in node.values() if value.array is not None), None)
        if node.kind == "Cast" and before is not None:
            shape = f"{before.dtype} to {shape}"
        source = f"{node.source[0]}:{node.source[1]}" if node.source else node.scope
        row = rows.setdefault((node.kind, shape, classes[i], source), [])
        row.append(labels[i])
    return [
        {"kind": kind, "result": shape, "of": of, "source": source, "count": len(found), "blocks": _runs(found)}
        for (kind, shape, of, source), found in rows.items()
    ]


def _runs(labels):
    """Labels as a text: blocks.0-27 for a run of numbered ones, upwards or downwards."""
    parts = []
    for label in dict.fromkeys(labels):
        stem, _, number = label.rpartition(".")
        last = parts[-1] if parts else None
        if number.isdigit() and last is not None and last[0] == stem and int(number) in (last[1] - 1, last[2] + 1):
            last[1:] = min(last[1], int(number)), max(last[2], int(number))
        elif number.isdigit():
            parts.append([stem, int(number), int(number)])
        else:
            parts.append([label, None, None])
    return ", ".join(
        stem if first is None else f"{stem}.{first}" if first == last else f"{stem}.{first}-{last}"
        for stem, first, last in parts
    )


def _host(graph):
    found = [node for node in graph.nodes if node.kind in HOST or any(-1 in array.dims for array in node.outputs)]
    return [{"kind": node.kind, "source": _place(node)} for node in found]


def _repeated(graph, classes, costs):
    """Work on parameters alone: done again at every call, though nothing changes. By kind and source."""
    rows = {}
    for node, of, cost in zip(graph.nodes, classes, costs):
        if of == WEIGHTS and cost.unit != NONE:
            row = rows.setdefault(_place(node), [0, 0])
            row[0] += 1
            row[1] += cost.bytes
    return [{"node": place, "count": count, "bytes": moved} for place, (count, moved) in rows.items()]


def compact(report):
    """The part of a report that is stored and compared: no numbers of lines, equal neighbouring blocks as one entry."""
    blocks = []
    for name, block in report["blocks"].items():
        if blocks and blocks[-1]["each"] == block:
            blocks[-1]["names"].append(name)
        else:
            blocks.append({"names": [name], "each": block})
    movements = [
        {key: row[key] for key in ("kind", "result", "of", "count")}
        for row in report["movements"]
        if row["of"] == ACTIVATIONS
    ]
    kept = (
        "format",
        "request",
        "nodes",
        "parameters",
        "constants",
        "activations",
        "flops",
        "bytes",
        "violations",
        "costs",
        "launches",
        "lines",
    )
    result = {key: report[key] for key in kept if key in report}
    result["activations"] = {key: value for key, value in report["activations"].items() if key != "at"}
    result["blocks"] = {_runs(block["names"]): block["each"] for block in blocks}
    result["movements"] = sorted(_merged(movements), key=lambda row: (row["kind"], row["result"]))
    return result


def _merged(rows):
    """Rows that differ by their count only, as one each."""
    counts = Counter()
    for row in rows:
        counts[row["kind"], row["result"], row["of"]] += row["count"]
    return [{"kind": kind, "result": shape, "of": of, "count": n} for (kind, shape, of), n in counts.items()]


def groups(report):
    """List of (names, block) of a full report, neighbouring equal blocks together."""
    return list(compact(report)["blocks"].items())

"""A graph's report as text for people."""

from mindsigma.inspect.report import ACTIVATIONS, groups

SEEN = (
    "MindSpore's front end after its last pass: types inferred, functions inlined, constants folded, equal expressions "
    "merged, dead code gone. Not seen: what the backend does next (fusion, layouts, memory, views). Source lines are "
    "MindSpore's: of code that callers share they may name another caller."
)


def text_of(report, short=False):
    """The report as a text.

    Args:
        short: leave out the single data movements of what is no activation.
    """
    request, flops = report["request"], report["flops"]
    size = "" if request["part"] in ("t5",) else f", {request['height']} x {request['width']} px"
    lines = [
        f"{request['model']}, {request['part']}{size}, batch {request['batch']}, {request['dtype']}"
        + (
            f", guided, captions of {request['tokens']} tokens"
            if request["part"] == "step" and request["guided"]
            else ""
        )
        + (f", {request['depth']} blocks" if request["depth"] else "")
        + (f", kv_compression {request['kv_compression']}" if request["kv_compression"] else "")
        + (f", perturbed attention in blocks {request['pag_layers']}" if request["pag_layers"] else "")
        + (f", a ControlNet of {request['control_layers']} blocks" if request.get("control_layers") else "")
        + (", under a mask" if request["inpaint"] else ""),
        f"Graph of {SEEN}",
        "",
        *_sampler(report["sampler"]),
        f"nodes         {sum(report['nodes'].values())}, and {sum(report['plumbing'].values())} that compute nothing; "
        f"left out: {report['dead']} that no result needs",
        f"parameters    {report['parameters']['elements'] / 1e6:.1f} M in {report['parameters']['tensors']} tensors, "
        f"{report['parameters']['bytes'] / 1e9:.3f} GB; constants {report['constants']['bytes'] / 1e6:.1f} MB",
        f"activations   at most {report['activations']['peak_bytes'] / 1e9:.3f} GB at once (estimate), inputs "
        f"{report['inputs']['bytes'] / 1e6:.1f} MB; largest at {report['activations']['at']}",
        f"operations    {flops['total'] / 1e12:.3f} TFLOP (estimate): matrix products {flops['matmul'] / 1e12:.3f}, "
        f"attention {flops['attention'] / 1e12:.3f}, convolution {flops['convolution'] / 1e12:.3f}, vector "
        f"{flops['vector'] / 1e12:.3f}",
        f"bytes moved   {report['bytes'] / 1e9:.2f} GB (estimate): inputs and outputs of every node, weights included",
        f"host waits    {len(report['host'])}"
        + "".join(f"\n  {row['kind']} {row['source']}" for row in report["host"]),
        f"illegal       {len(report['violations'])}" + "".join(f"\n  {text}" for text in report["violations"]),
        "",
        "nodes by kind: " + _kinds(report["nodes"]),
        "",
        "by block (moving activations in brackets):",
    ]
    for names, block in groups(report):
        moved = block["moving_activations"]
        lines.append(
            f"  {names}: {sum(block['nodes'].values())} nodes, {block['flops'] / 1e12:.4f} TFLOP, "
            f"{block['bytes'] / 1e9:.3f} GB: {_kinds(block['nodes'])}" + (f" [{_kinds(moved)}]" if moved else "")
        )
    lines += ["", "data movement and conversion" + (" of activations" if short else "") + ", by the line that made it:"]
    for row in report["movements"]:
        if not short or row["of"] == ACTIVATIONS:
            lines.append(
                f"  {row['count']:4} x {row['kind']:<12} {row['result']:<38} {row['of']:<11} {row['source']} "
                f"({row['blocks']})"
            )
    if "launches" in report:
        lines += ["", "launched by MindSpore's back end, by its type of kernel (views launch nothing):"]
        lines += [f"  {name:<7} {sum(kinds.values()):5}: {_kinds(kinds)}" for name, kinds in report["launches"].items()]
        lines += ["", "the same by the line that made it, of a backward pass the line that it differentiates:"]
        lines += [f"  {line}: {_kinds(kinds)}" for line, kinds in report["lines"].items()]
    if report["repeated"]:
        lines += ["", "computed from parameters alone, again at every call:"]
        lines += [
            f"  {row['count']:4} x {row['node']}, {row['bytes'] / 1e6:.2f} MB moved" for row in report["repeated"]
        ]
    return "\n".join(lines)


def _sampler(sampler):
    if sampler is None:
        return []
    takes = f"{sampler['numbers']} numbers a step, {sampler['kept']} latents kept; noise: {sampler['noise']}"
    return [f"sampler       {sampler['name']}: {takes}"]


def _kinds(counts):
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))

"""Exports a cell as MINDIR on a host without an NPU, and reads the graph with the source line of every node."""

import contextlib
import os
import tempfile
from pathlib import Path

import mindspore as ms

from mindsigma.errors import MindSigmaError
from mindsigma.inspect.graph import parse_model, read_sources
from mindsigma.weights.formats.atomic import naming, replacing

ROOT = Path(__file__).resolve().parents[2]
LAST_PASS = "validate"  # after it MindSpore writes the MINDIR


def export_graph(cell, out=None, weights=False):
    """Compile a FlatInputs cell as an NPU would get it from the front end; returns its Graph.

    The kernels are what the cell was built for; the host's own device decides nothing before the backend.

    Args:
        out: Path of a .mindir file to write, or None. Above 1 GB of weights MindSpore splits it into NAME_graph.mindir
            and the folder NAME_variables.
        weights: whether the file holds the weights. Without, the parameters need not hold data.
    """
    if out is not None and out.suffix != ".mindir":
        raise MindSigmaError(f"--out {out}: a graph is written as .mindir")
    taken = {}

    def take(model):
        taken["graph"] = model
        if out is not None and not weights:
            with naming(out):
                out.parent.mkdir(parents=True, exist_ok=True)
            with replacing(out) as file:
                file.write(model.SerializeToString())
        if out is None or not weights:
            taken["parameters"] = list(model.graph.parameter)
            model.graph.ClearField("parameter")  # nothing is left for MindSpore to write

    with tempfile.TemporaryDirectory(dir=_folder_beside(out) if weights else None) as folder:
        with _graph_mode(), _dumped(folder):
            ms.export(cell, *cell.inputs, file_name=f"{folder}/{_stem(out)}", file_format="MINDIR", custom_func=take)
        sources = {}
        for file in Path(folder).glob(f"ir/*_{LAST_PASS}_*.ir"):
            sources.update(read_sources(file.read_text(encoding="utf-8", errors="replace"), ROOT))
        if out is not None and weights:
            _move(Path(folder), out)
    model = taken["graph"]
    if "parameters" in taken:
        model.graph.parameter.extend(taken["parameters"])
    return parse_model(model, sources)


def _stem(out):
    return "graph" if out is None else out.stem


def _folder_beside(out):
    if out is None:
        return None
    with naming(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def _move(folder, out):
    """Put what MindSpore wrote under the target's name in its place; after an error what stood there stands again."""
    aside, moved = folder / "aside", []
    aside.mkdir()
    with naming(out):
        try:
            for name in (f"{out.stem}_variables", f"{out.stem}_graph.mindir", f"{out.stem}.mindir"):
                made, target = folder / name, out.parent / name
                if not made.exists():
                    continue
                for source, place in ((target, aside / name), (made, target)):
                    if os.path.lexists(source):
                        os.replace(source, place)
                        moved.append((source, place))
        except BaseException:
            for source, place in reversed(moved):
                os.replace(place, source)
            raise


@contextlib.contextmanager
def _graph_mode():
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=mode)


@contextlib.contextmanager
def _dumped(folder):
    """MindSpore's text of the graph after its last pass, which names source lines; the MINDIR itself does not."""
    before = os.environ.get("MS_DEV_DUMP_IR_PASSES")
    os.environ["MS_DEV_DUMP_IR_PASSES"] = LAST_PASS
    ms.set_context(save_graphs=1, save_graphs_path=f"{folder}/ir")
    try:
        yield
    finally:
        ms.set_context(save_graphs=0)
        if before is None:
            del os.environ["MS_DEV_DUMP_IR_PASSES"]
        else:
            os.environ["MS_DEV_DUMP_IR_PASSES"] = before

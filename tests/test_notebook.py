"""The notebook: every cell runs, in order, and gives a picture where it ends with one."""

import ast
import json
from pathlib import Path

from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "first_pictures.ipynb"


def test_every_cell_runs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names, pictures = {}, []
    for cell in notebook["cells"]:
        assert set(cell) >= {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None  # none are stored
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        value = None if last is None else eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
        if isinstance(value, Image.Image):
            pictures.append(value)
    assert [picture.size for picture in pictures] == [(256, 256), (512, 512), (768, 256), (256, 256), (256, 256)]
    assert all(max(high - low for low, high in picture.getextrema()) > 100 for picture in pictures)

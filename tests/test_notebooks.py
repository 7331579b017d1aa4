"""The code cells of every notebook run in order, and the figures that they show can be drawn."""

import ast
import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_cells_run_and_draw_their_figures(path):
    """All cells share one namespace."""
    matplotlib.use("Agg")
    namespace: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "notebooks are committed without outputs"
        tree = ast.parse("".join(cell["source"]), path.name)
        # Evaluate the last expression separately: a notebook shows its value.
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else ast.parse("None").body[0]
        exec(compile(tree, path.name, "exec"), namespace)
        value = eval(compile(ast.Expression(last.value), path.name, "eval"), namespace)
        if hasattr(value, "_repr_png_"):
            assert value._repr_png_(), "an image or figure that draws itself"
    plt.close("all")


def test_notebook_marks_lines_to_change_for_own_model():
    marks = {"attention_analysis": ("# 7B:", 2), "ablation_tables": ("# yours:", 1), "smol_study": ("# yours:", 1)}
    for path in NOTEBOOKS:
        mark, count = marks[path.stem]
        code = [cell["source"] for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        assert sum(mark in line for lines in code for line in lines) == count

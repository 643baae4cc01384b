"""Runs examples/first_steps.ipynb from top to bottom and keeps in it what its cells print and show.

python docs/notebook.py     no Jupyter needed: a cell is executed, and its last expression shown where it is a picture
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

FILE = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"


def run(source: str, known: dict[str, Any]) -> list[dict[str, Any]]:
    """The outputs of a cell, as a notebook has them; `known`: the names of the cells before it, which it adds to."""
    tree, printed = ast.parse(source), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "a cell", "exec"), known)
        value = (
            eval(compile(ast.Expression(last.value), "a cell", "eval"), known) if isinstance(last, ast.Expr) else None
        )
    found: list[dict[str, Any]] = []
    if printed.getvalue():
        found.append({"output_type": "stream", "name": "stdout", "text": printed.getvalue()})
    if isinstance(value, Image.Image):
        data = io.BytesIO()
        value.save(data, "PNG")
        shown = {"image/png": base64.b64encode(data.getvalue()).decode()}
        found.append({"output_type": "display_data", "metadata": {}, "data": shown})
    return found


def executed(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with the outputs of its cells, run one after another from nothing."""
    known: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count += 1
            cell = cell | {"execution_count": count, "outputs": run("".join(cell["source"]), known)}
        cells.append(cell)
    return notebook | {"cells": cells}


if __name__ == "__main__":
    told = executed(json.loads(FILE.read_text("utf-8")))
    FILE.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", "utf-8")

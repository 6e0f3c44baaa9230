"""Notebooks without Jupyter: code cells run in one namespace, and what they show is kept, as in IPython."""

import ast
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
VOID = {"img", "br", "circle", "polyline"}  # elements without an end tag, or that end themselves
OWN_COLOR = re.compile(r"background|color\s*[:=]|#[0-9a-f]{3}|(?:fill|stroke)=\"(?!none|currentColor)", re.I)


def read_cells(name: str) -> list[dict[str, Any]]:
    """The cells of a notebook, each with its text as "source"."""
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return [cell | {"source": "".join(cell["source"])} for cell in cells]


class Pages(HTMLParser):
    """Parser that fails on elements that do not end, and keeps the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.texts, self.tags = list[str](), list[str](), set[str]()
        self.feed(content)
        self.close()
        assert not self.open, f"not ended: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def check_html(content: str) -> Pages:
    """Whole elements, no script, and no color but that of the page around it; returns what was parsed."""
    pages = Pages(content)
    assert "script" not in pages.tags
    found = OWN_COLOR.search(re.sub(r'src="data:[^"]*"', "", content))
    assert found is None, f"{found[0] if found else ''}: readable in light and dark only without own colors"
    return pages


def render(value: Any) -> dict[str, Any]:
    """What a notebook shows of a value: all of its forms that have content, checked, and its text."""
    shown: dict[str, Any] = {"text": repr(value)}
    if (method := getattr(value, "_repr_html_", None)) is not None:
        assert isinstance(content := method(), str) and content
        check_html(content)
        shown["html"] = content
    if (method := getattr(value, "_repr_png_", None)) is not None and (png := method()) is not None:
        image = Image.open(BytesIO(png))
        image.load()
        assert image.format == "PNG"
        shown["png"] = image
    return shown


def run_notebook(
    name: str, parameters: dict[str, Any], before: Callable[[int], None] = lambda cell: None
) -> tuple[dict[str, Any], list[tuple[Any, dict[str, Any]]]]:
    """Run all code cells, with other values of the cell tagged "parameters".

    Returns the names at the end, and each value shown with its forms. before: called before each cell.
    """
    shown: list[tuple[Any, dict[str, Any]]] = []

    def display(*values: Any) -> None:
        shown.extend((value, render(value)) for value in values if value is not None)

    names: dict[str, Any] = {"__name__": "__main__", "display": display}
    for number, cell in enumerate(read_cells(name)):
        if cell["cell_type"] != "code":
            continue
        before(number)
        where, tree = f"{name}.ipynb, cell {number}", ast.parse(cell["source"])
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, where, "exec"), names)
        if isinstance(last, ast.Expr):
            display(eval(compile(ast.Expression(last.value), where, "eval"), names))
        if "parameters" in cell["metadata"].get("tags", ()):
            assert parameters.keys() <= names.keys(), "a parameter that the notebook does not have"
            names |= parameters
    return names, shown

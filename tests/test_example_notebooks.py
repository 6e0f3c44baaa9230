"""The notebooks in tests/examples/notebooks: every cell runs, and what is shown has content."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.notebooks import FOLDER, read_cells, run_notebook

# By notebook: small values of its parameters, and what is shown with an image or a table.
NOTEBOOKS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "draw_and_look_inside": (
        {"STEPS": 3, "PROBE_STEPS": 1, "PROBE_IMAGES": 4},
        {"KolorsPipeline": 1, "KolorsPipelineOutput": 1, "Schedule": 2, "AttentionMaps": 1, "Explanation": 1,
         "Features": 1, "Plan": 1, "QuantizationReport": 1, "Image": 4},
    ),
    "change_a_block": (
        {"STEPS": 2, "BATCH": 4, "DRAW_STEPS": 2, "STUDY_STEPS": 2, "SEEDS": 2, "WIDTH": 0.25},
        {"KolorsPipeline": 1, "Losses": 1, "Comparison": 1},
    ),
    "lora_and_few_steps": (
        {"STEPS": 2, "BATCH": 2, "RANK": 2, "OTHERS": 2, "KEPT": 2, "STUDENT_STEPS": 2, "STUDENT_BATCH": 2,
         "INFERENCE_STEPS": 2},
        {"KolorsPipeline": 1, "LoRAResult": 1, "Losses": 2, "Schedule": 1, "Image": 3},
    ),
}  # fmt: skip
SHOWN = "class A:\n    def _repr_html_(self):\n        return '{}'\nA()"
MOST_CELLS, MOST_LINES = 39, 22  # of a notebook, and of a code cell


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_runs_and_shows_what_it_is_to_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.ERROR, "kolors_core")  # two steps: warnings
    parameters, expected = NOTEBOOKS[name]
    with torch.random.fork_rng():
        _, shown = run_notebook(name, parameters)
    counts: dict[str, int] = {}
    for value, forms in shown:
        if forms.keys() - {"text"}:
            counts[type(value).__name__] = counts.get(type(value).__name__, 0) + 1
    assert counts == expected


def test_the_folder_has_these_notebooks() -> None:
    assert {file.stem for file in FOLDER.glob("*.ipynb")} == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_short_and_without_results(name: str) -> None:
    """As it is kept: nothing of a run in it, so that a difference between versions is one of the text."""
    book = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    cells = read_cells(name)
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    assert 10 < len(cells) <= MOST_CELLS and len({cell["id"] for cell in cells}) == len(cells)
    assert cells[0]["cell_type"] == "markdown" and cells[0]["source"].startswith("# ")
    for cell in cells:
        assert cell["source"].strip(), cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, cell["id"]
            assert len(cell["source"].splitlines()) <= MOST_LINES, cell["id"]
        for target in re.findall(r"\]\(([^)#\s]+)", cell["source"]) if cell["cell_type"] != "code" else ():
            assert target.startswith("https://") or (FOLDER / target).exists(), target


def test_it_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in a cell, a parameter that is not there, and HTML with a color of its own."""
    for source, error in (
        ("1 / 0", ZeroDivisionError), ("STEP = 1", AssertionError),
        (SHOWN.format("<b style=color:red>x</b>"), AssertionError), (SHOWN.format("<b>x"), AssertionError),
    ):  # fmt: skip
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": [source]}
        (tmp_path / "book.ipynb").write_text(json.dumps({"cells": [cell]}))
        monkeypatch.setattr("tests.support.notebooks.FOLDER", tmp_path)
        with pytest.raises(error):
            run_notebook("book", {"STEPS": 1} if source.startswith("STEP") else {})

"""Docstrings say what a thing is or does, in the field's words: banned openings and words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    file for package in ("kolors_core", "weights_convert") for file in (ROOT / package).rglob("*.py")
)
# No docstring begins so: a module or class begins with its noun, a function with its verb.
ANYWHERE = {
    "What", "Who", "Whom", "Where", "How", "Of", "Within", "Whose", "Whatever", "Every", "Each", "All", "In",
    "Beside",
}  # fmt: skip
# Nor a function: it does something, and its first word is a verb.
FUNCTION = {"The", "A", "An", "One", "For", "Its", "Some", "Two", "Several"}
WORDS = re.compile(
    r"\b(told|hears|lends|lent|made anew|make anew|what it is to|the one that)\b", re.IGNORECASE
)


def docstrings(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node, text


def is_property(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        "property" in ast.unparse(d) for d in node.decorator_list
    )


def fault(node: ast.AST, text: str) -> str | None:
    """What is wrong with a docstring, if anything is."""
    first = re.split(r"[\s,.:;]", text, maxsplit=1)[0]
    if first in ANYWHERE:
        return f"begins with {first}"
    acts = isinstance(node, ast.FunctionDef) and not is_property(node) and node.name != "__init__"
    if acts and (first in FUNCTION or not first[:1].isupper()):
        return f"begins with {first or text[:1]!r}, expected a verb"
    if found := WORDS.search(text):
        return f"says {found[0]!r}"
    return None


@pytest.mark.parametrize(
    "file", FILES, ids=lambda file: ".".join(file.relative_to(ROOT).with_suffix("").parts)
)
def test_docstrings_say_what_a_thing_is_or_does(file: Path) -> None:
    faults = [
        f"{file.name}:{getattr(node, 'lineno', 1)} {why}: {text.splitlines()[0]}"
        for node, text in docstrings(ast.parse(file.read_text()))
        if (why := fault(node, text)) is not None
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "code",
    [
        '"""What a model reads."""', 'class A:\n    """Within it nothing happens."""',
        'def f():\n    """The latents."""', 'def f():\n    """x: [B, C]."""',
        'def f():\n    """Return what is told."""',
    ],
)  # fmt: skip
def test_it_can_fail(code: str) -> None:
    assert any(fault(node, text) for node, text in docstrings(ast.parse(code)))

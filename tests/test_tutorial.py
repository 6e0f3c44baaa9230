"""The tutorial: its blocks run one after another, as a reader types them, and print what it shows."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.ablate.__main__ import arguments, main
from benchmarks.ablate.lesson import ImageLesson
from kolors_core import record_attention, registry
from kolors_core.unet import TransformerBlock
from tests.support.scene_recipes import needs_fonts
from tests.test_readme import text_of

PAGE = "kolors_core/TUTORIAL.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```\n(?:```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
# What a block has, and what the test has in its place: fewer steps, images, things and seeds.
LESS = {
    "num_inference_steps=10": "num_inference_steps=2", '"0123456789"': '"01"', "steps=60": "steps=2",
    "batch_size=16": "batch_size=2", "slice(0, 16)": "slice(0, 2)", "range(54, 60)": "range(2)",
    "draw_pictures(20": "draw_pictures(2", "--steps 160": "--steps 2 --concepts 2 --size 32",
}  # fmt: skip


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str, str]]]:
    """Language, code and shown output of each block, in a folder and with a registry of the page's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_models", {})
    monkeypatch.setattr(os, "getloadavg", lambda: (9.0, 9.0, 9.0))  # times are not taken beside other work
    monkeypatch.setattr(ImageLesson, "steps", 2)
    before = set(sys.modules)
    with torch.random.fork_rng():
        yield BLOCK.findall(text_of(PAGE))
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def masked(text: str) -> str:
    """A text without the values of its numbers, which fewer steps change."""
    return re.sub(r"\d+(\.\d+)?", "#", text)


@needs_fonts
def test_the_blocks_print_what_the_page_shows(
    page: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    left = dict(LESS)
    for language, code, shown in page:
        for part in [part for part in LESS if part in code]:
            code = code.replace(part, LESS[part])
            left.pop(part, None)
        if "class GatedUNet" in code:
            Path("gated.py").write_text(code)
        elif language == "python":
            exec(compile(code, PAGE, "exec"), names)
            printed = capsys.readouterr().out
            assert printed == shown or ("Trainer" in code and masked(printed) == masked(shown))
        else:
            monkeypatch.setattr(sys, "argv", shlex.split(code)[2:])
            main(arguments())
            printed = capsys.readouterr().out
            rows = {line.split(" | ")[0] for line in printed.splitlines()}
            assert {line.split(" | ")[0] for line in shown.splitlines()} <= rows and len(shown) > 200
    assert not left, "the page has these"
    gates_act_as_the_page_says(names)
    assert Image.open("gates.png").height > 29 * 24


@torch.no_grad()
def gates_act_as_the_page_says(names: dict[str, Any]) -> None:
    """What else an attention has still works: its map is recorded, and in perturbed rows the identity."""
    unet, plain = names["unet"], names["original"].unet
    blocks = [block for block in unet.modules() if isinstance(block, TransformerBlock)]
    gates = [block.self_attention.gate for block in blocks]
    assert len(gates) == 7 and all(gate.weight.any() for gate in gates), "each was trained"
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 192)
    given = x, torch.tensor(500), text, text[:, 0], torch.zeros(2, 6)
    perturbed = [1] * len(blocks)
    with record_attention(unet, "*self_attention", None) as maps:
        moved = unet(*given, perturbed=perturbed)
    assert len(maps) == len(blocks) and not torch.equal(moved, unet(*given))
    assert not torch.equal(moved, plain(*given, perturbed=perturbed))
    for gate in gates:
        gate.weight.zero_(), gate.bias.zero_()
    assert torch.equal(unet(*given, perturbed=perturbed), plain(*given, perturbed=perturbed))
    names["changed"].load_lora_weights("tiny")
    names["original"].load_lora_weights("tiny")
    assert torch.equal(unet(*given), plain(*given)) and not torch.equal(unet(*given), moved)

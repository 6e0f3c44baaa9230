"""The examples of the pages about memory run: DRAWING.md and performance/MEMORY.md."""

import re
from pathlib import Path

import pytest
from PIL import Image

from kolors_core.performance.quantize import is_quantized
from tests.test_readme import block_with, run, text_of


def test_the_example_of_the_published_model_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the embedded model in the place of the published one."""
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/DRAWING.md"
    code = block_with("pipe.enable_model_cpu_offload()", page)
    for published, here in (
        ('"Kwai-Kolors/Kolors-diffusers",\n    variant="fp16"', '"tiny"'), ("float16", "float32"),
        ("num_inference_steps=25", "num_inference_steps=2"),
    ):  # fmt: skip
        assert published in code
        code = code.replace(published, here)
    pipe = run(code, page)["pipe"]
    assert Image.open("ladybug.png").size == (128, 128)
    assert is_quantized(pipe.text_encoder) and not is_quantized(pipe.unet)


def test_the_example_of_less_memory_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = "kolors_core/performance/MEMORY.md"
    run(block_with("quantize(pipe", page), page)
    assert "text_encoder int8" in capsys.readouterr().out


def test_the_example_of_quantized_models_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = "kolors_core/performance/MEMORY.md"
    pipe = run(block_with("quantization={", page), page)["pipe"]
    assert pipe.name_or_path == "kolors-small" and is_quantized(pipe.unet)


def test_the_example_of_a_plan_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the embedded model; the table of the published one has the same rows."""
    page = "kolors_core/performance/MEMORY.md"
    run(block_with("plan(pipe", page).replace("Kwai-Kolors/Kolors-diffusers", "tiny"), page)
    shown = text_of(page).partition("```\nGiB for ")[2].partition("```")[0].splitlines()
    printed = capsys.readouterr().out.removeprefix("GiB for ").splitlines()
    numbers = re.compile(r" +\d+\.\d+")
    assert [numbers.sub("", line) for line in printed] == [numbers.sub("", line) for line in shown]

"""What the parsers' own constants stand for, LoRAs in part, and metadata that flags override."""

import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kolors_core.__main__ import main
from kolors_core.checkpoint import EMBEDDED_NAME
from kolors_core.cli import options, parsers, samplers
from kolors_core.performance.quantize import FORMATS
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.pipelines.request import CONTROL_SCALE
from tests.support.loras import write_noisy

SMALL = ["--height", "64", "--width", "64", "--steps", "2", "--device", "cpu", "-q"]


def test_what_the_parsers_repeat_is_what_the_library_has() -> None:
    """They import none of it, so that help needs no torch."""
    assert tuple(samplers.SAMPLERS) == parsers.SAMPLERS and tuple(options.DTYPES) == parsers.DTYPES
    assert tuple(samplers.SCHEDULES) == parsers.SCHEDULES
    assert (parsers.EMBEDDED_NAME, parsers.CONTROL_SCALE) == (EMBEDDED_NAME, CONTROL_SCALE)
    assert tuple(map(str, FORMATS)) == parsers.FORMATS


@pytest.mark.parametrize("text", ["", "could not create a primitive"])
def test_lack_of_memory_while_loading_is_one_line(text: str, capsys: pytest.CaptureFixture) -> None:
    """A CPU's is a RuntimeError, which else is a fault of the library and has its traceback."""

    def run(message: str) -> None:
        if message:
            raise RuntimeError(message)
        torch.empty(2**50)

    quiet = Namespace(quiet=True)
    assert options.run_command(lambda _: run(text), quiet) == 2
    assert re.fullmatch(r"error: .*(allocate|primitive).*\n", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="of shapes"):
        options.run_command(lambda _: run("of shapes"), quiet)


@pytest.fixture(scope="module")
def partial_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that fits, with tensors for a text encoder of SDXL beside it."""
    file = tmp_path_factory.mktemp("lora") / "one.safetensors"
    write_noisy(file)
    both = load_file(file) | {"lora_te2_text_projection.lora_down.weight": torch.ones(2, 4)}
    save_file(both, file)
    return file


def test_a_lora_is_taken_in_part_when_asked(
    partial_lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["a cat", *SMALL, "--seed", "3", "--lora", str(partial_lora), "-o", str(tmp_path / "a.png")]
    assert main(command) == 2
    assert "lora_te2_text_projection.lora_down.weight. --lora-partial takes what" in capsys.readouterr().err
    assert main([*[part for part in command if part != "-q"], "--lora-partial"]) == 0
    assert "1 unmatched: lora_te2_text_projection" in capsys.readouterr().err


def test_flags_override_what_an_image_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = str(tmp_path / "a.png")
    plain = ["-n", "dog", "-g", "3", "--sampler", "euler"]
    assert main(["a cat", *SMALL, *plain, "--seed", "3", "-o", first]) == 0
    told = read_metadata(first)
    for number, (flags, changed) in enumerate([
        ([], {}), (["--seed", "4"], {"seed": "4"}), (["a dog"], {"prompt": "a dog"}),
        (["--steps", "3"], {"steps": "3"}), (["--guidance", "5"], {"guidance_scale": "5.0"}),
        (["--sampler", "dpmpp-2m"], {"sampler": "DPMSolverMultistepScheduler"}),
        (["--height", "72"], {"size": "64x72"}), (["-n", "frog"], {"negative_prompt": "frog"}),
    ]):  # fmt: skip
        out = tmp_path / f"{number}.png"
        assert main(["--from", first, *flags, "-o", str(out), "-q"]) == 0, capsys.readouterr().err
        again = read_metadata(out)
        differing = {name: value for name, value in again.items() if told.get(name) != value}
        assert differing.items() >= changed.items() and len(differing) <= len(changed) + 1, differing
        same = np.array_equal(np.asarray(Image.open(out)), np.asarray(Image.open(first)))
        assert same == (not flags), flags


def test_from_a_file_that_says_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    for name in ("plain.png", "none.png"):
        assert main(["--from", str(tmp_path / name), "-o", str(tmp_path / "x.png")]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and name in error and len(error.splitlines()) == 1

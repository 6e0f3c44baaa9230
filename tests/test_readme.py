"""What the README shows runs, and gives what it says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block_after(heading: str, language: str) -> str:
    found = re.search(rf"{re.escape(heading)}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, heading
    return found[1]


def test_the_path_written_out_gives_the_pipelines_picture(
    reference_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kolors-small").symlink_to(reference_folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(block_after("## The whole path", "python"), "README.md", "exec"), {})
    command = [
        "一张瓢虫的照片",
        "-w",
        "kolors-small",
        "-o",
        "pipeline.png",
        "--seed",
        "7",
        "--device",
        "cpu",
        "-q",
    ]
    assert subprocess.run([sys.executable, "-m", "kolors_core", *command]).returncode == 0
    written, made = (np.asarray(Image.open(name)).astype(int) for name in ("ladybug.png", "pipeline.png"))
    assert written.shape == made.shape == (128, 128, 3)
    assert abs(written - made).max() <= 1


def test_the_path_written_out_is_about_thirty_lines() -> None:
    assert len(block_after("## The whole path", "python").splitlines()) <= 32


def test_every_file_and_test_that_is_named_exists() -> None:
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (root / path).exists(), path
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (root / "tests" / name).exists(), name

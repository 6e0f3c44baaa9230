"""What the README shows runs, and gives what it says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.training.test_data import write_pictures

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block_after(heading: str, language: str) -> str:
    found = re.search(rf"{re.escape(heading)}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found, heading
    return found[1]


def test_the_path_written_out_gives_the_pipelines_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block_after("## The whole path", "python"), "README.md", "exec"), {})
    command = ["一张瓢虫的照片", "-o", "pipeline.png", "--seed", "7", "--device", "cpu", "-q"]
    assert subprocess.run([sys.executable, "-m", "kolors_core", *command]).returncode == 0
    written, made = (np.asarray(Image.open(name)).astype(int) for name in ("ladybug.png", "pipeline.png"))
    assert written.shape == made.shape == (128, 128, 3)
    assert abs(written - made).max() <= 1


def test_the_image_to_image_example_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block_after("**Image to image.**", "python"), "README.md", "exec"), {})
    made = np.asarray(Image.open("ladybug.png")).astype(int)
    assert made.shape == (128, 128, 3)
    red, black = (made[..., 0] > 180) & (made[..., 1] < 90), made.max(axis=2) < 90
    assert red.mean() > 0.1 and black.mean() > 0.05, "a red sketch became a ladybug with black spots and legs"


def test_the_inpainting_example_keeps_what_the_mask_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block_after("**Inpainting.**", "python"), "README.md", "exec"), names)
    made, given = (np.asarray(picture) for picture in (Image.open("repainted.png"), names["picture"]))
    same = (made == given).all(axis=-1)
    assert same[:64].all() and same[:, :64].all() and not same[64:, 64:].all()


def test_the_guidance_example_draws() -> None:
    names: dict[str, Any] = {}
    exec(compile(block_after("**Guidance rules**", "python"), "README.md", "exec"), names)
    assert names["pipe"].freeu == {"s1": 0.9, "s2": 0.2, "b1": 1.1, "b2": 1.2}


def test_the_example_of_looking_inside_runs() -> None:
    names: dict[str, Any] = {}
    block = block_after("## Looking inside", "python").replace(
        "num_inference_steps=25", "num_inference_steps=15"
    )
    exec(compile(block, "README.md", "exec"), names)
    assert names["maps"]["mid.attentions.0.blocks.0.cross_attention"].ndim == 4
    assert [len(kept) for kept in names["kept"].values()] == [15, 15]


def test_the_lora_example_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    write_pictures(tmp_path / "pictures")
    example = block_after("## Training", "python").replace("steps=400", "steps=2")
    exec(compile(example, "README.md", "exec"), {})
    assert Image.open("zorp.png").size == (128, 128)
    assert all(name.startswith("unet.") for name in load_file("zorp.safetensors"))


def test_the_example_of_less_memory_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block_after("**Less memory**", "python"), "README.md", "exec"), {})
    assert "text_encoder int8" in capsys.readouterr().out


def test_the_path_written_out_is_about_thirty_lines() -> None:
    assert len(block_after("## The whole path", "python").splitlines()) <= 32


def test_every_file_and_test_that_is_named_exists() -> None:
    root = Path(__file__).parents[1]
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (root / path).exists(), path
    for name in re.findall(r"`(test_\w+\.py)`", README):
        assert (root / "tests" / name).exists(), name

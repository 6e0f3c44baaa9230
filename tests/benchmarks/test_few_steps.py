"""The command that distils the embedded model, at its smallest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.tiny import few_steps
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.few_steps import CONFIG, RIGHT_STEPS, SCHEDULERS, STUDENTS, draw, run
from kolors_core import KolorsPipeline
from tests.support.scene_recipes import GRAMMAR, needs_fonts, scene_pipe
from tests.support.small import relative_error


def test_all_samplers_start_from_the_same_noise() -> None:
    """One step leads from it to the denoised image, whatever the sampler; TCD's is at another timestep."""
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    found = {name: draw(pipe, ["a cat"], scheduler, 1, 1.0)[0] for name, scheduler in SCHEDULERS.items()}
    again, seconds = draw(pipe, ["a cat", "a dog"], SCHEDULERS["dpm++ 2m karras"], 1, 1.0)
    assert seconds > 0 and again.shape == (2, 4, 16, 16)
    assert relative_error(again[:1], found["dpm++ 2m karras"]) < 1e-4, "an image has a seed of its own"
    distance = {name: (found[name] - again[:1]).square().mean().item() for name in ("lcm", "tcd")}
    apart = (again[0] - again[1]).square().mean().item()
    assert distance["lcm"] < 1e-8 and distance["tcd"] < 0.02 * apart, distance


@needs_fonts
def test_it_trains_measures_and_leaves_the_model_as_it_was(
    small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = scene_pipe(small_tokenizer)
    monkeypatch.setattr(few_steps, "RIGHT_STEPS", 3)
    monkeypatch.setattr(few_steps, "SHOWN_AT_MOST", 2)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    unet, scheduler = pipe.unet, pipe.scheduler
    config = replace(CONFIG, steps=1, batch_size=2, warmup=0, max_tokens=48, dtype=torch.float32)
    names = ["tcd-5", "lcm-5-whole"]
    detector = Detector().eval().requires_grad_(False)
    run(pipe, detector, GRAMMAR, tmp_path, names, config, 2, counts=(1, 2))
    assert pipe.unet is unet and pipe.scheduler is scheduler
    after = unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    result = json.loads((tmp_path / "few_steps.json").read_text())
    rows = {(row["student"], row["sampler"], row["steps"], row["language"]): row for row in result["rows"]}
    assert len(rows) == 2 * (1 + 3 * 2 + 2 * 2), "in both languages: right, untrained, students"
    distances = [row["distance"] for row in result["rows"] if row["guidance"] == 5 and row["steps"] < 3]
    assert min(distances) > 0 and len(distances) == 20
    assert len(set(distances)) == 18, "each is another way to draw, but for one step of DPM++ and of LCM"
    assert {row["guidance_in_drawing"] for row in result["rows"] if row["student"] != "none"} == {1.0}
    assert len(load_file(tmp_path / "tcd-5.safetensors")) == 64
    assert result["trained"]["tcd-5"]["bytes"] < 1_000_000, "what may be shipped"
    assert result["trained"].keys() == set(names) and (tmp_path / "few_steps.png").exists()
    assert {student.guidance for student in STUDENTS.values()} == {1.0, 5.0} and RIGHT_STEPS == 100

"""The command that fine-tunes the embedded model to other targets, at its smallest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tiny import targets
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.targets import CONFIG, WAYS, run
from kolors_core import KolorsPipeline
from tests.support.scene_recipes import GRAMMAR, needs_fonts, scene_pipe


@needs_fonts
def test_each_model_is_trained_saved_with_its_target_and_drawn_by_three_samplers(
    small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = scene_pipe(small_tokenizer)
    monkeypatch.setattr(targets, "STEPS", 2)
    monkeypatch.setattr(targets, "SHOWN_AT_MOST", 1)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    config = replace(CONFIG, steps=1, batch_size=2, warmup=0, max_tokens=48, dtype=torch.float32)
    run(pipe, Detector().eval().requires_grad_(False), GRAMMAR, tmp_path, config, 2)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    result = json.loads((tmp_path / "targets.json").read_text())
    rows = {(row["target"], row["sampler"], row["language"]) for row in result["rows"]}
    assert len(rows) == 3 * 3 * 2 and result["trained"].keys() == {"v", "velocity"}
    assert (tmp_path / "targets.png").exists()
    for name in ("v", "velocity"):
        tuned = KolorsPipeline.from_pretrained(tmp_path / name / "model")
        assert tuned.scheduler.prediction_type == WAYS[name].prediction_type
        assert any(not torch.equal(value, before[key]) for key, value in tuned.unet.state_dict().items())

"""The command that fine-tunes the embedded model to other targets, at its smallest."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tiny import targets
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.detector import Detector
from benchmarks.tiny.emoji import CONCEPTS, FONT, Concept
from benchmarks.tiny.scenes import SIGN_FONT
from benchmarks.tiny.targets import CONFIG, WAYS, run
from kolors_core import KolorsPipeline
from kolors_core.config import VAEConfig
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from tests.support.lora_recipes import shallow_pipe
from tests.support.small import SHALLOW, randomise

SMALLEST_VAE = VAEConfig(sample_size=128, channels=(8, 8, 8, 8), norm_groups=4)


@pytest.mark.skipif(
    not (FONT.exists() and SIGN_FONT.exists()), reason="Debian's Noto fonts of emoji and Chinese are missing"
)
def test_each_model_is_trained_saved_with_its_target_and_drawn_by_three_samplers(
    small_tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = shallow_pipe(small_tokenizer)
    pipe.unet, pipe.vae = UNet(replace(SHALLOW.unet, sample_size=16)), VAE(SMALLEST_VAE)
    for seed, model in enumerate((pipe.unet, pipe.vae)):
        randomise(model.eval().requires_grad_(False), seed)
    monkeypatch.setattr(targets, "STEPS", 2)
    monkeypatch.setattr(targets, "SHOWN_AT_MOST", 1)
    grammar = Grammar([Concept(c, (f"thing {i}",), (f"东西{i}",)) for i, c in enumerate(CONCEPTS)])
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    config = replace(CONFIG, steps=1, batch_size=2, warmup=0, max_tokens=48, dtype=torch.float32)
    run(pipe, Detector().eval().requires_grad_(False), grammar, tmp_path, config, 2)
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    result = json.loads((tmp_path / "targets.json").read_text())
    rows = {(row["target"], row["sampler"], row["language"]) for row in result["rows"]}
    assert len(rows) == 3 * 3 * 2 and result["trained"].keys() == {"v", "velocity"}
    assert (tmp_path / "targets.png").exists()
    for name in ("v", "velocity"):
        tuned = KolorsPipeline.from_pretrained(tmp_path / name / "model")
        assert tuned.scheduler.prediction_type == WAYS[name].prediction_type
        assert any(not torch.equal(value, before[key]) for key, value in tuned.unet.state_dict().items())

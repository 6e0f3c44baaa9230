"""Lesson "scenes": the embedded model, which composes, is trained on; a detector says what it draws.

A variant starts with the embedded UNet's values where names and shapes agree, so that this is for what is a
fine-tune: targets, noise schedules, losses, small parts. Scenes and prompts are the recipe's
(benchmarks/tiny); names are the embedded model's list.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablate.lesson import ImageLesson, Measure, Result, embedded
from benchmarks.ablate.models import Pupil
from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import FONT, SIZE, Concept
from benchmarks.tiny.judge import write_prompts
from benchmarks.tiny.quality import load_detector, measure_prompts
from benchmarks.tiny.scene_data import SceneLatents
from benchmarks.tiny.scenes import SIGN_FONT, pixels
from kolors_core.checkpoint import EMBEDDED
from kolors_core.training.data import Batch, derive_seed, draw_timesteps
from kolors_core.training.trainer import TrainingConfig

RECIPE = TrainingConfig(
    steps=1, batch_size=16, learning_rate=3e-4, schedule="cosine", warmup=20, adam_beta2=0.99,
    max_grad_norm=0.5, ema_decay=0.98, max_tokens=64, dtype=torch.bfloat16,
)  # fmt: skip
SHOWN = 12


def known_concepts() -> Grammar:
    """Return the grammar of the embedded model's things, from its own list."""
    listed = json.loads((EMBEDDED / "concepts.json").read_text(encoding="utf-8"))["concepts"]
    return Grammar([Concept(c["emoji"], tuple(c["english"]), tuple(c["chinese"])) for c in listed])


def check_fonts() -> None:
    """Raise FileNotFoundError unless the fonts are there that scenes are drawn with."""
    for font, package in ((FONT, "fonts-noto-color-emoji"), (SIGN_FONT, "fonts-noto-cjk")):
        if not font.exists():
            raise FileNotFoundError(f"{font}: no such file: `apt-get install {package}`")


class TimedScenes(SceneLatents):
    """Scenes whose timesteps are drawn as the settings say."""

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Return the `rows` of a step's batch."""
        batch, draw = super().batch(step, rows, device), torch.Generator()
        draw.manual_seed(derive_seed(self.config.seed, step, 3))
        times = draw_timesteps(self.config, self.timesteps, self.config.batch_size, draw)
        return replace(batch, timesteps=times[rows].to(device))


class Scenes(ImageLesson):
    """Lesson of scenes. detector: a folder with `detector.safetensors`, the recipe's `OUT/detector`.

    None: nothing is drawn. count: prompts of each language.
    """

    name, steps, starts_trained = "scenes", 20, True

    def __init__(self, detector: Path | None, count: int, recipe: TrainingConfig = RECIPE) -> None:
        check_fonts()
        if detector is not None and not (detector / "detector.safetensors").is_file():
            raise FileNotFoundError(
                f"{detector / 'detector.safetensors'}: no such file, expected the detector of the recipe "
                "(`python -m benchmarks.tiny.quality OUT` trains it)"
            )
        super().__init__(embedded(), SIZE // 8, recipe)
        self.detector = None if detector is None else load_detector(detector, torch.device("cpu"))
        self.grammar = known_concepts()
        self.asked = [prompt for i in (0, 1) for prompt in write_prompts(self.grammar, count, i)]
        with torch.no_grad():
            images = torch.stack([pixels(prompt.scene) for prompt in self.asked])
            latents = torch.cat([self.pipe.vae.encode_images(part).mean for part in images.split(32)])
        self.ask([prompt.text for prompt in self.asked], latents)
        self.measures = [Measure(name="held-out error", more_is="worse")]
        for name in ("all things", "ground", "characters", "whole prompt") if detector is not None else ():
            self.measures.append(Measure(name=name, more_is="better", form=".1f", unit="%", grain=50 / count))
        self.about = [
            f"The embedded model, trained on; {len(self.asked)} held-out prompts, half of them Chinese."
        ]

    def batches(self, pupil: Pupil, config: TrainingConfig) -> SceneLatents:
        """Return scenes of the config's seed; ValueError for a trained text encoder."""
        if pupil.text_encoder is not None:
            raise ValueError(f"{pupil.variant.text}: scenes train no text encoder; --lesson things does")
        timesteps = len(pupil.variant.change.scheduler.training_sigmas())
        return TimedScenes(self.grammar, self.tokenizer, self.text_encoder, self.pipe.vae, config, timesteps)

    def measure(self, pupil: Pupil, seed: int) -> Result:
        """Measure the held-out error, and the shares of prompts of which the detector finds what they say."""
        scores = {self.measures[0].name: self.held_out(pupil)}
        if self.detector is None:
            return Result(scores)
        drawn = self.draw(pupil, seed)
        shares = measure_prompts(self.detector, self.asked, drawn)[0]
        for measure, key in zip(self.measures[1:], ("present", "ground", "characters", "all"), strict=True):
            share = shares[key]["share"]
            scores[measure.name] = 100 * share if isinstance(share, float) else float("nan")
        shown = [i * len(drawn) // min(SHOWN, len(drawn)) for i in range(min(SHOWN, len(drawn)))]
        return Result(scores, drawn[shown], [self.asked[i].text for i in shown])

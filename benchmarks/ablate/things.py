"""Lesson "things": small images of single things on white, learned from scratch in minutes.

What the embedded model's frozen autoencoder and text encoder make is made once.
Shapes: N things, P prompts (each thing in each unseen phrasing).
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.ablate.lesson import ImageLesson, Measure, Result, embedded
from benchmarks.ablate.models import Pupil
from benchmarks.ablate.thing_captions import THINGS, UNSEEN, captions
from benchmarks.tiny.emoji import FONT, draw, on_white
from kolors_core.pipelines.lora_recipe import nearest
from kolors_core.training.data import Batches, Example, LatentDataset, load_pixels, read_folder
from kolors_core.training.trainer import TrainingConfig

RECIPE = TrainingConfig(
    steps=1, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=50, max_tokens=64
)  # fmt: skip
SHOWN = 12  # things on the sheet of samples


def draw_pictures(count: int, folder: str | Path) -> tuple[list[Example], list[str]]:
    """Images of emoji spread over all kinds of things, with captions, and their names.

    FileNotFoundError says where the font is to be had.
    """
    if not FONT.exists():
        how = "`apt-get install fonts-noto-color-emoji`, or https://github.com/googlefonts/noto-emoji"
        raise FileNotFoundError(f"{FONT}: no such file, expected the font Noto Color Emoji: {how}")
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    chosen, rows = [list(THINGS)[i * len(THINGS) // count] for i in range(count)], []
    for i, thing in enumerate(chosen):
        on_white(draw(thing)).save(folder / f"{i:04}.png")
        row = {"file_name": f"{i:04}.png", "text": captions(THINGS[thing])}
        rows.append(json.dumps(row, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return read_folder(folder), [THINGS[thing] for thing in chosen]


class Things(ImageLesson):
    """Lesson of N images with captions, examples and names. known: the images."""

    name = "things"

    def __init__(
        self, examples: Sequence[Example], names: Sequence[str], side: int, recipe: TrainingConfig = RECIPE
    ) -> None:
        super().__init__(embedded(), side // 8, recipe)
        self.names = names
        batches = Batches(examples, [(side, side)], recipe.batch_size, recipe.seed)
        self.data = LatentDataset(
            examples, batches, self.pipe.vae, self.tokenizer, recipe, frozen_text=self.text_encoder
        )
        self.size_ids = self.data.sizes[0]
        self.known = torch.stack([load_pixels(each, (side, side))[0] for each in examples])  # [N, 3, H, W]
        prompts = [phrase.format(x=name) for phrase in UNSEEN for name in names]
        self.ask(prompts, torch.stack([self.data.latents[i % len(names)][0] for i in range(len(prompts))]))
        self.measures = (
            Measure(name="held-out error", more_is="worse"),
            Measure(name="prompts drawn right", more_is="better", form=".1f", unit="%",
                    grain=100 / len(prompts)),
            Measure(name="pixels off the image asked for", more_is="worse"),
            Measure(name="brightness off", more_is="worse"),
        )  # fmt: skip
        self.about = [f"Images of {side}x{side} of {len(names)} things; {len(prompts)} prompts are drawn."]

    def batches(self, pupil: Pupil, config: TrainingConfig) -> LatentDataset:
        """Return the same images in the order and with the noise of the config's seed."""
        data, batches = copy.copy(self.data), copy.copy(self.data.batches)
        batches.seed, data.config, data.batches = config.seed, config, batches
        data.timesteps = len(pupil.variant.change.scheduler.training_sigmas())
        if pupil.text_encoder is not None:
            data.text = {}  # then batches have tokens
        return data

    def measure(self, pupil: Pupil, seed: int) -> Result:
        """Measure the held-out error, and what is drawn: is it nearest to the image asked for, how far off.

        Distances are root mean squares of values in [-1, 1]; brightness is an image's mean.
        """
        drawn, count = self.draw(pupil, seed), len(self.names)
        asked = self.known.repeat(len(self.prompts) // count, 1, 1, 1)  # [P, 3, H, W]
        found = self.recognize(drawn)
        right = sum(each == i % count for i, each in enumerate(found)) / len(found)
        off = (drawn - asked).square().mean((1, 2, 3)).sqrt()
        brightness = (drawn.mean((1, 2, 3)) - asked.mean((1, 2, 3))).abs()
        scores = (self.held_out(pupil), 100 * right, float(off.mean()), float(brightness.mean()))
        shown = [i * count // min(SHOWN, count) for i in range(min(SHOWN, count))]
        return Result(
            {one.name: score for one, score in zip(self.measures, scores, strict=True)},
            drawn[shown], [self.names[found[i]] for i in shown],
        )  # fmt: skip

    def recognize(self, images: Tensor) -> list[int]:
        """Find of each prompt's image [P, 3, H, W] the thing whose training image is nearest."""
        return nearest(images, self.known)

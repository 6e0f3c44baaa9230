"""Batches of scenes whose captions leave much to something else that the UNet is given: edges, or an image.

A caption that said all would leave a ControlNet or an IP-Adapter little to learn. Here some are empty, some
only name what is there, or a part of it, and the others are the grammar's.
Shapes: B images, P tokens of an image prompt.
"""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.scene_data import APART, SceneBatch, SceneLatents
from benchmarks.tiny.scenes import Scene, place, render
from kolors_core.adapters.clip_vision import CLIPVision, preprocess_clip
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest_model

EMPTY, BRIEF = 0.3, 0.4  # shares of captions; the others are whole
IMAGELESS = 0.1  # share of image prompts that are replaced by the mean colour, for guidance


def brief_caption(grammar: Grammar, scene: Scene, order: random.Random, language: int) -> str:
    """Name kinds of a scene, all or some: no number, place or ground. language: 0 English, 1 Chinese."""
    groups = order.sample(scene.groups, order.randint(1, len(scene.groups)))
    names = [grammar.phrase(group[:1], order, language) for group in groups]
    return (" and ", "和")[language].join(names)


def sparse_caption(grammar: Grammar, scene: Scene, order: random.Random, empty: float = EMPTY) -> str:
    """An empty, brief or whole caption of a scene, in either language."""
    draw, language = order.random(), order.randrange(2)
    if draw < empty:
        return ""
    if draw < empty + BRIEF * (1 - empty) / (1 - EMPTY):
        return brief_caption(grammar, scene, order, language)
    return grammar.say(scene, order, language).text


def another(scene: Scene, seed: int) -> Scene:
    """A scene of the same kinds, numbers, sign and ground, with everything at other places and sizes."""
    order = random.Random(seed)
    text = "".join(item.text for item in scene.items)
    counts = tuple(len(group) for group in scene.groups)
    return Scene(scene.ground, place(order, scene.kinds, counts, text), order.getrandbits(32))


class SparseScenes(SceneLatents):
    """`SceneLatents` with sparse captions."""

    empty = EMPTY

    def _caption(self, scene: Scene, step: int, row: int) -> str:
        order = random.Random(derive_seed(self.config.seed, step, 1, row))
        return sparse_caption(self.grammar, scene, order, self.empty)

    def record(self) -> dict[str, Any]:
        """What its batches depend on besides the step and the settings."""
        return {**super().record(), "captions": [self.empty, BRIEF]}


@dataclass(frozen=True)
class PromptedBatch(SceneBatch):
    """A batch with the image encoder's states of an image prompt for each image, [B, P, image_dim]."""

    states: Tensor | None = None


class PromptedScenes(SparseScenes):
    """Scenes, each with an image prompt that shows the same things elsewhere; few captions."""

    empty = 0.6

    def __init__(self, encoder: CLIPVision, *given: Any, **named: Any) -> None:
        """encoder: frozen. The others: as for `SceneLatents`."""
        super().__init__(*given, **named)
        self.encoder = encoder
        self._states: dict[tuple[int, int], Tensor] = {}

    def _make(self, step: int, rows: list[int], device: torch.device) -> None:
        super()._make(step, rows, device)
        if not rows:
            return
        places = [(step % APART, row) for row in rows]
        pictures = [render(another(self._made[p][1], derive_seed(self._made[p][0], 1))) for p in places]
        pixels = preprocess_clip(pictures, self.encoder.config.image_size)
        with self._autocast(device):
            states = self.encoder.penultimate(pixels.to(self.encoder.projection.weight)).float().cpu()
        self._states.update(zip(places, states, strict=True))

    @torch.no_grad()
    def batch(self, step: int, rows: slice, device: torch.device) -> PromptedBatch:
        """The `rows` of a step's batch."""
        batch = super().batch(step, rows, device)
        own = range(*rows.indices(self.config.batch_size))
        states = torch.stack([self._states[step % APART, row] for row in own]).to(device)
        draw = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 3))
        is_dropped = (torch.rand(self.config.batch_size, generator=draw)[rows] < IMAGELESS).to(device)
        states = torch.where(is_dropped[:, None, None], self._mean_colour(device), states)
        return PromptedBatch(**vars(batch), states=states)

    def record(self) -> dict[str, Any]:
        """What its batches depend on besides the step and the settings."""
        return {**super().record(), "image encoder": digest_model(self.encoder), "imageless": IMAGELESS}

    def _mean_colour(self, device: torch.device) -> Tensor:
        """States of the image that guidance takes for none, [1, P, image_dim]."""
        side = self.encoder.config.image_size
        pixels = torch.zeros(1, 3, side, side).to(self.encoder.projection.weight)
        return self.encoder.penultimate(pixels).float().to(device)

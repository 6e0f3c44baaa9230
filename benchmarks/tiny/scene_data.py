"""Batches of scenes for the UNet, made while it trains: drawn, encoded and captioned, and nothing stored.

Drawing and encoding a scene costs as much as a large part of a training step of it, so each is used several
times, with another caption, noise and timestep, some steps apart. A batch is a function of seed and step.
Shapes: B or b images, L tokens, P places of a grid, S of all that may be at one.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from benchmarks.tiny.captions import Grammar
from benchmarks.tiny.emoji import SIZE
from benchmarks.tiny.scenes import Scene, compose, render
from benchmarks.tiny.text import SEEN, grid_of
from kolors_core.chatglm import ChatGLM
from kolors_core.conditioning import size_ids
from kolors_core.image import pil_to_tensor, preprocess_control
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batch, derive_seed
from kolors_core.training.run_record import digest, digest_model
from kolors_core.training.trainer import TrainingConfig
from kolors_core.vae import VAE

APART = 32  # steps between two uses of a scene
USES = 12  # of a scene
DROPPED = 0.1  # captions, for guidance


@dataclass(frozen=True)
class SceneBatch(Batch):
    """A batch whose scenes are known. grid: what is at each place [b, P], of `SEEN`, S for nothing."""

    grid: Tensor | None = None


class SceneLatents:
    """Source of batches of scenes' latents and captions.

    control: maps an image to a ControlNet's control image, if that is what is trained.
    """

    def __init__(
        self, grammar: Grammar, tokenizer: Tokenizer, text_encoder: ChatGLM, vae: VAE, config: TrainingConfig,
        timesteps: int = 1100, control: Callable[[Image], Image] | None = None,
    ) -> None:  # fmt: skip
        self.grammar, self.tokenizer, self.text_encoder, self.vae = grammar, tokenizer, text_encoder, vae
        self.config, self.timesteps, self.control = config, timesteps, control
        self._made: dict[tuple[int, int], tuple[int, Scene, Tensor, Tensor | None]] = {}

    def scene_seed(self, step: int, row: int) -> int:
        """The seed of the scene of a step's row: the same again every `APART` steps, `USES` times."""
        generation = (step // APART + row) // USES
        return derive_seed(self.config.seed, 2, generation, row, step % APART)

    @torch.no_grad()
    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """The `rows` of a step's batch; noise and timesteps are drawn for the whole batch."""
        own = range(*rows.indices(self.config.batch_size))
        self._make(step, [row for row in own if self._of(step, row) is None], device)
        made = [self._of(step, row) for row in own]
        scenes, moments, controls = zip(*(one[1:] for one in made if one is not None), strict=True)
        draw = torch.Generator().manual_seed(derive_seed(self.config.seed, step))
        shape = (self.config.batch_size, *moments[0].shape[1:])
        inner, noise = (torch.randn(shape, generator=draw)[rows] for _ in range(2))
        timesteps = torch.randint(self.timesteps, (self.config.batch_size,), generator=draw)[rows]
        mean, std = torch.stack(moments, dim=1)
        captions = [self._caption(scene, step, row) for scene, row in zip(scenes, own, strict=True)]
        tokens = self.tokenizer(captions, self.config.max_tokens).merge_padding().to(device)
        with self._autocast(device):
            text = self.text_encoder(tokens)
        ids = size_ids((SIZE, SIZE), (0, 0), (SIZE, SIZE)).to(device).expand(len(own), -1)
        control = torch.stack(controls).to(device) / 255 if self.control is not None else None
        grid = torch.stack([grid_of(scene, SEEN) for scene in scenes]).to(device)
        return SceneBatch(
            (mean + std * inner).to(device), text, ids, timesteps.to(device),
            noise.to(device), control, grid=grid,
        )  # fmt: skip

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = self.config.dtype
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    def _of(self, step: int, row: int) -> "tuple[int, Scene, Tensor, Tensor | None] | None":
        found = self._made.get((step % APART, row))
        return found if found is not None and found[0] == self.scene_seed(step, row) else None

    def _make(self, step: int, rows: list[int], device: torch.device) -> None:
        """Draw and encode the scenes of these rows, in the place of those of the last generation."""
        if not rows:
            return
        seeds = [self.scene_seed(step, row) for row in rows]
        scenes = [compose(seed) for seed in seeds]
        pictures = [render(scene) for scene in scenes]
        pixels = torch.stack([pil_to_tensor(picture) for picture in pictures]) / 127.5 - 1
        with self._autocast(device):
            encoded = self.vae.encode_images(pixels.to(self.vae.post_quant_conv.weight))
        moments = torch.stack([encoded.mean, encoded.std], dim=1).float().cpu()  # [B, 2, 4, H/8, W/8]
        for i, row in enumerate(rows):
            control = None
            if self.control is not None:
                control = (255 * preprocess_control(self.control(pictures[i]))[0]).round().byte()
            self._made[step % APART, row] = seeds[i], scenes[i], moments[i], control

    def _caption(self, scene: Scene, step: int, row: int) -> str:
        order = random.Random(derive_seed(self.config.seed, step, 1, row))
        return "" if order.random() < DROPPED else self.grammar.teach(scene, order, order.randrange(2)).text

    def record(self) -> dict[str, object]:
        """What its batches depend on besides the step and the settings."""
        return {
            "names": digest(repr(sorted(self.grammar.names.items())).encode()),
            "data": [APART, USES, DROPPED, self.timesteps, self.control is not None],
            "tokenizer": digest(self.tokenizer.model_bytes),
            "vae": digest_model(self.vae), "frozen text encoder": digest_model(self.text_encoder),
        }  # fmt: skip

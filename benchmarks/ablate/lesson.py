"""What both architectures learn and are asked: the embedded model's pictures, a part of them, and small.

Everything that its frozen autoencoder and text encoder make is made once.
Shapes: N things, P prompts (each thing in each unseen phrasing), B pictures, h and w latents of a side.
"""

import copy
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ablate.architecture import predict
from benchmarks.tiny.emoji import CONCEPTS, ENGLISH_NAMES, ENGLISH_UNSEEN, FONT, Concept, write
from benchmarks.tiny.quality import nearest
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import EMBEDDED
from kolors_core.dataset import Batches, Example, load_pixels, read_folder
from kolors_core.objective import Batch, Data, TrainingConfig
from kolors_core.pipeline import KolorsPipeline
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedule import DPMSolverMultistepScheduler

OTHERWISE = "🥝🍆🍕🏠🏰⭐🏀🥁💻💡"  # TINY knows these by other names than Unicode's
THINGS = [character for character in CONCEPTS if character not in OTHERWISE]
TIMES = 2  # how many noises and timesteps each prompt has in the held-out loss
SCALE, STEPS = 5.0, 15  # of the guidance, and of DPM++ 2M with Karras' sigmas


def draw_pictures(count: int, folder: Path) -> tuple[list[Example], list[str]]:
    """Emoji spread over all kinds of things, with captions, and their names.

    FileNotFoundError says where the font is to be had.
    """
    if not FONT.exists():
        how = "`apt-get install fonts-noto-color-emoji`, or https://github.com/googlefonts/noto-emoji"
        raise FileNotFoundError(f"{FONT}: no such file, wanted the font Noto Color Emoji: {how}")
    concepts = []
    for i in range(count):
        thing = THINGS[i * len(THINGS) // count]
        name = unicodedata.name(thing).lower().removesuffix(" face")
        concepts.append(Concept(thing, ENGLISH_NAMES.get(thing, (name,))[:1], ()))
    write(concepts, folder)
    return read_folder(folder), [concept.english[0] for concept in concepts]


class Lesson:
    """examples and names: of N things, pictures with captions. side: of the pictures in pixels."""

    def __init__(
        self, examples: Sequence[Example], names: Sequence[str], side: int, config: TrainingConfig
    ) -> None:
        pipe = KolorsPipeline.from_pretrained(EMBEDDED)
        assert pipe.tokenizer is not None and pipe.text_encoder is not None
        self.names, self.vae, self.sigmas = names, pipe.vae, pipe.scheduler.table()
        self.prompts = [phrase.format(x=name) for phrase in ENGLISH_UNSEEN for name in names]
        sizes = [(side, side)]
        batches = Batches(examples, sizes, config.batch_size, config.seed)
        self.data = Data(examples, batches, pipe.vae, pipe.tokenizer, config, frozen_text=pipe.text_encoder)
        self.known = torch.stack([load_pixels(each, sizes[0])[0] for each in examples])  # [N, 3, H, W]
        with torch.no_grad():
            tokens = pipe.tokenizer([*self.prompts, ""], config.max_tokens).collapse()
            self.text = pipe.text_encoder(tokens)  # of the prompts and of the empty one: [P + 1, ...]
        self.held_out = self._held_out()
        self.step = self._guided(slice(0, 1))

    def seeded(self, config: TrainingConfig) -> Data:
        """The same pictures in the order and with the noise of the config's seed."""
        data, batches = copy.copy(self.data), copy.copy(self.data.batches)
        batches.seed = config.seed
        data.config, data.batches = config, batches
        return data

    def _rows(self, rows: slice, has_empty: bool) -> tuple[TextEmbedding, Tensor]:
        """Text and sizes of these prompts, behind as many empty ones."""
        count, text = len(self.prompts[rows]), self.text
        assert text.counts is not None
        parts = [part[:-1][rows] for part in (text.tokens, text.pooled, text.counts)]
        if has_empty:
            ends = (text.tokens[-1:], text.pooled[-1:], text.counts[-1:])
            parts = [torch.cat([end.expand(part.shape), part]) for end, part in zip(ends, parts, strict=True)]
        return TextEmbedding(*parts), self.data.sizes[0].expand((1 + has_empty) * count, -1)

    def _held_out(self) -> list[Batch]:
        """Prompts not trained on, with noise and timesteps that are the same for all: TIMES batches of P."""
        draw, count = torch.Generator().manual_seed(1), len(self.prompts)
        latents = torch.stack([self.data.latents[i][0] for i in range(len(self.names))])  # [N, 4, h, w]
        latents = latents.repeat(count // len(self.names), 1, 1, 1)  # [P, 4, h, w]
        order = torch.randperm(TIMES * count, generator=draw)
        spread = ((order + 0.5) * self.data.timesteps / len(order)).long()  # evenly over the schedule
        text, ids = self._rows(slice(None), has_empty=False)
        return [
            Batch(latents, text, ids, times, torch.randn(latents.shape, generator=draw))
            for times in spread.split(count)
        ]

    def _guided(self, rows: slice) -> Batch:
        """What a guided step on these prompts reads, b of them: latents and timesteps are to be replaced."""
        text, ids = self._rows(rows, has_empty=True)
        latents = self.held_out[0].latents[rows].repeat(2, 1, 1, 1)  # [2b, 4, h, w]
        return Batch(latents, text, ids, torch.full((len(ids),), 500.0), latents)

    @torch.no_grad()
    def draw(self, net: nn.Module, seed: int) -> Tensor:
        """What the module draws of every prompt: [P, 3, H, W] in [-1, 1]."""
        schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(STEPS)
        told, shape = self._guided(slice(None)), self.held_out[0].latents.shape

        def denoise(x: Tensor, sigma: float) -> Tensor:
            latents = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)  # [2P, 4, h, w]
            times = torch.full((len(latents),), schedule.timestep(sigma))
            unconditional, conditional = predict(net, replace(told, latents=latents, timesteps=times)).chunk(
                2
            )
            return x - sigma * (unconditional + SCALE * (conditional - unconditional))

        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return self.vae.decode(dpmpp_2m(denoise, noise * schedule.start_scale, schedule.sigmas)).clamp(-1, 1)

    def recognise(self, images: Tensor) -> list[int]:
        """Of each prompt's picture [P, 3, H, W] the thing whose training picture is nearest."""
        return nearest(images, self.known)

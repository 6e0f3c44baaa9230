"""What both architectures learn and are asked: small images of single things on white.

What the embedded model's frozen autoencoder and text encoder make is made once.
Shapes: N things, P prompts (each thing in each unseen phrasing), B images, h and w latents of a side.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ablate.architecture import predict
from benchmarks.ablate.captions import THINGS, UNSEEN, captions
from benchmarks.tiny.emoji import FONT, draw, on_white
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import EMBEDDED
from kolors_core.pipelines.lora_recipe import nearest
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.sampling import dpmpp_2m
from kolors_core.schedulers import DPMSolverMultistepScheduler
from kolors_core.training.data import Batch, Batches, Example, LatentDataset, load_pixels, read_folder
from kolors_core.training.trainer import TrainingConfig

TIMES = 2  # how many noises and timesteps each prompt has in the held-out loss
SCALE, STEPS = 5.0, 15  # of the guidance, and of DPM++ 2M with Karras' sigmas


def draw_pictures(count: int, folder: Path) -> tuple[list[Example], list[str]]:
    """Images of emoji spread over all kinds of things, with captions, and their names.

    FileNotFoundError says where the font is to be had.
    """
    if not FONT.exists():
        how = "`apt-get install fonts-noto-color-emoji`, or https://github.com/googlefonts/noto-emoji"
        raise FileNotFoundError(f"{FONT}: no such file, expected the font Noto Color Emoji: {how}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen, rows = [list(THINGS)[i * len(THINGS) // count] for i in range(count)], []
    for i, thing in enumerate(chosen):
        on_white(draw(thing)).save(folder / f"{i:04}.png")
        row = {"file_name": f"{i:04}.png", "text": captions(THINGS[thing])}
        rows.append(json.dumps(row, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return read_folder(folder), [THINGS[thing] for thing in chosen]


class Lesson:
    """examples and names: of N things, images with captions. side: of the images in pixels.

    known: the images. prompts: P that are not trained on. held_out: TIMES batches of them, with noise and
    timesteps that are the same for all. step: what a guided step of one image reads.
    """

    def __init__(
        self, examples: Sequence[Example], names: Sequence[str], side: int, config: TrainingConfig
    ) -> None:
        pipe = KolorsPipeline.from_pretrained(EMBEDDED)
        assert pipe.tokenizer is not None and pipe.text_encoder is not None
        self.names, self.vae, self.sigmas = names, pipe.vae, pipe.scheduler.training_sigmas()
        batches = Batches(examples, [(side, side)], config.batch_size, config.seed)
        self.data = LatentDataset(
            examples, batches, pipe.vae, pipe.tokenizer, config, frozen_text=pipe.text_encoder
        )
        self.known = torch.stack([load_pixels(each, (side, side))[0] for each in examples])  # [N, 3, H, W]
        self.prompts = [phrase.format(x=name) for phrase in UNSEEN for name in names]
        count = len(self.prompts)
        tokens = pipe.tokenizer([""] * count + self.prompts, config.max_tokens).merge_padding()
        with torch.no_grad():
            self.text = pipe.text_encoder(tokens)  # [2P, ...], as guidance reads it: first the empty ones

        draw, rows = torch.Generator().manual_seed(1), list(range(count, 2 * count))
        latents = torch.stack([self.data.latents[i % len(names)][0] for i in range(count)])  # [P, 4, h, w]
        order = torch.randperm(TIMES * count, generator=draw)
        times = ((order + 0.5) * self.data.timesteps / len(order)).long()  # evenly over the schedule
        self.held_out = [
            self._told(rows, latents, part, torch.randn(latents.shape, generator=draw))
            for part in times.split(count)
        ]
        self.step = self._told([0, count], latents[:1].repeat(2, 1, 1, 1), torch.full((2,), 500))

    def _told(self, rows: list[int], latents: Tensor, times: Tensor, noise: Tensor | None = None) -> Batch:
        """What a UNet is told of these rows of the text."""
        assert self.text.counts is not None
        text = TextEmbedding(self.text.tokens[rows], self.text.pooled[rows], self.text.counts[rows])
        sizes = self.data.sizes[0].expand(len(rows), -1)
        return Batch(latents, text, sizes, times, latents if noise is None else noise)

    def seeded(self, config: TrainingConfig) -> LatentDataset:
        """The same images in the order and with the noise of the config's seed."""
        data, batches = copy.copy(self.data), copy.copy(self.data.batches)
        batches.seed = config.seed
        data.config, data.batches = config, batches
        return data

    @torch.no_grad()
    def draw(self, net: nn.Module, seed: int) -> Tensor:
        """What the module draws of every prompt: [P, 3, H, W] in [-1, 1]."""
        schedule = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(STEPS)
        rows = list(range(2 * len(self.prompts)))

        def denoise(x: Tensor, sigma: float) -> Tensor:
            latents = (x / (sigma**2 + 1) ** 0.5).repeat(2, 1, 1, 1)  # [2P, 4, h, w]
            times = torch.full((len(rows),), schedule.timestep(sigma))
            empty, asked = predict(net, self._told(rows, latents, times)).chunk(2)
            return x - sigma * (empty + SCALE * (asked - empty))

        shape = self.held_out[0].latents.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        latents = dpmpp_2m(denoise, noise * schedule.init_noise_sigma, schedule.sigmas)
        return self.vae.decode_latents(latents).clamp(-1, 1)

    def detect_component(self, images: Tensor) -> list[int]:
        """Of each prompt's image [P, 3, H, W] the thing whose training image is nearest."""
        return nearest(images, self.known)

"""What is trained on what: the settings of a run, its objective, and the batches that the objective reads.

The objective (https://arxiv.org/abs/2006.11239, eq. 14): predict the noise in sqrt(a) latents + sqrt(1 - a)
noise, at a timestep drawn evenly from the 1,100 of the schedule. Everything random of a step is drawn on the
CPU from (seed, step) for the whole batch, and each rank takes its part.
Shapes: B pictures of the whole batch, b of one rank's part, T training timesteps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import ControlNet
from kolors_core.adapters.textual_inversion import vectors_of
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import concat_extra_channels, size_ids
from kolors_core.image import control_pixels, to_output
from kolors_core.module import Module
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.data import Batches, Example, load_pixels, mix
from kolors_core.unet import UNet
from kolors_core.vae import VAE
from kolors_core.validation import LARGEST_SEED, finite_number, whole_number

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train. Master weights are float32; `dtype` is what the forward computes in (autocast).

    accumulate: parts that a batch is computed in. schedule: "constant" or "cosine" to 0.
    ema: decay of the weights' moving average, which warms up as min(ema, (1 + step) / (10 + step)); 0 is off.
    min_snr_gamma: weigh a timestep's loss by min(snr, gamma) / snr (https://arxiv.org/abs/2303.09556); None
    is off. noise_offset: add this much of one normal number a channel to the noise.
    checkpoint_blocks: recompute each block's activations in the backward pass. shard: FSDP2 in place of DDP.
    """

    steps: int
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    max_tokens: int = 256
    dtype: torch.dtype = torch.float32
    checkpoint_blocks: bool = False
    shard: bool = False
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "save_every", "max_tokens"):
            whole_number(name, getattr(self, name))
        whole_number("warmup", self.warmup, least=0)
        whole_number("seed", self.seed, least=0, most=LARGEST_SEED)
        for name in ("learning_rate", "weight_decay", "clip", "noise_offset"):
            finite_number(name, getattr(self, name), 0)
        finite_number("ema", self.ema, 0, 1)
        if self.min_snr_gamma is not None and finite_number("min_snr_gamma", self.min_snr_gamma) <= 0:
            raise ValueError(f"min_snr_gamma must be above 0, got {self.min_snr_gamma}")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine', got {self.schedule!r}")
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {self.dtype}")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then constant or a half cosine that ends at 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant":
            return self.learning_rate * warm
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True)
class Batch:
    """What the objective reads, for one rank's pictures. text: embedded, or to be encoded."""

    latents: Tensor  # [b, 4, H/8, W/8]
    text: TextEmbedding | TokenBatch
    size_ids: Tensor  # [b, 6]
    timesteps: Tensor  # [b]
    noise: Tensor  # as latents
    control: Tensor | None = None  # [b, 3, H, W] in [0, 1], for a ControlNet
    extra: Tensor | None = None  # [b, more, H/8, W/8], of a UNet with more input channels: see masked_data.py


class Objective(Module):
    """The loss as one module, which DDP and FSDP need. text_encoder: None unless it is trained too.

    controlnet: to be trained; the UNet is then best left as it is (`requires_grad_(False)`).
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: ChatGLM | None,
        sigmas: Tensor,
        config: TrainingConfig,
        controlnet: ControlNet | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.controlnet, self.config = unet, text_encoder, controlnet, config
        self.sigmas = sigmas  # [T]; not a buffer: it is no part of the model

    def forward(self, batch: Batch) -> Tensor:
        """The mean loss of the rank's pictures."""
        text = batch.text
        if isinstance(text, TokenBatch):
            assert self.text_encoder is not None
            text = self.text_encoder(text)
        sigma = self.sigmas.to(batch.latents.device)[batch.timesteps][:, None, None, None]  # [b, 1, 1, 1]
        noisy = (batch.latents + sigma * batch.noise) / (sigma**2 + 1).sqrt()
        times, noisy = batch.timesteps.float(), concat_extra_channels(noisy, batch.extra)
        given = noisy, times, text.tokens, text.pooled, batch.size_ids
        if (self.controlnet is None) != (batch.control is None):
            raise ValueError("a ControlNet and control images need each other: one of them is missing")
        residuals = () if self.controlnet is None else self.controlnet(*given, batch.control, text.counts)
        predicted = self.unet(*given, text.counts, residuals=residuals)
        loss = (predicted.float() - batch.noise).square().mean(dim=(1, 2, 3))  # [b]
        if self.config.min_snr_gamma is not None:
            snr = sigma.flatten() ** -2
            loss = loss * (snr.clamp(max=self.config.min_snr_gamma) / snr)
        return loss.mean()

    def learn_words(self, *words: str) -> None:
        """Let only these words be trained: textual inversion (https://arxiv.org/abs/2208.01618, eq. 2).

        The encoder has them already (`textual_inversion.add_words`): the paper starts from the embedding of a
        word that says roughly what it is. ValueError for a word that it has not.
        """
        have = {} if self.text_encoder is None else vectors_of(self.text_encoder)
        if not words:
            raise ValueError("no word to be learned")
        if unknown := [word for word in words if word not in have]:
            raise ValueError(f"{unknown[0]} is no learned word; there are: {', '.join(have) or 'none'}")
        self.requires_grad_(False)
        for word in words:
            have[word].requires_grad_(True)


class Data:
    """Latents of every picture, encoded once; captions as tokens, or encoded once by a frozen encoder.

    control: makes the control image of a picture, for a ControlNet; each is made once and kept in 8 bits.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batches: Batches,
        vae: VAE,
        tokenizer: Tokenizer,
        config: TrainingConfig,
        frozen_text: ChatGLM | None,
        timesteps: int = 1100,
        words: Mapping[str, Sequence[int]] | None = None,
        control: "Callable[[Image], Image] | None" = None,
    ) -> None:
        """words: of textual inversion in the captions, each with its ids."""
        self.examples, self.batches, self.vae, self.config = examples, batches, vae, config
        self.tokenizer = partial(tokenizer, max_length=config.max_tokens, words=words)
        self.timesteps = timesteps  # how many the schedule has
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}
        self.sizes: dict[int, Tensor] = {}
        self.controls: dict[int, Tensor] = {}  # uint8 [3, H, W]
        for size, members in batches.members.items():
            for i in members:
                pixels, crop = load_pixels(examples[i], size)
                with torch.no_grad():
                    found = vae.encode(pixels[None].to(vae.post_quant_conv.weight))
                if control is not None:
                    picture = to_output(pixels[None], "pil")[0]
                    self.controls[i] = (255 * control_pixels(control(picture))[0]).round().byte()
                self.latents[i] = (found.mean[0].float().cpu(), found.std[0].float().cpu())
                self.sizes[i] = size_ids((examples[i].height, examples[i].width), crop, size)
        self.text: dict[str, TextEmbedding] = {}
        if frozen_text is not None:
            for caption in sorted({caption for example in examples for caption in example.captions} | {""}):
                with torch.no_grad():
                    text = frozen_text(self._tokens([caption]).to(frozen_text.embedding.weight.device))
                self.text[caption] = text.to("cpu")

    def at(self, step: int, part: slice, device: torch.device) -> Batch:
        """The pictures `part` of the batch of a step; noise and timesteps are drawn for all of it."""
        _, samples = self.batches.at(step)
        draw = torch.Generator().manual_seed(mix(self.config.seed, step, 1))
        mean, std = (torch.stack([self.latents[s.example][k] for s in samples]) for k in (0, 1))
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        noise = torch.randn(mean.shape, generator=draw)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=draw)
        timesteps = torch.randint(self.timesteps, (len(samples),), generator=draw)
        ids = torch.cat([self.sizes[sample.example] for sample in samples])
        latents, ids, timesteps, noise = (x[part].to(device) for x in (latents, ids, timesteps, noise))
        control = None
        if self.controls:
            control = torch.stack([self.controls[s.example] for s in samples[part]]).to(device) / 255
        captions = [sample.caption for sample in samples[part]]
        text = TextEmbedding.cat([self.text[c] for c in captions]) if self.text else self._tokens(captions)
        return Batch(latents, text.to(device), ids, timesteps, noise, control)

    def _tokens(self, captions: Sequence[str]) -> TokenBatch:
        return self.tokenizer(captions).collapse()

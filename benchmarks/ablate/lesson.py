"""Lesson: what all variants learn and are asked. This file has what lessons of images share.

Lessons are things.py (from scratch), scenes.py (the embedded model, which composes) and texts.py (encoders).
Shapes: P prompts, B images, h and w latents of a side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.ablate.change import Variant
from benchmarks.ablate.models import Pupil, build, check_denoiser, check_text_encoder, share_values
from kolors_core.chatglm import TextEmbedding
from kolors_core.checkpoint import EMBEDDED
from kolors_core.conditioning import Conditioning, size_ids
from kolors_core.config import TINY
from kolors_core.pipelines.text_to_image import KolorsPipeline
from kolors_core.schedulers import EulerDiscreteScheduler
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.trainer import BatchSource, TrainingConfig

LEVELS = 8  # noise levels at which images are held out
HELD_OUT = 40  # images and prompts at each of them, at most
PART = 60  # images that are drawn at once


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Quantity that is measured after a training. name: its key. more_is: "better" or "worse".

    form, unit: how it is written. grain: least step between its values, of what is counted.
    """

    name: str
    more_is: str
    form: str = ".4f"
    unit: str = ""
    grain: float = 0.0


@dataclass
class Result:
    """What was measured of a pupil. scores: by measure. images: some that it drew [B, 3, H, W]; labels."""

    scores: dict[str, float]
    images: Tensor | None = None
    labels: list[str] = field(default_factory=list)


class Lesson(Protocol):
    """What a study asks of a lesson. about: lines for the reader. one_is: what a call of `one` does."""

    name: str
    one_is: str
    recipe: TrainingConfig
    measures: Sequence[Measure]
    about: list[str]

    def pupil(self, variant: Variant, base: Variant, config: TrainingConfig) -> Pupil:
        """Build a variant's models with the config's seed; ValueError if they do not fit."""
        ...

    def batches(self, pupil: Pupil, config: TrainingConfig) -> BatchSource:
        """Return the batches of the config's seed."""
        ...

    def held_out(self, pupil: Pupil) -> float:
        """Measure the one number that is followed through the training: less is better."""
        ...

    def measure(self, pupil: Pupil, seed: int) -> Result:
        """Measure all."""
        ...

    def one(self, pupil: Pupil) -> Callable[[], object]:
        """Return a call that does what the variant is for, once: its cost is counted and timed."""
        ...


class ImageLesson:
    """Lesson of a denoiser. prompts: P, with latents [P, 4, h, w] that are images of them and held out.

    The error is that of x0 at `LEVELS` noise levels of Kolors' schedule, weighed by min(snr, 1): the same for
    all, whatever they predict and however their training weighs it.
    """

    name, one_is = "", "denoising step, one image with guidance"
    scale, steps = 5.0, 15  # of the guidance, and of drawing
    starts_trained = False  # with the embedded model's values, not with A's first ones

    def __init__(self, pipe: KolorsPipeline, side: int, recipe: TrainingConfig) -> None:
        assert pipe.tokenizer is not None and pipe.text_encoder is not None
        self.pipe, self.side, self.recipe = pipe, side, recipe
        self.tokenizer, self.text_encoder = pipe.tokenizer, pipe.text_encoder
        self.prompts, self.latents = list[str](), torch.empty(0)
        size = (8 * side, 8 * side)
        self.size_ids = size_ids(size, (0, 0), size)  # [1, 6], as in training
        sigmas = EulerDiscreteScheduler().training_sigmas()
        self.levels = [sigmas[(2 * i + 1) * len(sigmas) // (2 * LEVELS)].item() for i in range(LEVELS)]

    def ask(self, prompts: Sequence[str], latents: Tensor) -> None:
        """Set the prompts and their images' latents."""
        self.prompts, self.latents = list(prompts), latents
        with torch.no_grad():
            self.text = self.text_encoder(self._tokens())

    def _tokens(self) -> TokenBatch:
        """Tokens of no text, then of all prompts, so that all have the same length."""
        return self.tokenizer(["", *self.prompts], self.recipe.max_tokens).merge_padding()

    def pupil(self, variant: Variant, base: Variant, config: TrainingConfig) -> Pupil:
        """Build models: first values are A's, or the embedded model's, where names and shapes agree."""
        net = build(variant, variant.change.denoiser, variant.config, config.seed)
        check_denoiser(variant, net)
        source = self.pipe.unet
        if not self.starts_trained:
            source = build(base, base.change.denoiser, base.config, config.seed)
        own = share_values(dict(source.named_parameters()), net, drawn=not self.starts_trained)
        shared, encoder = len(list(net.parameters())) - len(own), None
        if variant.change.text_encoder is not None:
            encoder = build(variant, variant.change.text_encoder, TINY.text_encoder, config.seed)
            check_text_encoder(variant, encoder)
            first = share_values(dict(self.text_encoder.named_parameters()), encoder, drawn=False)
            shared, own = shared + len(list(encoder.parameters())) - len(first), own + first
        sigmas = variant.change.scheduler.training_sigmas()
        torch.manual_seed(config.seed)  # of what a loss has of its own
        objective = variant.change.loss(net, encoder, sigmas, config).train()
        return Pupil(variant, objective, net, encoder, shared, own)

    def _text(self, pupil: Pupil) -> TextEmbedding:
        return self.text if pupil.text_encoder is None else pupil.text_encoder(self._tokens())

    def _rows(self, text: TextEmbedding, rows: Sequence[int]) -> Conditioning:
        """Conditioning of these rows of the text, of which 0 is that of no text."""
        assert text.counts is not None
        index, ids = torch.tensor(rows), self.size_ids.expand(len(rows), -1)
        return Conditioning(text.tokens[index], text.pooled[index], ids, text.counts[index])

    @torch.no_grad()
    def errors(self, pupil: Pupil) -> list[float]:
        """Measure the held-out error of each noise level."""
        assert pupil.denoiser is not None
        change, errors, count = pupil.variant.change, [], min(HELD_OUT, len(self.prompts))
        chosen = [i * len(self.prompts) // count for i in range(count)]
        rows, image = self._rows(self._text(pupil), [i + 1 for i in chosen]), self.latents[chosen]
        draw = torch.Generator().manual_seed(1)
        for sigma in self.levels:
            x = image + sigma * torch.randn(image.shape, generator=draw)
            x0 = change.guided(pupil.denoiser, change.scheduler.schedule(self.steps), rows)(x, sigma)
            errors.append(min(1.0, sigma**-2) * (x0 - image).square().mean().item())
        return errors

    def held_out(self, pupil: Pupil) -> float:
        """Measure the mean of `errors`."""
        errors = self.errors(pupil)
        return sum(errors) / len(errors)

    @torch.no_grad()
    def draw(self, pupil: Pupil, seed: int) -> Tensor:
        """Draw every prompt, from noise of a seed: [P, 3, H, W] in [-1, 1]."""
        assert pupil.denoiser is not None
        change, text, images = pupil.variant.change, self._text(pupil), []
        schedule = change.scheduler.schedule(self.steps)
        shape = (len(self.prompts), 4, self.side, self.side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * schedule.init_noise_sigma
        for start in range(0, len(self.prompts), PART):
            part = noise[start : start + PART]
            rows = [self._rows(text, [i + 1 for i in range(start, start + len(part))])]
            rows.append(self._rows(text, [0] * len(part)))
            denoise = change.guided(pupil.denoiser, schedule, *rows, self.scale)
            latents = change.sampler(denoise, part, schedule.sigmas)
            images.append(self.pipe.vae.decode_latents(latents).clamp(-1, 1))
        return torch.cat(images)

    def one(self, pupil: Pupil) -> Callable[[], object]:
        """Return a guided step of one image; the first of a run, which may do more, is done."""
        assert pupil.denoiser is not None
        change, schedule = pupil.variant.change, pupil.variant.change.scheduler.schedule(self.steps)
        with torch.no_grad():
            text, x, sigma = self._text(pupil), self.latents[:1] * 1.0, float(schedule.sigmas[1])
            rows = self._rows(text, [1]), self._rows(text, [0])
            denoise = change.guided(pupil.denoiser, schedule, *rows, self.scale)
            denoise(x, sigma)
        return torch.no_grad()(lambda: denoise(x, sigma))


def embedded() -> KolorsPipeline:
    """Load the embedded model, whose encoders every lesson has."""
    pipe = KolorsPipeline.from_pretrained(EMBEDDED)
    pipe.unet.requires_grad_(False)
    return pipe


def finite(scores: dict[str, float]) -> dict[str, Any]:
    """Return scores as JSON has them: None where one is not finite."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}

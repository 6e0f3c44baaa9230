"""Training data: captioned images in aspect-ratio buckets; each batch is a function of seed and step.

A batch is a pure function of (seed, step), so a resumed run gets the same batches, and ranks that each take
rows of a batch train on what one process would. Latents are kept in memory here; those of cached_data.py are
mapped from a disk.
Shapes: B images of the whole batch, b of one rank's rows, H and W pixels of a bucket.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core import image as images
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import size_ids
from kolors_core.image import Size
from kolors_core.module import first_weight, reads_counts
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.folder import Example
from kolors_core.training.folder import read_folder as read_folder
from kolors_core.training.run_record import digest, digest_model
from kolors_core.training.trainer import TrainingConfig
from kolors_core.vae import VAE
from kolors_core.validation import LARGEST_SEED, check_float, check_int

if TYPE_CHECKING:
    from PIL.Image import Image

FULL_MASK_PROBABILITY = 0.2
MIN_BOX, MAX_BOX = 0.2, 0.8  # sides of a mask's box, as fractions of the image's sides
MANY = 2**20  # images of a bucket, beyond which a batch is drawn without a permutation of all


@dataclass(frozen=True)
class Batch:
    """Inputs of the loss for one rank's images. text: embedded, or tokens for the loss to encode."""

    latents: Tensor  # [b, 4, H/8, W/8]
    text: TextEmbedding | TokenBatch
    size_ids: Tensor  # [b, 6]
    timesteps: Tensor  # [b]
    noise: Tensor  # as latents
    control: Tensor | None = None  # [b, 3, H, W] in [0, 1], for a ControlNet
    extra: Tensor | None = None  # [b, C, H/8, W/8], for a UNet with C more input channels
    more: Mapping[str, Tensor] = field(default_factory=dict)  # of one's own, for a loss that reads them

    def to(self, device: torch.device | str) -> Self:
        """Move the batch to another device."""
        moved = {name: None if value is None else value.to(device) for name, value in vars(self).items()
                 if name != "more"}  # fmt: skip
        return replace(self, **moved, more={name: value.to(device) for name, value in self.more.items()})


def buckets(resolution: int, step: int = 64) -> list[Size]:
    """List sizes (height, width), multiples of `step`, of about resolution^2 pixels, from 1:2 to 2:1."""
    check_int("resolution", resolution)
    check_int("step", step)
    sizes = {(resolution, resolution)}
    for side in range(step, resolution + 1, step):
        other = resolution * resolution // side // step * step
        if other <= 2 * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def nearest_bucket(example: Example, sizes: Sequence[Size]) -> Size:
    """Select the size whose log aspect ratio is nearest to the image's."""
    aspect = math.log(example.height / example.width)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size))


def load_pixels(example: Example, size: Size) -> tuple[Tensor, tuple[int, int]]:
    """Load an image upright, resized to cover its bucket and center-cropped: [3, H, W] in [-1, 1].

    Also returns the crop's (top, left) in pixels of the resized image. Transparency becomes white.
    """
    from PIL.Image import Resampling

    height, width = size
    name = example.file if isinstance(example.file, Path) else "an image in memory"
    image = images.load_image(example.file, partial(images.flatten_alpha, name=name))
    scale = max(height / image.height, width / image.width)
    cover = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    with images.image_errors(name):
        images.check_pixels(*cover)
    image, corner = images.center_crop(image.resize(cover, Resampling.LANCZOS), size)
    return images.pil_to_tensor(image) / 127.5 - 1, corner


def control_image(pixels: Tensor, control: "Callable[[Image], Image]") -> Tensor:
    """Compute the control image of pixels [3, H, W] in [-1, 1]: uint8 [3, H, W]."""
    image = images.to_images(pixels[None], "pil")[0]
    return (255 * images.preprocess_control(control(image))[0]).round().byte()


class IndexBatches:
    """Sampler of images and captions by number: `picks(step)` depends on seed and step alone.

    members: the images of each bucket. caption_counts: how many captions each image has. caption_dropout: the
    probability that a caption is replaced by the empty one, which classifier-free guidance needs. A batch is
    of one bucket, and holds no image twice unless it is larger than its bucket.
    """

    def __init__(
        self, members: Mapping[Size, Sequence[int]], caption_counts: Sequence[int], batch_size: int,
        seed: int, caption_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        if not members:
            raise ValueError("no images to make batches of")
        check_int("batch_size", batch_size)
        check_int("seed", seed, least=0, most=LARGEST_SEED)
        check_float("caption_dropout", caption_dropout, 0, 1)
        self.batch_size, self.seed, self.dropout = batch_size, seed, caption_dropout
        self.members, self.caption_counts = members, caption_counts

    def picks(self, step: int) -> tuple[Size, list[tuple[int, int | None]]]:
        """Draw a step's bucket, in proportion to its number of images, and its (image, caption or None)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
        sizes = sorted(self.members)
        weights = torch.tensor([float(len(self.members[size])) for size in sizes])
        size = sizes[int(torch.multinomial(weights, 1, generator=generator))]
        members, picks = self.members[size], []
        for i in (members[k] for k in self._choose(len(members), generator)):
            number = int(torch.randint(self.caption_counts[i], (), generator=generator))
            is_kept = float(torch.rand((), generator=generator)) >= self.dropout
            picks.append((i, number if is_kept else None))
        return size, picks

    def _choose(self, total: int, generator: torch.Generator) -> list[int]:
        """Draw places in a bucket of `total` images, for a batch."""
        chosen, count = list[int](), self.batch_size
        while len(chosen) < count:
            if total > max(MANY, 2 * count):  # most draws are new; a permutation takes long
                drawn = torch.randint(total, (count,), generator=generator)
                chosen = list(dict.fromkeys([*chosen, *drawn.tolist()]))[:count]
            else:
                chosen += torch.randperm(total, generator=generator)[: count - len(chosen)].tolist()
        return chosen


class Batches(IndexBatches):
    """Sampler of batches of examples, in the nearest of some sizes each."""

    def __init__(
        self, examples: Sequence[Example], sizes: Sequence[Size], batch_size: int, seed: int,
        caption_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        self.examples, members = examples, dict[Size, list[int]]()
        for i, example in enumerate(examples):
            members.setdefault(nearest_bucket(example, sizes), []).append(i)
        counts = [len(example.captions) for example in examples]
        super().__init__(members, counts, batch_size, seed, caption_dropout)

    def samples(self, step: int) -> tuple[Size, list[tuple[int, str]]]:
        """Draw a step's bucket and its (example's index, caption), see `picks`."""
        size, picks = self.picks(step)
        return size, [(i, "" if k is None else self.examples[i].captions[k]) for i, k in picks]


class LatentDataset:
    """Dataset of latents, encoded once; captions as tokens, or encoded once by a frozen encoder.

    timesteps: how many the schedule has. words: those of textual inversion in the captions, with their ids.
    control: maps an image to a ControlNet's control image; each is computed once and kept in 8 bits.
    """

    @torch.no_grad()
    def __init__(
        self, examples: Sequence[Example], batches: Batches, vae: VAE, tokenizer: Tokenizer,
        config: TrainingConfig, frozen_text: ChatGLM | None, timesteps: int = 1100,
        words: Mapping[str, Sequence[int]] | None = None, control: "Callable[[Image], Image] | None" = None,
    ) -> None:  # fmt: skip
        self.examples, self.batches, self.vae, self.config = examples, batches, vae, config
        self.tokenizer = partial(tokenizer, max_length=config.max_tokens, words=words)
        self._images, self._models = dict[int, str](), {"vae": digest_model(vae)}  # of the record
        self.latents: dict[int, Tensor] = {}  # mean and standard deviation [2, 4, H/8, W/8]
        self.sizes, self.controls = dict[int, Tensor](), dict[int, Tensor]()  # controls: uint8 [3, H, W]
        for size, members in batches.members.items():
            for i in members:
                pixels, crop = load_pixels(examples[i], size)
                encoded = vae.encode_images(pixels[None].to(vae.post_quant_conv.weight))
                if control is not None:
                    self.controls[i] = control_image(pixels, control)
                self.latents[i] = torch.cat([encoded.mean, encoded.std]).float().cpu()
                self.sizes[i] = size_ids((examples[i].height, examples[i].width), crop, size)
                shown = [self.controls[i]] if self.controls else []
                self._images[i] = digest(pixels, self.sizes[i], *shown)
        self.timesteps, self.text = timesteps, dict[str, TextEmbedding]()
        known = repr(sorted((words or {}).items())).encode()
        self._models["tokenizer"] = digest(tokenizer.model_bytes, known)
        if frozen_text is not None:
            self._models["frozen text encoder"] = digest_model(frozen_text)
            for caption in sorted({caption for example in examples for caption in example.captions} | {""}):
                tokens = self._tokens([caption], frozen_text).to(first_weight(frozen_text).device)
                self.text[caption] = frozen_text(tokens).to("cpu")

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build the `rows` of a step's batch; noise and timesteps are drawn for the whole batch."""
        indices, captions = zip(*self.batches.samples(step)[1], strict=True)
        check_rows(rows, len(indices))
        mean, std = torch.stack([self.latents[i] for i in indices[rows]], dim=1)  # [b, 4, H/8, W/8]
        shape = len(indices), *mean.shape[1:]
        draw, noise, timesteps = (x[rows] for x in draw_noise(self.config, self.timesteps, step, shape))
        ids = torch.cat([self.sizes[i] for i in indices[rows]])
        latents, ids, timesteps, noise = (x.to(device) for x in (mean + std * draw, ids, timesteps, noise))
        own, controls = captions[rows], [self.controls[i] for i in indices[rows] if self.controls]
        control = torch.stack(controls).to(device) / 255 if controls else None
        text = TextEmbedding.cat([self.text[caption] for caption in own]) if self.text else self._tokens(own)
        return Batch(latents, text.to(device), ids, timesteps, noise, control)

    def record(self) -> dict[str, Any]:
        """Record images, captions and the frozen models, see `BatchSource`."""
        return {
            "images": [self._images[i] for i in range(len(self.examples))],
            "captions": [digest(repr(example.captions).encode()) for example in self.examples],
            "data": f"{type(self).__name__}, {self.batches.seed}, {self.batches.dropout}, {self.timesteps}",
            **self._models,
        }

    def _tokens(self, captions: Sequence[str], encoder: Any = None) -> TokenBatch:
        return merge_if_read(self.tokenizer(captions), encoder)


def check_rows(rows: slice, count: int) -> None:
    """Raise ValueError for rows that a batch of `count` images has not."""
    if rows.stop is not None and rows.stop > count:
        got = f"rows {rows.start or 0} to {rows.stop - 1} are asked for"
        raise ValueError(f"batch_size must be the trainer's: the data's batches have {count} images, {got}")


def merge_if_read(tokens: TokenBatch, encoder: Any) -> TokenBatch:
    """Merge pads for an encoder that obeys counts (`ChatGLM.reads_counts`), or for one that is not known."""
    return tokens.merge_padding() if encoder is None or reads_counts(encoder) else tokens


def repeat_padding(tokens: TokenBatch) -> TokenBatch:
    """Undo `TokenBatch.merge_padding`, for an encoder that reads no counts: all pads, and no counts."""
    if tokens.counts is None:
        return tokens
    more = int(tokens.counts[0, 0]) - 1  # of all prompts alike
    parts = (tokens.ids, tokens.mask, tokens.positions)
    return TokenBatch(*(torch.cat([part[:, :1].expand(-1, more), part], dim=1) for part in parts))


class MaskedLatentDataset(LatentDataset):
    """`LatentDataset` for inpainting: batches have `extra` [b, 5, H/8, W/8], the mask and masked latents.

    Masked latents are of the image with gray inside the mask, encoded in every step on the VAE's device.
    Masks are drawn on the CPU from (seed, step) for the whole batch, as noise is.
    """

    @torch.no_grad()
    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build the batch of `LatentDataset.batch`, with `extra`."""
        batch = super().batch(step, rows, device)
        size, samples = self.batches.samples(step)
        pixels = torch.stack([load_pixels(self.examples[i], size)[0] for i, _ in samples[rows]])
        extra = random_masked_latents(self.vae, pixels, self.config.seed, step, rows, len(samples))
        return replace(batch, extra=extra.to(device))


@torch.no_grad()
def random_masked_latents(
    vae: VAE, pixels: Tensor, seed: int, step: int, rows: slice, count: int
) -> Tensor:  # fmt: skip
    """Draw masks of a step and encode what they leave: [b, 5, H/8, W/8], the mask and masked latents.

    pixels: [b, 3, H, W] in [-1, 1], on the CPU, the images of the `rows` of the batch of `count` images.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, step, 2))
    height, width = pixels.shape[-2:]
    masks = random_masks(count, height, width, generator)[rows]
    encoded = vae.encode_images((pixels * (1 - masks)).to(vae.post_quant_conv.weight))
    noise = torch.randn(count, *encoded.mean.shape[1:], generator=generator)[rows]
    masked = encoded.mean.float() + encoded.std.float() * noise.to(encoded.std.device)  # [b, 4, H/8, W/8]
    masks = F.interpolate(masks, size=masked.shape[-2:])  # [b, 1, H/8, W/8]
    return torch.cat([masks.to(masked.device), masked], dim=1)


def random_masks(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw masks [count, 1, H, W] of 1 (to be generated) and 0: one to three boxes, or everywhere.

    Source: boxes of https://arxiv.org/abs/2109.07161, section 2.3. Full masks keep text-to-image possible.
    """
    masks = torch.zeros(count, 1, height, width)
    for mask in masks:
        if float(torch.rand((), generator=generator)) < FULL_MASK_PROBABILITY:
            mask.fill_(1)
            continue
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            h, w, y, x = torch.rand(4, generator=generator).tolist()
            h, w = (MIN_BOX + side * (MAX_BOX - MIN_BOX) for side in (h, w))
            top, left = round(y * (1 - h) * height), round(x * (1 - w) * width)
            mask[:, top : top + round(h * height), left : left + round(w * width)] = 1
    return masks


def draw_noise(
    config: TrainingConfig, total: int, step: int, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Draw what is random in a step's whole batch of latents of `shape` [B, 4, H/8, W/8].

    Returns normal numbers that select latents from the VAE's distribution, noise (each of that shape), and
    timesteps [B] of `total`.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, step, 1))
    sample, noise = (torch.randn(*shape, generator=generator) for _ in range(2))
    if config.noise_offset:
        noise += config.noise_offset * torch.randn(*shape[:2], 1, 1, generator=generator)
    return sample, noise, draw_timesteps(config, total, shape[0], generator)


def draw_timesteps(config: TrainingConfig, total: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of `total` training timesteps: int64 [count]; by default evenly.

    `logit_normal`: the fraction t of all timesteps is drawn as the sigmoid of a normal number
    (https://arxiv.org/abs/2403.03206, eq. 19): a mean above 0 prefers much noise. `timestep_weights`: see
    `timestep_density`.
    """
    if config.logit_normal is not None:
        mean, std = config.logit_normal
        fraction = (mean + std * torch.randn(count, generator=generator, dtype=torch.float64)).sigmoid()
        return (fraction * total).long().clamp(max=total - 1)
    if config.timestep_weights is not None:
        density = timestep_density(config.timestep_weights, total)
        return torch.multinomial(density, count, replacement=True, generator=generator)
    return torch.randint(total, (count,), generator=generator)


def timestep_density(weights: Sequence[float], total: int) -> Tensor:
    """Compute how often timesteps are drawn relative to even drawing: float32 [total], of mean 1.

    weights: one for each of as many equal parts of the timesteps. ValueError for more weights than timesteps.
    """
    if len(weights) > total:
        raise ValueError(f"expected at most {total} timestep_weights, one a timestep, got {len(weights)}")
    parts = torch.arange(total) * len(weights) // total
    each = torch.tensor(weights, dtype=torch.float64)[parts]  # [total]
    return (each / each.mean()).float()


def derive_seed(seed: int, *stream: int) -> int:
    """Derive the independent seed of a stream (a step, and what is drawn in it), from 0 to 2**63 - 1."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0]) >> 1

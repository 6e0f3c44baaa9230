"""Training data: images with captions in buckets of like aspect, as batches that follow from seed and step.

A folder holds `name.png` beside `name.txt` (a caption a line), or `metadata.jsonl` with lines of
`{"file_name": ..., "text": caption or list of captions}`. A batch is a pure function of (seed, step), so a
run that was killed goes on with the same batches, and ranks that each take a part of a batch see what one
process would.
Shapes: B images of the whole batch, b of one rank's rows, H and W pixels of a bucket.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import size_ids
from kolors_core.image import (
    center_crop,
    flatten_alpha,
    image_errors,
    load_image,
    pil_to_tensor,
    preprocess_control,
    to_output,
)
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.trainer import TrainingConfig
from kolors_core.vae import VAE
from kolors_core.validation import LARGEST_SEED, as_path, check_float, check_int

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
FULL_MASK_PROBABILITY = 0.2
MIN_BOX, MAX_BOX = 0.2, 0.8  # sides of a mask's box, as fractions of the image's


@dataclass(frozen=True)
class Example:
    """An image's file, its captions of which each use draws one, and its size in pixels, upright."""

    file: Path
    captions: tuple[str, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """One image of a batch: which example, and which of its captions ("" where dropped)."""

    example_index: int
    caption: str


@dataclass(frozen=True)
class Batch:
    """Inputs of the loss for one rank's images. text: embedded, or to be encoded."""

    latents: Tensor  # [b, 4, H/8, W/8]
    text: TextEmbedding | TokenBatch
    size_ids: Tensor  # [b, 6]
    timesteps: Tensor  # [b]
    noise: Tensor  # as latents
    control: Tensor | None = None  # [b, 3, H, W] in [0, 1], for a ControlNet
    extra: Tensor | None = None  # [b, more, H/8, W/8], of a UNet with more input channels


def read_folder(folder: str | Path) -> list[Example]:
    """Every captioned image of a folder; errors name the file and line at fault."""
    from PIL import ExifTags, Image

    folder = as_path("folder", folder)
    captioned = _from_metadata(folder) if (folder / "metadata.jsonl").exists() else _from_text_files(folder)
    if not captioned:
        raise FileNotFoundError(f"{folder}: no images with captions (name.png + name.txt, or metadata.jsonl)")
    examples = []
    for file, captions in captioned:
        with image_errors(file), Image.open(file) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # as by `load_image`
            size = image.size if is_turned else image.size[::-1]
            examples.append(Example(file, captions, *size))
    return examples


def _from_text_files(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in IMAGES:
            text = file.with_suffix(".txt")
            if not text.exists():
                raise FileNotFoundError(f"{text}: no such file, expected the captions of {file.name}")
            with image_errors(text):
                whole = text.read_text(encoding="utf-8-sig")
            lines = tuple(line.strip() for line in whole.splitlines() if line.strip())
            found.append((file, lines or ("",)))
    return found


def _from_metadata(folder: Path) -> list[tuple[Path, tuple[str, ...]]]:
    found, file = [], folder / "metadata.jsonl"
    with image_errors(file):
        whole = file.read_text(encoding="utf-8-sig")
    for number, line in enumerate(whole.split("\n"), start=1):  # `splitlines` would cut within captions too
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected a JSON object with file_name and text: {error}") from None
        if not isinstance(name, str):
            raise ValueError(f"{where}: file_name must be a string, got {name!r}")
        captions = tuple(text) if isinstance(text, list) else (text,)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"{where}: text must be a caption or a list of them, got {text!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{where}: {folder / name} does not exist")
        found.append((folder / name, captions))
    return found


def buckets(resolution: int, step: int = 64) -> list[tuple[int, int]]:
    """Sizes (height, width), multiples of `step`, of about resolution^2 pixels, from 1:2 to 2:1."""
    check_int("resolution", resolution)
    check_int("step", step)
    sizes = {(resolution, resolution)}
    for side in range(step, resolution + 1, step):
        other = resolution * resolution // side // step * step
        if other <= 2 * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def nearest_bucket(example: Example, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect is nearest to the image's, by the logarithm of the ratio."""
    aspect = math.log(example.height / example.width)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size))


def load_pixels(example: Example, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The image, upright, covering its bucket: [3, H, W] in [-1, 1], and where it was cropped.

    The crop's (top, left) is in pixels of the resized image, of which it is the middle. Transparency is
    white.
    """
    from PIL.Image import Resampling

    height, width = size
    image = load_image(example.file, flatten_alpha)
    scale = max(height / image.height, width / image.width)
    cover = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image, corner = center_crop(image.resize(cover, Resampling.LANCZOS), size)
    return pil_to_tensor(image) / 127.5 - 1, corner


class Batches:
    """`batches.samples(step)`: samples of one bucket, the same for the same seed and step.

    A batch holds no image twice unless it is larger than its bucket. caption_dropout: how often a caption
    is replaced by the empty one, which guidance needs.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        seed: int,
        caption_dropout: float = 0.1,
    ) -> None:
        if not examples:
            raise ValueError("no images to make batches of")
        check_int("batch_size", batch_size)
        check_int("seed", seed, least=0, most=LARGEST_SEED)
        check_float("caption_dropout", caption_dropout, 0, 1)
        self.examples, self.batch_size, self.seed, self.dropout = examples, batch_size, seed, caption_dropout
        self.members: dict[tuple[int, int], list[int]] = {}
        for i, example in enumerate(examples):
            self.members.setdefault(nearest_bucket(example, sizes), []).append(i)

    def samples(self, step: int) -> tuple[tuple[int, int], list[Sample]]:
        """Bucket size and samples of a step's batch. A bucket comes as often as its images are many."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
        sizes = sorted(self.members)
        weights = torch.tensor([float(len(self.members[size])) for size in sizes])
        size = sizes[int(torch.multinomial(weights, 1, generator=generator))]
        samples = []
        for i in self._shuffled(self.members[size], generator):
            captions = self.examples[i].captions
            caption = captions[int(torch.randint(len(captions), (), generator=generator))]
            is_dropped = float(torch.rand((), generator=generator)) < self.dropout
            samples.append(Sample(i, "" if is_dropped else caption))
        return size, samples

    def _shuffled(self, members: list[int], generator: torch.Generator) -> list[int]:
        """Images without repetition while any are left: a larger batch goes round again."""
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            order = torch.randperm(len(members), generator=generator).tolist()
            chosen += [members[i] for i in order[: self.batch_size - len(chosen)]]
        return chosen


class LatentDataset:
    """Latents of every image, encoded once; captions as tokens, or encoded once by a frozen encoder.

    control: makes the control image of an image, for a ControlNet; each is made once and kept in 8 bits.
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
                    self.controls[i] = (255 * preprocess_control(control(picture))[0]).round().byte()
                self.latents[i] = (found.mean[0].float().cpu(), found.std[0].float().cpu())
                self.sizes[i] = size_ids((examples[i].height, examples[i].width), crop, size)
        self.text: dict[str, TextEmbedding] = {}
        if frozen_text is not None:
            for caption in sorted({caption for example in examples for caption in example.captions} | {""}):
                with torch.no_grad():
                    text = frozen_text(self._tokens([caption]).to(frozen_text.embedding.weight.device))
                self.text[caption] = text.to("cpu")

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Return the `rows` of a step's batch; noise and timesteps are drawn for all of it."""
        _, samples = self.batches.samples(step)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 1))
        mean, std = (torch.stack([self.latents[s.example_index][k] for s in samples]) for k in (0, 1))
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator)
        timesteps = torch.randint(self.timesteps, (len(samples),), generator=generator)
        ids = torch.cat([self.sizes[sample.example_index] for sample in samples])
        latents, ids, timesteps, noise = (x[rows].to(device) for x in (latents, ids, timesteps, noise))
        control = None
        if self.controls:
            control = torch.stack([self.controls[s.example_index] for s in samples[rows]]).to(device) / 255
        captions = [sample.caption for sample in samples[rows]]
        text = TextEmbedding.cat([self.text[c] for c in captions]) if self.text else self._tokens(captions)
        return Batch(latents, text.to(device), ids, timesteps, noise, control)

    def _tokens(self, captions: Sequence[str]) -> TokenBatch:
        return self.tokenizer(captions).merge_padding()


class MaskedLatentDataset(LatentDataset):
    """A `LatentDataset` for inpainting: batches have `extra` [b, 5, H/8, W/8], a mask and latents of the
    image with the mask's places gray, encoded in every step.

    Masks are drawn on the CPU from (seed, step) for the whole batch, as noise is. The VAE works where it is.
    """

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """As `LatentDataset.batch`, with `extra`."""
        batch = super().batch(step, rows, device)
        size, samples = self.batches.samples(step)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 2))
        masks = random_masks(len(samples), *size, generator)
        noise = torch.randn(len(samples), *batch.latents.shape[1:], generator=generator)[rows]
        masks = masks[rows]
        pixels = torch.stack([load_pixels(self.examples[s.example_index], size)[0] for s in samples[rows]])
        with torch.no_grad():
            found = self.vae.encode((pixels * (1 - masks)).to(self.vae.post_quant_conv.weight))
        seen = found.mean.float() + found.std.float() * noise.to(found.std.device)  # [b, 4, H/8, W/8]
        small = F.interpolate(masks, size=seen.shape[-2:])
        return replace(batch, extra=torch.cat([small.to(device), seen.to(device)], dim=1))


def random_masks(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Draw masks [count, 1, H, W] of 1 (to be generated) and 0: one to three boxes anywhere, or all of it.

    Source: the boxes of https://arxiv.org/abs/2109.07161, section 2.3. A full mask keeps the model able to
    generate from the prompt alone.
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


def derive_seed(*numbers: int) -> int:
    """One seed of several numbers, so that neighbouring steps share no random numbers."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return state % 2**63

"""Training data: captioned images in aspect-ratio buckets; each batch is a function of seed and step.

A folder holds `name.png`, or another format that pillow decodes, with `name.txt` (one caption a line), or
`metadata.jsonl` with lines of `{"file_name": ..., "text": caption or list of captions}`. A batch is a pure
function of (seed, step), so a resumed run gets the same batches, and ranks that each take rows of a batch
train on what one process would.
Shapes: B images of the whole batch, b of one rank's rows, H and W pixels of a bucket.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core import image as images
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import size_ids
from kolors_core.image import Size
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.run_record import digest, digest_model
from kolors_core.training.trainer import TrainingConfig
from kolors_core.vae import VAE
from kolors_core.validation import LARGEST_SEED, as_path, check_float, check_int, short_repr
from weights_convert.untrusted_files import check_file, check_inside, parse_object

if TYPE_CHECKING:
    from PIL.Image import Image

# Formats that pillow knows by name, and decodes by other programs only or not at all.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
MAX_METADATA_BYTES, MAX_CAPTION_BYTES = 2**28, 2**20
FULL_MASK_PROBABILITY = 0.2
MIN_BOX, MAX_BOX = 0.2, 0.8  # sides of a mask's box, as fractions of the image's sides
logger = logging.getLogger("kolors_core")


@dataclass(frozen=True)
class Example:
    """Image file, its captions (each use draws one), and its upright size in pixels."""

    file: Path
    captions: tuple[str, ...]
    height: int
    width: int


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


def read_folder(
    folder: str | Path, *, default_captions: Sequence[str] = (), allow_outside: bool = False
) -> list[Example]:
    """List the captioned images of a folder; a log line counts the files that are left out.

    default_captions: captions of an image without a .txt, which else is left out.
    allow_outside: read files too that leave the folder, by a link or by their name in `metadata.jsonl`; else
    they are an error, except a Hugging Face cache's own links. Raises FileNotFoundError or ValueError naming
    the file and line at fault, such as a captioned image that is damaged.
    """
    from PIL import ExifTags

    folder = as_path("folder", folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    root, metadata = None if allow_outside else folder, folder / "metadata.jsonl"
    has_metadata = metadata.exists()
    defaults = tuple(default_captions)
    found = _from_metadata(metadata, root) if has_metadata else _from_text_files(folder, root, defaults)
    captioned, examples = list(found), list[Example]()
    for file, captions in captioned:
        _check_place(file, root)
        with images.open_image(file) as image:
            is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # `load_image` rotates back
            examples.append(Example(file, captions, *(image.size if is_rotated else image.size[::-1])))
    used = {file for file, _ in captioned}
    texts = {metadata} if has_metadata else {file.with_suffix(".txt") for file in used}
    folders = {folder} | {p for file in used for p in file.parents if p.is_relative_to(folder)}
    left_out = _left_out(folders, used | texts, has_metadata)
    if not examples:
        there = f"; {left_out}" if left_out else ""
        wanted = "name.png + name.txt, or metadata.jsonl"
        raise FileNotFoundError(f"{folder}: no images with captions ({wanted}){there}")
    if left_out:
        logger.warning("%s: %d captioned images are read, others left out; %s", folder, len(used), left_out)
    return examples


def _image_suffixes() -> set[str]:
    """Return the suffixes, such as ".png", of the image formats that pillow decodes."""
    from PIL import Image

    formats = Image.registered_extensions().items()
    return {suffix for suffix, name in formats if name in Image.OPEN and name not in NOT_DECODED}


def _left_out(folders: set[Path], used: set[Path], has_metadata: bool) -> str:
    """Count, by kind and with an example, what is in the folders beside the files that are used."""
    kinds, suffixes = dict[str, list[str]](), _image_suffixes()
    for file in sorted({file for folder in folders for file in folder.iterdir()} - used - folders):
        kind = "other files or folders"
        if (suffix := file.suffix.lower()) in suffixes:
            kind = "images without a caption"
        elif suffix == ".txt" and not has_metadata:
            kind = "captions without an image"
        kinds.setdefault(kind, []).append(file.name)
    return "; ".join(f"{kind}: {len(names)} ({short_repr(names[0])})" for kind, names in kinds.items())


def _check_place(file: Path, root: Path | None) -> None:
    """Raise ValueError for a file that leaves the dataset's folder, `root`, unless that is None."""
    if root is not None:
        try:
            check_inside(file, root)
        except ValueError as error:
            raise ValueError(f"{error}: allow_outside=True reads such files") from None


def _read_text(file: Path, longest: int, root: Path | None) -> str:
    _check_place(file, root)
    check_file(file, longest)
    with images.image_errors(file):
        return file.read_text(encoding="utf-8-sig")


def _from_text_files(
    folder: Path, root: Path | None, defaults: tuple[str, ...]
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    suffixes = _image_suffixes()
    for file in sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes):
        if (text := file.with_suffix(".txt")).exists():
            lines = _read_text(text, MAX_CAPTION_BYTES, root).splitlines()
            yield file, tuple(line.strip() for line in lines if line.strip()) or ("",)
        elif defaults:
            yield file, defaults


def _from_metadata(file: Path, root: Path | None) -> Iterator[tuple[Path, tuple[str, ...]]]:
    lines = _read_text(file, MAX_METADATA_BYTES, root).split("\n")  # `splitlines` would also split captions
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        row = parse_object(line.encode(), where)
        if missing := [name for name in ("file_name", "text") if name not in row]:
            raise ValueError(
                f"{where}: expected a JSON object with file_name and text, {missing[0]} is missing"
            )
        name, captions = row["file_name"], row["text"]
        if not isinstance(name, str):
            raise ValueError(f"{where}: file_name must be a string, got {short_repr(name)}")
        captions = tuple(captions) if isinstance(captions, list) else (captions,)
        if not captions or not all(isinstance(caption, str) for caption in captions):
            got = short_repr(row["text"])
            raise ValueError(f"{where}: text must be a caption or a list of them, got {got}")
        if not (image := file.parent / name).is_file():
            raise FileNotFoundError(f"{where}: {image} does not exist")
        yield image, captions


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
    image = images.load_image(example.file, partial(images.flatten_alpha, name=example.file))
    scale = max(height / image.height, width / image.width)
    cover = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    with images.image_errors(example.file):
        images.check_pixels(*cover)
    image, corner = images.center_crop(image.resize(cover, Resampling.LANCZOS), size)
    return images.pil_to_tensor(image) / 127.5 - 1, corner


class Batches:
    """Sampler of batches: `samples(step)` depends on seed and step alone, and is of one bucket.

    A batch holds no image twice unless it is larger than its bucket. caption_dropout: the probability that
    a caption is replaced by the empty one, which classifier-free guidance needs.
    """

    def __init__(
        self, examples: Sequence[Example], sizes: Sequence[Size], batch_size: int, seed: int,
        caption_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        if not examples:
            raise ValueError("no images to make batches of")
        check_int("batch_size", batch_size)
        check_int("seed", seed, least=0, most=LARGEST_SEED)
        check_float("caption_dropout", caption_dropout, 0, 1)
        self.examples, self.batch_size, self.seed, self.dropout = examples, batch_size, seed, caption_dropout
        self.members: dict[Size, list[int]] = {}
        for i, example in enumerate(examples):
            self.members.setdefault(nearest_bucket(example, sizes), []).append(i)

    def samples(self, step: int) -> tuple[Size, list[tuple[int, str]]]:
        """Draw a step's bucket, in proportion to its number of images, and its (example's index, caption)."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, step))
        sizes = sorted(self.members)
        weights = torch.tensor([float(len(self.members[size])) for size in sizes])
        size = sizes[int(torch.multinomial(weights, 1, generator=generator))]
        chosen, samples = [], []
        while len(chosen) < self.batch_size:
            chosen += torch.randperm(len(self.members[size]), generator=generator).tolist()
        for i in (self.members[size][k] for k in chosen[: self.batch_size]):
            captions = self.examples[i].captions
            caption = captions[int(torch.randint(len(captions), (), generator=generator))]
            is_kept = float(torch.rand((), generator=generator)) >= self.dropout
            samples.append((i, caption if is_kept else ""))
        return size, samples


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
                    image = images.to_images(pixels[None], "pil")[0]
                    self.controls[i] = (255 * images.preprocess_control(control(image))[0]).round().byte()
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
                tokens = self._tokens([caption]).to(frozen_text.embedding.weight.device)
                self.text[caption] = frozen_text(tokens).to("cpu")

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build the `rows` of a step's batch; noise and timesteps are drawn for the whole batch."""
        indices, captions = zip(*self.batches.samples(step)[1], strict=True)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 1))
        mean, std = torch.stack([self.latents[i] for i in indices], dim=1)  # [B, 4, H/8, W/8]
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if self.config.noise_offset:
            noise += self.config.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator)
        timesteps = draw_timesteps(self.config, self.timesteps, len(indices), generator)
        ids = torch.cat([self.sizes[i] for i in indices])
        latents, ids, timesteps, noise = (x[rows].to(device) for x in (latents, ids, timesteps, noise))
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

    def _tokens(self, captions: Sequence[str]) -> TokenBatch:
        return self.tokenizer(captions).merge_padding()


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
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, step, 2))
        masks = random_masks(len(samples), *size, generator)[rows]
        noise = torch.randn(len(samples), *batch.latents.shape[1:], generator=generator)[rows]
        pixels = torch.stack([load_pixels(self.examples[i], size)[0] for i, _ in samples[rows]])
        encoded = self.vae.encode_images((pixels * (1 - masks)).to(self.vae.post_quant_conv.weight))
        masked = encoded.mean.float() + encoded.std.float() * noise.to(encoded.std.device)  # [b, 4, H/8, W/8]
        masks = F.interpolate(masks, size=masked.shape[-2:])  # [b, 1, H/8, W/8]
        return replace(batch, extra=torch.cat([masks.to(device), masked.to(device)], dim=1))


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

"""Pictures with captions, in buckets of like aspect, as batches that depend on nothing but a seed and a step.

A folder holds `name.png` beside `name.txt` (a caption a line), or `metadata.jsonl` with lines of
`{"file_name": ..., "text": caption or list of captions}`. A batch is a pure function of (seed, step), so a
run that was killed goes on with the same batches, and ranks that each take a part of a batch see what one
process would.
Shapes: B pictures, H and W pixels of a bucket.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kolors_core.image import center_crop, flatten_alpha, image_errors, load_image, pil_to_tensor
from kolors_core.validation import LARGEST_SEED, finite_number, path_of, whole_number

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Example:
    """A picture's file, its captions of which each use draws one, and its size in pixels, upright."""

    file: Path
    captions: tuple[str, ...]
    height: int
    width: int


@dataclass(frozen=True)
class Sample:
    """One picture of a batch: which example, and which of its captions ("" where dropped)."""

    example: int
    caption: str


def read_folder(folder: str | Path) -> list[Example]:
    """Every captioned picture of a folder; errors name the file and line at fault."""
    from PIL import ExifTags, Image

    folder = path_of("folder", folder)
    captioned = _from_metadata(folder) if (folder / "metadata.jsonl").exists() else _from_text_files(folder)
    if not captioned:
        raise FileNotFoundError(
            f"{folder}: no pictures with captions (name.png + name.txt, or metadata.jsonl)"
        )
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
                raise FileNotFoundError(f"{text}: no such file, wanted the captions of {file.name}")
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
            raise ValueError(f"{where}: wanted a JSON object with file_name and text: {error}") from None
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
    whole_number("resolution", resolution)
    whole_number("step", step)
    sizes = {(resolution, resolution)}
    for side in range(step, resolution + 1, step):
        other = resolution * resolution // side // step * step
        if other <= 2 * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes)


def bucket_of(example: Example, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect is nearest to the picture's, by the logarithm of the ratio."""
    aspect = math.log(example.height / example.width)
    return min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), size))


def load_pixels(example: Example, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """The picture, upright, covering its bucket: [3, H, W] in [-1, 1], and where it was cropped.

    The crop's (top, left) is in pixels of the resized picture, of which it is the middle. Transparency is
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
    """`batches.at(step)`: samples of one bucket, the same for the same seed and step.

    A batch holds no picture twice unless it is larger than its bucket. caption_dropout: how often a caption
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
            raise ValueError("no pictures to make batches of")
        whole_number("batch_size", batch_size)
        whole_number("seed", seed, least=0, most=LARGEST_SEED)
        finite_number("caption_dropout", caption_dropout, 0, 1)
        self.examples, self.batch_size, self.seed, self.dropout = examples, batch_size, seed, caption_dropout
        self.members: dict[tuple[int, int], list[int]] = {}
        for i, example in enumerate(examples):
            self.members.setdefault(bucket_of(example, sizes), []).append(i)

    def at(self, step: int) -> tuple[tuple[int, int], list[Sample]]:
        """Bucket size and samples of a step's batch. A bucket comes as often as its pictures are many."""
        draw = torch.Generator().manual_seed(mix(self.seed, step))
        sizes = sorted(self.members)
        weights = torch.tensor([float(len(self.members[size])) for size in sizes])
        size = sizes[int(torch.multinomial(weights, 1, generator=draw))]
        samples = []
        for i in self._shuffled(self.members[size], draw):
            captions = self.examples[i].captions
            caption = captions[int(torch.randint(len(captions), (), generator=draw))]
            is_dropped = float(torch.rand((), generator=draw)) < self.dropout
            samples.append(Sample(i, "" if is_dropped else caption))
        return size, samples

    def _shuffled(self, members: list[int], draw: torch.Generator) -> list[int]:
        """Pictures without repetition while any are left: a larger batch goes round again."""
        chosen: list[int] = []
        while len(chosen) < self.batch_size:
            order = torch.randperm(len(members), generator=draw).tolist()
            chosen += [members[i] for i in order[: self.batch_size - len(chosen)]]
        return chosen


def mix(*numbers: int) -> int:
    """One seed of several numbers, so that neighbouring steps share no random numbers."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = (state ^ (number + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        state ^= state >> 31
    return state % 2**63

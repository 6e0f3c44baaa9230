"""Detector of what an image of a scene shows: things, their numbers and places, the ground, a sign's text.

It judges the embedded model, and learns from rendered scenes alone, blurred, discolored and noisy as a
decoder's images are. As in CenterNet (https://arxiv.org/abs/1904.07850) each cell of a coarse grid says what
has its middle there, and how large it is. Its features also give a distance between two images.
Shapes: B images, H and W pixels, G cells of the grid's side, K kinds, C characters.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.tiny.emoji import CONCEPTS, SIZE
from benchmarks.tiny.processes import report_every
from benchmarks.tiny.scenes import (
    CHARACTERS,
    CHINESE,
    DIGITS,
    GROUNDS,
    KINDS,
    LARGE,
    LETTERS,
    SIGN,
    Item,
    Scene,
    compose,
    crowd,
    pixels,
)
from kolors_core.training.data import derive_seed
from kolors_core.training.run_record import digest_weights
from kolors_core.training.trainer import Trainer, TrainingConfig
from kolors_core.vae import VAE

CELL = 8  # pixels of a cell of the grid
WIDTHS, DEPTHS = (48, 96, 160), (1, 2, 2)  # channels and residual convolutions of the stages
CROWDED = 0.3  # how many images of a training batch are fuller than `compose` makes them
DECODED = 0.25  # how many have gone through the VAE, if there is one
FAR = 2 * 10**9  # the first seed of held-out scenes
SURE = 0.25  # the probability, summed over a cell and its neighbours, from which something is there
BOX_WEIGHT = 2.0
TRAINING = TrainingConfig(
    steps=10_000, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=100, ema_decay=0.995,
    dtype=torch.bfloat16, save_every=200,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Contents of an image. items: things and signs, the surest first; ground: of `GROUNDS`.

    text: what the signs say, read from left to right.
    """

    items: tuple[Item, ...]
    ground: str
    text: str = ""

    @property
    def kinds(self) -> Counter[str]:
        """Count the items of each kind."""
        return Counter(item.kind for item in self.items)


@dataclass(frozen=True)
class Readings:
    """Logits and boxes that a detector computes of B images.

    kinds: logits [B, K + 1, G, G], the last of nothing; boxes [B, 4, G, G]: how far right and down of the
    cell's middle the item's is, its width and height, in cells; characters [B, C + 1, G, G]; grounds [B, 13].
    """

    kinds: Tensor
    boxes: Tensor
    characters: Tensor
    grounds: Tensor


@dataclass(frozen=True)
class Scenes:
    """Batch of rendered scenes: images [B, 3, H, W] in [-1, 1] and what they show.

    kinds, characters [B, G, G]: numbers, that of nothing after the last. boxes: [B, 4, G, G]. grounds: [B].
    """

    images: Tensor
    kinds: Tensor
    boxes: Tensor
    characters: Tensor
    grounds: Tensor


class Residual(nn.Module):
    """Residual block of convolutions, each after a norm."""

    def __init__(self, channels: int, depth: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels) for _ in range(depth)])
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, h, w]."""
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return x + y


class Detector(nn.Module):
    """Detector of three stages of convolutions, at 1/4, 1/8 and 1/16 of the size, with heads at 1/8."""

    def __init__(self) -> None:
        super().__init__()
        self.downs = nn.ModuleList(
            [nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip((12, *WIDTHS), WIDTHS, strict=False)]
        )
        self.blocks = nn.ModuleList([Residual(w, depth) for w, depth in zip(WIDTHS, DEPTHS, strict=True)])
        self.up, self.joined = nn.Conv2d(WIDTHS[2], WIDTHS[1], 1), Residual(WIDTHS[1], 1)
        self.norm = nn.GroupNorm(8, WIDTHS[1])
        self.to_kinds = nn.Conv2d(WIDTHS[1], len(KINDS) + 1, 1)
        self.to_boxes = nn.Conv2d(WIDTHS[1], 4, 1)
        self.to_characters = nn.Conv2d(WIDTHS[1], len(CHARACTERS) + 1, 1)
        self.to_ground = nn.Linear(sum(WIDTHS), len(GROUNDS))
        for head in (self.to_kinds, self.to_characters):  # almost all cells have nothing
            assert head.bias is not None
            nn.init.constant_(head.bias[-1:], 8.0)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Compute the features of images [B, 3, H, W]: [B, C, H / 4, W / 4], and so on to H / 16."""
        x, found = F.pixel_unshuffle(images, 2), []  # [B, 12, H / 2, W / 2]
        for down, block in zip(self.downs, self.blocks, strict=True):
            x = block(down(F.relu(x) if found else x))
            found.append(x)
        return found

    def forward(self, images: Tensor) -> Readings:
        """Read images [B, 3, H, W] in [-1, 1]."""
        stages = self.stages(images)
        pooled = torch.cat([F.relu(x).mean((2, 3)) for x in stages], dim=1)  # [B, sum of WIDTHS]
        x = stages[1] + F.interpolate(self.up(F.relu(stages[2])), scale_factor=2.0)
        x = F.relu(self.norm(self.joined(x)))  # [B, C, G, G]
        return Readings(self.to_kinds(x), self.to_boxes(x), self.to_characters(x), self.to_ground(pooled))

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Found]:
        """Detect what images [B, 3, H, W] in [-1, 1] show.

        Few things in training are large, so what is missed in an image may be found in the image halved.
        """
        found = list[Found]()
        for part in images.split(64):
            both = read(self(part)), read(self(halved(part)))
            found += [with_large(whole, half) for whole, half in zip(*both, strict=True)]
        return found

    @torch.no_grad()
    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the distance of images [B, 3, H, W]: [B], 0 for equal ones.

        As LPIPS (https://arxiv.org/abs/1801.03924), without its learned weights: features of each stage,
        averaged to the coarsest grid, each place's scaled to length 1; their mean squared distance.
        """
        found = torch.zeros(len(a), device=a.device)
        for x, y in zip(self.stages(a), self.stages(b), strict=True):
            side = a.shape[-1] // 16
            x, y = (F.normalize(F.adaptive_avg_pool2d(F.relu(z.float()), side), dim=1) for z in (x, y))
            found += (x - y).square().sum(1).mean((1, 2)) / len(WIDTHS)
        return found


def peaks(logits: Tensor) -> list[tuple[int, int, int, float]]:
    """Find what stands where by logits [N + 1, G, G], the last of nothing: (class, row, column, probability).

    The probability of an item whose middle is near a cell's edge is shared by the cells beside it: so that of
    a cell and its eight neighbours is summed, at each cell where it is the largest of the nine.
    """
    probability = logits.float().softmax(0)[:-1]  # [N, G, G]
    there = probability.sum(0)  # [G, G]
    there = there + torch.arange(there.numel(), device=there.device).view_as(there) * -1e-7  # no two equal
    near = F.avg_pool2d(probability, 3, 1, 1, divisor_override=1)  # [N, G, G]
    is_peak = (there == F.max_pool2d(there[None], 3, 1, 1)[0]) & (near.sum(0) > SURE)
    found = []
    for row, column in is_peak.nonzero().tolist():
        classes = near[:, row, column]
        found.append((int(classes.argmax()), row, column, float(classes.sum())))
    return sorted(found, key=lambda each: -each[3])


def read(readings: Readings) -> list[Found]:
    """Read off what each image shows."""
    found = []
    for kinds, boxes, characters, ground in zip(
        readings.kinds, readings.boxes.float(), readings.characters, readings.grounds, strict=True
    ):
        items = []
        for kind, row, column, _ in peaks(kinds):
            right, down, width, height = (boxes[:, row, column] * CELL).tolist()
            x, y = (column + 0.5) * CELL + right, (row + 0.5) * CELL + down
            items.append(Item(KINDS[kind], x, y, width, height, max(width, height)))
        letters = sorted(peaks(characters), key=lambda each: each[2])
        text = "".join(CHARACTERS[character] for character, *_ in letters)
        found.append(Found(tuple(items), GROUNDS[int(ground.argmax())], text))
    return found


def halved(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] at half their size in the middle of pages of their size, the edges drawn out."""
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    right, down = images.shape[-1] // 4, images.shape[-2] // 4
    return F.pad(small, (right, right, down, down), mode="replicate")


def with_large(whole: Found, half: Found) -> Found:
    """Add large things of the halved image where the whole one has none."""
    items = list(whole.items)
    for item in half.items:
        twice = {name: 2 * getattr(item, name) for name in ("width", "height", "size")}
        large = replace(item, x=2 * item.x - SIZE / 2, y=2 * item.y - SIZE / 2, **twice)
        inside = (abs(i.x - large.x) < item.width and abs(i.y - large.y) < item.height for i in whole.items)
        if large.size > LARGE and not any(inside):
            items.append(large)
    return replace(whole, items=tuple(items))


class Reading(nn.Module):
    """Loss of a detector: cross-entropies, summed over the grid and divided by the number of items."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Scenes) -> Tensor:
        """Compute the mean loss of the batch."""
        found = self.detector(batch.images)
        is_there = batch.kinds < len(KINDS)
        items, letters = is_there.sum(), (batch.characters < len(CHARACTERS)).sum()
        apart = (found.boxes.float() - batch.boxes).abs().mean(1)[is_there].mean()
        of_kinds, of_characters = (
            F.cross_entropy(logits.float(), wanted, reduction="sum") / count.clamp(min=1)
            for logits, wanted, count in (
                (found.kinds, batch.kinds, items), (found.characters, batch.characters, letters),
            )
        )  # fmt: skip
        of_grounds = F.cross_entropy(found.grounds.float(), batch.grounds)
        return of_kinds + of_characters + of_grounds + BOX_WEIGHT * apart


def truth(scene: Scene) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lay out a scene's kinds, boxes, characters and ground: a row of each of those of `Scenes`."""
    side = SIZE // CELL
    kinds, boxes = torch.full((side, side), len(KINDS)), torch.zeros(4, side, side)
    characters = torch.full((side, side), len(CHARACTERS))
    for item in scene.items:
        row, column = int(item.y // CELL), int(item.x // CELL)
        kinds[row, column] = KINDS.index(item.kind)
        apart = (item.x / CELL - column - 0.5, item.y / CELL - row - 0.5)
        boxes[:, row, column] = torch.tensor([*apart, item.width / CELL, item.height / CELL])
        for character in item.characters:
            characters[row, int(character.x // CELL)] = CHARACTERS.index(character.kind)
    return kinds, boxes, characters, GROUNDS.index(scene.ground)


def crowded(seed: int) -> Scene:
    """Compose a scene of up to four things, and mostly a sign, mostly of three characters."""
    order = random.Random(seed)
    kinds, text = order.sample(CONCEPTS, 4), ""
    if order.random() < 0.75:
        script = order.choice((LETTERS + DIGITS, CHINESE, CHINESE))
        text = "".join(order.choice(script) for _ in range(order.choice((1, 2, 3, 3, 3))))
        kinds.insert(0, SIGN)
    return Scene(order.choice(GROUNDS), crowd(order, tuple(kinds), text), seed)


def degraded(image: Tensor, order: random.Random) -> Tensor:
    """Degrade an image [3, H, W] as a decoder might: blurred, of other colors, and noisy, each a little."""
    if order.random() < 0.5:
        side = order.randint(SIZE // 2, SIZE)
        small = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)
        image = F.interpolate(small, (SIZE, SIZE), mode="bicubic")[0]
    if order.random() < 0.7:
        draw = torch.Generator().manual_seed(order.getrandbits(32))
        image = image * (1 + 0.06 * torch.randn(3, 1, 1, generator=draw))
        image = image + 0.05 * torch.randn(3, 1, 1, generator=draw)
        image = image + order.uniform(0, 0.08) * torch.randn(image.shape, generator=draw)
    return image.clamp(-1, 1)


@torch.no_grad()
def reconstructed(vae: VAE, images: Tensor) -> Tensor:
    """Encode and decode images [B, 3, H, W] in [-1, 1]."""
    return vae.decode_latents(vae.encode_images(images).mean).float().clamp(-1, 1)


class SceneSource:
    """Source of batches of rendered scenes, degraded. vae: `DECODED` of them go through it."""

    def __init__(self, config: TrainingConfig, vae: VAE | None = None) -> None:
        self.config, self.vae = config, vae

    def batch(self, step: int, rows: slice, device: torch.device) -> Scenes:
        """Render the `rows` of a step's batch."""
        images, truths = [], []
        for i in range(*rows.indices(self.config.batch_size)):
            seed = derive_seed(self.config.seed, step, i)
            order = random.Random(seed)
            scene = crowded(seed) if order.random() < CROWDED else compose(seed)
            image, through = pixels(scene), order.random() < DECODED
            if through and self.vae is not None:
                image = reconstructed(self.vae, image[None].to(device))[0].cpu()
            images.append(degraded(image, order))
            truths.append(truth(scene))
        kinds, boxes, characters, grounds = zip(*truths, strict=True)
        return Scenes(
            torch.stack(images).to(device), torch.stack(kinds).to(device), torch.stack(boxes).to(device),
            torch.stack(characters).to(device), torch.tensor(grounds, device=device),
        )  # fmt: skip

    def record(self) -> dict[str, object]:
        """Record what batches depend on besides the step."""
        vae = None if self.vae is None else digest_weights(self.vae.state_dict())
        return {"data": [self.config.batch_size, self.config.seed, CROWDED, DECODED], "vae": vae}


def accuracy(detector: Detector, count: int, vae: VAE | None = None) -> dict[str, float]:
    """Measure the share of `count` held-out scenes, or of their reconstructions by a VAE, that is read right.

    Keys: "things", each thing and sign by its kind, those found that are not there counted as wrong too;
    "kinds and numbers", "ground", "characters" (single ones), "texts", "all" of a scene; and "pixels", how
    far middles are off in the mean.
    """
    scenes = [compose(FAR + i, is_trained=False) for i in range(count)]
    device = detector.to_ground.weight.device
    found = list[Found]()
    for start in range(0, count, 32):
        images = torch.stack([pixels(scene) for scene in scenes[start : start + 32]]).to(device)
        found += detector.detect(images if vae is None else reconstructed(vae, images))
    kinds, grounds, texts, characters, off = [], [], [], [], list[float]()
    agreed, either = 0, 0
    for scene, each in zip(scenes, found, strict=True):
        text = "".join(item.text for item in scene.items)
        there = Counter(item.kind for item in scene.items)
        agreed, either = agreed + (each.kinds & there).total(), either + (each.kinds | there).total()
        kinds.append(each.kinds == there)
        grounds.append(each.ground == scene.ground)
        texts.append(each.text == text)
        characters += [each.text[i : i + 1] == character for i, character in enumerate(text)]
        for item in scene.items:
            same = [other for other in each.items if other.kind == item.kind]
            off += [min(max(abs(o.x - item.x), abs(o.y - item.y)) for o in same)] if same else []
    whole = [all(parts) for parts in zip(kinds, grounds, texts, strict=True)]
    return {
        "things": agreed / max(1, either), "kinds and numbers": _mean(kinds), "ground": _mean(grounds),
        "characters": _mean(characters), "texts": _mean(texts), "all": _mean(whole), "pixels": _mean(off),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))


def train(
    folder: Path, device: torch.device, vae: VAE | None = None, training: TrainingConfig = TRAINING,
    resume: str = "same",
) -> Detector:  # fmt: skip
    """Train a detector, or take up the run in `folder`."""
    torch.manual_seed(training.seed)  # of the first weights
    detector = Detector().to(device)
    source, report = SceneSource(training, vae), report_every(50, "detector")
    trainer = Trainer(Reading(detector), source, training, folder, report, resume=resume)
    trainer.fit(progress=False)
    trainer.load_ema_weights()
    return detector.eval().requires_grad_(False)

"""Simple facts of a scene's image: its ground, where something is on it, how many, and which of a few.

They are judged without the fonts that scenes are made of: scenes.png has one small image each of the things
and of signs with one character, cut out and scaled to squares of `SIDE` pixels.
Images are tensors [3, 128, 128] in [0, 1].
"""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.tiny.scenes import GROUNDS, ground

STRIP, SIDE = Path(__file__).parent / "scenes.png", 40
THINGS = ("ladybug", "fox", "rocket", "sunflower", "banana", "frog", "fire truck", "whale")
CHINESE_THINGS = ("瓢虫", "狐狸", "火箭", "向日葵", "香蕉", "青蛙", "消防车", "鲸鱼")
CHARACTERS = "AK7大图水"
INK = 0.2  # how far from white a pixel is at least that something is on
SMALLEST = 60  # pixels of an item


@cache
def parts() -> tuple[Tensor, Tensor]:
    """The things, and the signs: [8, 3, SIDE, SIDE] and [6, 3, SIDE, SIDE]."""
    every = torch.stack(as_tensor(Image.open(STRIP)).split(SIDE, dim=2))
    return every[: len(THINGS)], every[len(THINGS) :]


def as_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


def ring(image: Tensor) -> Tensor:
    """The mean colors of the four edges, two pixels wide, where nothing but the ground is: [12]."""
    edges = image[:, :2], image[:, -2:], image[:, :, :2], image[:, :, -2:]
    return torch.cat([edge.mean((1, 2)) for edge in edges])


def ground_of(image: Tensor) -> str:
    """The ground whose edges are the most similar."""
    known = torch.stack([ring(as_tensor(ground(name, random.Random(0)))) for name in GROUNDS])
    return GROUNDS[int((known - ring(image)).norm(dim=1).argmin())]


def ink(image: Tensor) -> Tensor:
    """Where something is on a white ground: [128, 128]."""
    return image.amin(0) < 1 - INK


def items(image: Tensor) -> list[Tensor]:
    """The mask of each item on a white ground, the largest first, by what touches."""
    left, found = ink(image), list[Tensor]()
    while left.any():
        item = torch.zeros_like(left).flatten()
        item[left.flatten().to(torch.uint8).argmax()] = True
        item, size = item.view_as(left), 0
        while item.sum() > size:
            size = int(item.sum())
            item = F.max_pool2d(item[None, None].float(), 5, 1, 2)[0, 0].bool() & left
        left = left & ~item
        if size >= SMALLEST:
            found.append(item)
    return sorted(found, key=lambda item: -int(item.sum()))


def middle(mask: Tensor) -> tuple[float, float]:
    """The mean column and row of a mask, in pixels."""
    rows, columns = mask.nonzero(as_tuple=True)
    return columns.float().mean().item(), rows.float().mean().item()


def like(image: Tensor, red: float, green: float, blue: float, within: float = 0.2) -> Tensor:
    """Where the color is about this: [128, 128]."""
    return (image - torch.tensor([red, green, blue])[:, None, None]).norm(dim=0) < within


def cut(image: Tensor, mask: Tensor) -> Tensor:
    """What is in a mask's box, scaled to a square: [3, SIDE, SIDE]."""
    rows, columns = mask.nonzero(as_tuple=True)
    part = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    return F.interpolate(part[None], (SIDE, SIDE), mode="bilinear", antialias=True)[0]


def alike(image: Tensor) -> list[str]:
    """`THINGS`, those first that the largest item on a white ground is most like, mirrored or not."""
    every = _distances(image, torch.cat([parts()[0], parts()[0].flip(3)]))
    return [THINGS[i] for i in every.unflatten(0, (2, -1)).amin(0).argsort().tolist()]


def thing_in(image: Tensor) -> str:
    """Which of `THINGS` the largest item on a white ground is most like, mirrored or not."""
    return alike(image)[0]


def character_in(image: Tensor) -> str:
    """What the sign on a white ground says, one of `CHARACTERS`."""
    return CHARACTERS[int(_distances(image, parts()[1]).argmin())]


def _distances(image: Tensor, known: Tensor) -> Tensor:
    """How far the largest item is from each of the known parts [N, 3, SIDE, SIDE]: [N]."""
    found = items(image)
    part = cut(image, found[0]) if found else torch.ones(3, SIDE, SIDE)
    blurred = F.avg_pool2d(torch.cat([part[None], known]), 2)
    return (blurred[1:] - blurred[:1]).flatten(1).norm(dim=1)

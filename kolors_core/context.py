"""What the UNet is told beside latents and time: what its cross-attentions are to read, or have read.

Shapes: B batch, C channels, N pixels of a feature map, S text tokens, I images that guide, Q tokens each.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Masks:
    """Masks [1 or B, I, any height, any width], resized once to each size of feature map that asks."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks.float()
        self.sizes: dict[tuple[int, int], Tensor] = {}

    def at(self, height: int, width: int) -> Tensor:
        """At a feature map's size, as in the reference: [1 or B, I, N]."""
        if (height, width) not in self.sizes:
            resized = F.interpolate(self.masks, size=(height, width), mode="bicubic")
            self.sizes[height, width] = resized.flatten(2)
        return self.sizes[height, width]


class ImagePrompt(NamedTuple):
    """The images that one attached IP-Adapter (ip_adapter.py) reads.

    tokens: [B, I, Q, context_dim]. masks: None, or [1 or B, I, any height, any width], from 0 to 1: where in
    the image each of them acts.
    """

    tokens: Tensor
    masks: Tensor | Masks | None = None

    @classmethod
    def cat(cls, *parts: "ImagePrompt") -> "ImagePrompt":
        """Batches one after another; masks of one row serve all."""
        masks = [part.masks for part in parts if isinstance(part.masks, Tensor)]
        if masks and any(mask.shape[0] > 1 for mask in masks):
            masks = [torch.cat(masks)]
        return cls(torch.cat([part.tokens for part in parts]), masks[0] if masks else None)


class ImageKeysValues(NamedTuple):
    """Keys and values of an IP-Adapter's images in one cross-attention, each [B, heads, tokens, C/heads].

    One pair for all images, or with masks one for each. masks: None, or any size; [1 or B, I, N] once the
    feature map's size is known.
    """

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    masks: Masks | Tensor | None


class KeysValues(NamedTuple):
    """What a cross-attention has read: keys and values [B, heads, S, C/heads], a logit bias [B, 1, 1, S] or
    None, and what its image branches have. perturbed: as in `Context`.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None
    images: tuple[ImageKeysValues, ...]
    perturbed: int = 0

    def rows(self, where: Tensor) -> "KeysValues":
        """These rows [B] of it; masks are those of all B rows already."""
        if where.shape[0] == self.k.shape[0]:
            return self
        images = tuple(
            image._replace(keys_values=tuple((k[where], v[where]) for k, v in image.keys_values))
            for image in self.images
        )
        bias = None if self.bias is None else self.bias[where]
        return KeysValues(self.k[where], self.v[where], bias, images, self.perturbed)


class Context(NamedTuple):
    """What an attention is to read: tokens [B, S, context_dim], None or a logit bias [B, 1, 1, S] on them,
    and for each attached IP-Adapter its images.

    perturbed: of how many of the last rows the block's self-attention returns the values as they are.
    """

    tokens: Tensor
    bias: Tensor | None = None
    images: tuple[ImagePrompt, ...] = ()
    perturbed: int = 0

    def distinct(self) -> tuple["Context", Tensor]:
        """The rows that differ, and for each of the B rows which of them it is: [B].

        Several images of one prompt, and one negative prompt for several, need be read only once.
        """
        parts = [self.tokens, *(image.tokens for image in self.images)]
        parts += [] if self.bias is None else [self.bias]
        kept, where = list[int](), list[int]()
        for i in range(self.tokens.shape[0]):
            same = (n for n, k in enumerate(kept) if all(torch.equal(part[i], part[k]) for part in parts))
            where.append(next(same, len(kept)))
            kept += [i] if where[-1] == len(kept) else []
        images = tuple(image._replace(tokens=image.tokens[kept]) for image in self.images)
        bias = None if self.bias is None else self.bias[kept]
        told = Context(self.tokens[kept], bias, images, self.perturbed)
        return told, torch.tensor(where, device=self.tokens.device)


def resize_masks(context: Context | KeysValues, height: int, width: int) -> Context | KeysValues:
    """A `Context` or `KeysValues` whose masks, if there are any, have a feature map's size."""
    images: Any = tuple(
        image._replace(masks=image.masks.at(height, width)) if isinstance(image.masks, Masks) else image
        for image in context.images
    )
    return context._replace(images=images) if images else context

"""Inputs of the UNet's cross-attentions, as tokens or as precomputed keys and values.

Shapes: B batch, C channels, N pixels of a feature map, S text tokens, I prompt images of Q tokens each.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ResizedMasks:
    """Masks [1 or B, I, any height, any width], resized once for each feature map size in use."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks.float()
        self.sizes: dict[tuple[int, int], Tensor] = {}

    def at(self, height: int, width: int) -> Tensor:
        """Resize to a feature map's size as the reference does: [1 or B, I, N]."""
        if (size := (height, width)) not in self.sizes:
            self.sizes[size] = F.interpolate(self.masks, size=size, mode="bicubic").flatten(2)
        return self.sizes[size]


class ImagePrompt(NamedTuple):
    """Image tokens [B, I, Q, context_dim] for one attached IP-Adapter (ip_adapter.py)."""

    tokens: Tensor
    masks: Tensor | ResizedMasks | None = None  # where each acts: [1 or B, I, any height, any width], 0 to 1

    @classmethod
    def cat(cls, *parts: "ImagePrompt") -> "ImagePrompt":
        """Concatenate batches; masks of one row apply to all."""
        masks = [part.masks for part in parts if isinstance(part.masks, Tensor)]
        if masks and any(mask.shape[0] > 1 for mask in masks):
            masks = [torch.cat(masks)]
        return cls(torch.cat([part.tokens for part in parts]), masks[0] if masks else None)


class ImageKeysValues(NamedTuple):
    """Keys and values of an IP-Adapter's images in one cross-attention, each [B, heads, tokens, C/heads]."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]  # a pair for all images, or with masks one for each
    masks: ResizedMasks | Tensor | None  # resized: [1 or B, I, N]


class KeysValues(NamedTuple):
    """Keys and values [B, heads, S, C/heads] of one cross-attention, with those of its image branches."""

    k: Tensor
    v: Tensor
    bias: Tensor | None  # logit bias [B, 1, 1, S]
    images: tuple[ImageKeysValues, ...]
    perturbed: int = 0  # as in `Context`
    outputs: list[Tensor] | None = None  # a list, to which the cross-attention appends its output

    def select_rows(self, rows: Tensor) -> "KeysValues":
        """Select rows [B] of all tensors but the masks, which have all B rows already."""
        if rows.shape[0] == self.k.shape[0]:
            return self
        images = tuple(
            image._replace(keys_values=tuple((k[rows], v[rows]) for k, v in image.keys_values))
            for image in self.images
        )
        bias = None if self.bias is None else self.bias[rows]
        return KeysValues(self.k[rows], self.v[rows], bias, images, self.perturbed)


class KnownOutput(NamedTuple):
    """Output [B, N, C] of one cross-attention that was computed before, in place of its keys and values."""

    output: Tensor
    images: tuple[()] = ()
    perturbed: int = 0


class Context(NamedTuple):
    """Context tokens [B, S, context_dim] of an attention, and the image prompt of each IP-Adapter."""

    tokens: Tensor
    bias: Tensor | None = None  # logit bias [B, 1, 1, S]
    images: tuple[ImagePrompt, ...] = ()
    perturbed: int = 0  # number of last rows whose attention is the identity

    def unique_rows(self) -> tuple["Context", Tensor]:
        """Return the distinct rows, and for each of the B rows the index of its equal among them: [B].

        Several images of one prompt share their keys and values, as do several prompts' negative prompts.
        """
        parts = [self.tokens, *(image.tokens for image in self.images)]
        parts += [] if self.bias is None else [self.bias]
        unique, index = list[int](), list[int]()
        for i in range(self.tokens.shape[0]):
            same = (n for n, k in enumerate(unique) if all(torch.equal(part[i], part[k]) for part in parts))
            index.append(next(same, len(unique)))
            unique += [i] if index[-1] == len(unique) else []
        images = tuple(image._replace(tokens=image.tokens[unique]) for image in self.images)
        bias = None if self.bias is None else self.bias[unique]
        context = Context(self.tokens[unique], bias, images, self.perturbed)
        return context, torch.tensor(index, device=self.tokens.device)


def resize_masks(
    context: Context | KeysValues | KnownOutput, height: int, width: int
) -> Context | KeysValues | KnownOutput:
    """Resize the masks of a context, if it has any, to a feature map's size."""
    images: Any = tuple(
        part._replace(masks=part.masks.at(height, width)) if isinstance(part.masks, ResizedMasks) else part
        for part in context.images
    )
    return context._replace(images=images) if images else context

"""Conditions: what the UNet is told beside latents and time, and SDXL's sizes among it.

Shapes: B pictures, S text tokens.
"""

import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.context import ImagePrompt

Size = tuple[int, int]


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside latents and time: a field here is an argument of `UNet.forward`.

    text_tokens [B, S, text_dim]; pooled_text [B, text_dim]; size_ids [B, 6] float32; text_counts None or
    [B, S]; image_prompts one for each attached IP-Adapter; perturbed none, or rows for each TransformerBlock,
    which `cat` leaves out; see `UNet.forward`.
    """

    text_tokens: Tensor
    pooled_text: Tensor
    size_ids: Tensor
    text_counts: Tensor | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    perturbed: tuple[int, ...] = ()

    @classmethod
    def cat(cls, *parts: "Conditioning") -> "Conditioning":
        """Batches one after another."""
        text = TextEmbedding.cat([TextEmbedding(p.text_tokens, p.pooled_text, p.text_counts) for p in parts])
        images = tuple(
            ImagePrompt.cat(*images) for images in zip(*(p.image_prompts for p in parts), strict=True)
        )
        return cls(text.tokens, text.pooled, torch.cat([p.size_ids for p in parts]), text.counts, images)


def size_ids(original: Size, crop: Size, target: Size, prefix: str = "") -> Tensor:
    """SDXL's size conditions (https://arxiv.org/abs/2307.01952, section 2.2) as float32 [1, 6].

    Each is (height, width) or (top, left) in pixels. They stay float32: bfloat16 would turn 1023 into 1024.
    ValueError naming the argument, with `prefix`, that is not two whole numbers.
    """
    sizes = {"original_size": original, "crops_coords_top_left": crop, "target_size": target}
    for name, size in sizes.items():
        try:
            sides = [-1 if isinstance(side, bool) else operator.index(side) for side in size]
        except TypeError:
            sides = []
        if len(sides) != 2 or min(sides) < 0:
            wanted = "two whole numbers of pixels, height first"
            raise ValueError(f"{prefix}{name} must be {wanted}, got {size!r}")
    return torch.tensor([[*original, *crop, *target]], dtype=torch.float32)  # [1, 6]


def is_origin(crop: Size) -> bool:
    """Whether a crop is the default, which says nothing."""
    return isinstance(crop, tuple | list) and tuple(crop) == (0, 0)


def size_ids_of_both(
    picture: Size,
    original: Size | None,
    crop: Size,
    target: Size | None,
    negative_original: Size | None,
    negative_crop: Size,
    negative_target: Size | None,
) -> tuple[Tensor, Tensor]:
    """Positive and negative size ids [1, 6].

    What is not given is the picture's own size, for the negative what the positive has. A negative crop of
    (0, 0) is the default and alone says nothing: the positive crop then serves both.
    """
    original = picture if original is None else original
    target = picture if target is None else target
    ids = size_ids(original, crop, target)
    if negative_original is None and negative_target is None and is_origin(negative_crop):
        return ids, ids
    negative_original = original if negative_original is None else negative_original
    negative_target = target if negative_target is None else negative_target
    return ids, size_ids(negative_original, negative_crop, negative_target, "negative_")

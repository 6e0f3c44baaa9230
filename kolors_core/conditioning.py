"""Conditions: what the UNet is told beside latents and time, and SDXL's sizes among it.

Shapes: B pictures, S text tokens.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kolors_core.adapters.controlnet import Control
from kolors_core.chatglm import TextEmbedding
from kolors_core.context import ImagePrompt
from kolors_core.image import Size


@dataclass(frozen=True)
class Conditioning:
    """What the UNet is told beside latents and time: a field here is an argument of `UNet.forward`.

    text_tokens [B, S, text_dim]; pooled_text [B, text_dim]; size_ids [B, 6] float32; text_counts None or
    [B, S]; image_prompts one for each attached IP-Adapter; perturbed none, or rows for each TransformerBlock,
    which `cat` leaves out; see `UNet.forward`. controls: what each ControlNet sees, whose residuals are told.
    extra [B, more, H/8, W/8]: what a UNet of more input channels reads behind the scaled latents, as
    inpainting's its mask. added [B, time_dim]: see `UNet.forward`; a ControlNet is not told.
    """

    text_tokens: Tensor
    pooled_text: Tensor
    size_ids: Tensor
    text_counts: Tensor | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    perturbed: tuple[int, ...] = ()
    controls: tuple[Control, ...] = ()
    extra: Tensor | None = None
    added: Tensor | None = None

    @classmethod
    def cat(cls, *parts: "Conditioning") -> "Conditioning":
        """Batches one after another; ValueError if only some have `extra`, or `added`."""
        text = TextEmbedding.cat([TextEmbedding(p.text_tokens, p.pooled_text, p.text_counts) for p in parts])
        images = tuple(
            ImagePrompt.cat(*images) for images in zip(*(p.image_prompts for p in parts), strict=True)
        )
        controls = tuple(Control.cat(*them) for them in zip(*(p.controls for p in parts), strict=True))
        ids = torch.cat([p.size_ids for p in parts])
        extra, added = (_all_or_none(name, parts) for name in ("extra", "added"))
        return cls(text.tokens, text.pooled, ids, text.counts, images, (), controls, extra, added)

    def with_blank_extra(self, channels: int, latents: Sequence[int]) -> "Conditioning":
        """The same, with `extra` of zeros if a UNet of so many channels reads more than such latents."""
        more = channels - latents[1]
        zeros = self.text_tokens.new_zeros(len(self.text_tokens), more, *latents[2:]) if more else None
        return replace(self, extra=zeros)


def _all_or_none(name: str, parts: Sequence[Conditioning]) -> Tensor | None:
    have = [value for part in parts if (value := getattr(part, name)) is not None]
    if len(have) not in (0, len(parts)):
        raise ValueError(f"{len(have)} of {len(parts)} conditions have `{name}`, wanted all or none")
    return torch.cat(have) if have else None


def beside(latents: Tensor, extra: Tensor | None) -> Tensor:
    """What the UNet's first layer reads: latents [b, 4, H/8, W/8]; with `extra`, repeated to its B rows,
    and that behind them.
    """
    if extra is None:
        return latents
    copies = len(extra) // len(latents)
    return torch.cat([latents.repeat(copies, 1, 1, 1), extra.to(latents)], dim=1)


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

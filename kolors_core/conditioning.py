"""Conditioning: all inputs of the UNet except latents and timestep, SDXL's size ids among them.

Shapes: B rows, b latents, each shared by B / b rows under guidance, S text tokens.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.context import ImagePrompt
from kolors_core.image import Size
from kolors_core.module import WrapStep
from kolors_core.schedule import Schedule
from kolors_core.tokenizer import TokenBatch
from kolors_core.validation import MAX_COUNT, short_repr

# (input of conv_in [b, ...], timestep, sigma) -> a tensor for each skip and one for the mid block, or none
StepResiduals = Callable[[Tensor, float, float], list[Tensor]]


class Residuals(Protocol):
    """Networks that add to the UNet's skips and mid block, such as ControlNets (adapters/controlnet.py)."""

    def cat(self, *others: Any) -> "Residuals":
        """Concatenate the residuals of these batches."""
        ...

    def prepare(
        self, schedule: Schedule, conditioning: "Conditioning", repeats: int, *, precompute: bool,
        wrap_step: WrapStep | None
    ) -> StepResiduals:  # fmt: skip
        """Return the residuals as a function of a run's steps; called once a run, with repeats = B / b."""
        ...


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the UNet except latents and timestep: a field here is an argument of `UNet.forward`."""

    text_tokens: Tensor  # [B, S, text_dim]
    pooled_text: Tensor  # [B, text_dim]
    size_ids: Tensor  # float32 [B, 6]
    text_counts: Tensor | None = None  # [B, S]
    image_prompts: tuple[ImagePrompt, ...] = ()  # one for each attached IP-Adapter
    perturbed: tuple[int, ...] = ()  # none, or rows for each TransformerBlock; `cat` leaves them out
    residuals: Residuals | None = None  # networks whose outputs are the argument of that name
    extra: Tensor | None = None  # [B, channels, H/8, W/8], after the scaled latents, such as a mask
    added: Tensor | None = None  # [B, time_dim]; not for ControlNets

    @classmethod
    def cat(cls, *parts: "Conditioning") -> "Conditioning":
        """Concatenate batches; ValueError if only some have `residuals`, `extra` or `added`."""
        text = TextEmbedding.cat([TextEmbedding(p.text_tokens, p.pooled_text, p.text_counts) for p in parts])
        images = tuple(ImagePrompt.cat(*each) for each in zip(*(p.image_prompts for p in parts), strict=True))
        ids = torch.cat([p.size_ids for p in parts])
        nets, *tensors = (_all_or_none(name, parts) for name in ("residuals", "extra", "added"))
        residuals = nets[0].cat(*nets[1:]) if nets else None
        extra, added = (torch.cat(batches) if batches else None for batches in tensors)
        return cls(text.tokens, text.pooled, ids, text.counts, images, (), residuals, extra, added)

    def with_zero_extra_channels(self, channels: int, latents: Sequence[int]) -> "Conditioning":
        """Set `extra` to zeros if a UNet of `channels` input channels needs more than latents of a shape."""
        shape = len(self.text_tokens), channels - latents[1], *latents[2:]
        return replace(self, extra=self.text_tokens.new_zeros(shape) if shape[1] else None)


def encode(encoder: Any, batch: TokenBatch) -> TextEmbedding:
    """Run a text encoder, of one's own too; TypeError or ValueError for what is no embedding of these."""
    found, name = encoder(batch), type(encoder).__name__
    if not isinstance(found, TextEmbedding):
        raise TypeError(f"a {name} must return a TextEmbedding, got {type(found).__name__}")
    tokens, pooled, counts = found.tokens, found.pooled, found.counts
    rows, width = len(batch.ids), tokens.shape[-1]
    if tokens.ndim != 3 or len(tokens) != rows:
        raise ValueError(f"a {name} must return tokens [{rows}, S, C], got {list(tokens.shape)}")
    for what, tensor, expected in (("pooled", pooled, [rows, width]), ("counts", counts, tokens.shape[:2])):
        if tensor is not None and list(tensor.shape) != list(expected):
            raise ValueError(f"a {name} must return {what} {list(expected)}, got {list(tensor.shape)}")
    return found


def _all_or_none(name: str, parts: Sequence[Conditioning]) -> list[Any]:
    values = [value for part in parts if (value := getattr(part, name)) is not None]
    if len(values) not in (0, len(parts)):
        raise ValueError(f"{len(values)} of {len(parts)} conditions have `{name}`, expected all or none")
    return values


def concat_extra_channels(latents: Tensor, extra: Tensor | None) -> Tensor:
    """Append `extra` [B, channels, H/8, W/8], if any, to latents [b, 4, H/8, W/8] repeated to B rows."""
    if extra is None:
        return latents
    return torch.cat([latents.repeat(extra.shape[0] // latents.shape[0], 1, 1, 1), extra.to(latents)], dim=1)


def size_ids(original: Size, crop: Size, target: Size, prefix: str = "") -> Tensor:
    """Return SDXL's size conditions (https://arxiv.org/abs/2307.01952, section 2.2) as float32 [1, 6].

    Each is (height, width) or (top, left) in pixels. They stay float32: bfloat16 would turn 1023 into 1024.
    Raises ValueError naming the argument, with `prefix`, that is not two integers.
    """
    sizes = {"original_size": original, "crops_coords_top_left": crop, "target_size": target}
    for name, size in sizes.items():
        try:
            sides = [-1 if isinstance(side, bool) else operator.index(side) for side in size]
        except TypeError:
            sides = []
        if len(sides) != 2 or min(sides) < 0 or max(sides) > MAX_COUNT:
            expected = "two whole numbers of pixels, height first"
            raise ValueError(f"{prefix}{name} must be {expected}, got {short_repr(size)}")
    return torch.tensor([[*original, *crop, *target]], dtype=torch.float32)  # [1, 6]


def is_default_crop(crop: Size) -> bool:
    """Return whether a crop is the default, (0, 0)."""
    return isinstance(crop, tuple | list) and tuple(crop) == (0, 0)


def positive_and_negative_size_ids(
    image: Size, original: Size | None, crop: Size, target: Size | None, negative_original: Size | None,
    negative_crop: Size, negative_target: Size | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return positive and negative size ids, each [1, 6].

    Sizes that are None default to the image's own size; negative ones to the positive ones. If all negative
    arguments have their defaults, the crop (0, 0) among them, the negative ids are the positive ones.
    """
    original, target = (image if size is None else size for size in (original, target))
    ids = size_ids(original, crop, target)
    if negative_original is None and negative_target is None and is_default_crop(negative_crop):
        return ids, ids
    negative_original = original if negative_original is None else negative_original
    negative_target = target if negative_target is None else negative_target
    return ids, size_ids(negative_original, negative_crop, negative_target, "negative_")

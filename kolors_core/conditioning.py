"""Conditioning: all inputs of the UNet beside latents and time, SDXL's size ids among them.

Shapes: B images, b latents, of which each serves B / b rows under guidance, S text tokens.
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

# (what conv_in reads [b, ...], timestep, sigma) -> a tensor for each skip and one for the middle, or none
StepResiduals = Callable[[Tensor, float, float], list[Tensor]]


class Residuals(Protocol):
    """Networks that add to the UNet's skips and middle, such as ControlNets (adapters/controlnet.py)."""

    def cat(self, *others: Any) -> "Residuals":
        """Return the residuals of these batches, one after another."""
        ...

    def prepare(
        self,
        schedule: Schedule,
        conditioning: "Conditioning",
        repeats: int,
        *,
        precompute: bool,
        wrap_step: WrapStep | None,
    ) -> StepResiduals:
        """Return the residuals as a function of a run's steps; called once a run.

        conditioning: of B images. repeats: B / b. precompute, wrap_step: see `guidance.guided`.
        """
        ...


@dataclass(frozen=True)
class Conditioning:
    """All inputs of the UNet beside latents and time: a field here is an argument of `UNet.forward`.

    text_tokens [B, S, text_dim]; pooled_text [B, text_dim]; size_ids [B, 6] float32; text_counts None or
    [B, S]; image_prompts one for each attached IP-Adapter; perturbed none, or rows for each TransformerBlock,
    which `cat` leaves out; see `UNet.forward`. residuals: networks such as ControlNets, whose outputs are
    `UNet.forward`'s argument of that name. extra [B, more, H/8, W/8]: what a UNet of more input channels
    reads behind the scaled latents, such as the mask for inpainting. added [B, time_dim]: see `UNet.forward`;
    ControlNets do not get it.
    """

    text_tokens: Tensor
    pooled_text: Tensor
    size_ids: Tensor
    text_counts: Tensor | None = None
    image_prompts: tuple[ImagePrompt, ...] = ()
    perturbed: tuple[int, ...] = ()
    residuals: Residuals | None = None
    extra: Tensor | None = None
    added: Tensor | None = None

    @classmethod
    def cat(cls, *parts: "Conditioning") -> "Conditioning":
        """Concatenate batches; ValueError if only some have `residuals`, `extra` or `added`."""
        text = TextEmbedding.cat([TextEmbedding(p.text_tokens, p.pooled_text, p.text_counts) for p in parts])
        images = tuple(
            ImagePrompt.cat(*images) for images in zip(*(p.image_prompts for p in parts), strict=True)
        )
        ids = torch.cat([p.size_ids for p in parts])
        nets, *channels = (_all_or_none(name, parts) for name in ("residuals", "extra", "added"))
        residuals = nets[0].cat(*nets[1:]) if nets else None
        extra, added = (torch.cat(have) if have else None for have in channels)
        return cls(text.tokens, text.pooled, ids, text.counts, images, (), residuals, extra, added)

    def with_zero_extra_channels(self, channels: int, latents: Sequence[int]) -> "Conditioning":
        """The same, with `extra` of zeros if a UNet of so many channels reads more than such latents."""
        more = channels - latents[1]
        zeros = self.text_tokens.new_zeros(self.text_tokens.shape[0], more, *latents[2:]) if more else None
        return replace(self, extra=zeros)


def _all_or_none(name: str, parts: Sequence[Conditioning]) -> list[Any]:
    have = [value for part in parts if (value := getattr(part, name)) is not None]
    if len(have) not in (0, len(parts)):
        raise ValueError(f"{len(have)} of {len(parts)} conditions have `{name}`, expected all or none")
    return have


def concat_extra_channels(latents: Tensor, extra: Tensor | None) -> Tensor:
    """What the UNet's first layer reads: latents [b, 4, H/8, W/8]; with `extra`, repeated to its B rows,
    and that behind them.
    """
    if extra is None:
        return latents
    repeats = extra.shape[0] // latents.shape[0]
    return torch.cat([latents.repeat(repeats, 1, 1, 1), extra.to(latents)], dim=1)


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


def is_default_crop(crop: Size) -> bool:
    """Whether a crop is the default, which says nothing."""
    return isinstance(crop, tuple | list) and tuple(crop) == (0, 0)


def positive_and_negative_size_ids(
    picture: Size,
    original: Size | None,
    crop: Size,
    target: Size | None,
    negative_original: Size | None,
    negative_crop: Size,
    negative_target: Size | None,
) -> tuple[Tensor, Tensor]:
    """Positive and negative size ids [1, 6].

    What is not given is the image's own size, for the negative what the positive has. A negative crop of
    (0, 0) is the default and alone says nothing: the positive crop then serves both.
    """
    original = picture if original is None else original
    target = picture if target is None else target
    ids = size_ids(original, crop, target)
    if negative_original is None and negative_target is None and is_default_crop(negative_crop):
        return ids, ids
    negative_original = original if negative_original is None else negative_original
    negative_target = target if negative_target is None else negative_target
    return ids, size_ids(negative_original, negative_crop, negative_target, "negative_")

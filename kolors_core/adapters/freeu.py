"""FreeU: the up path scales up the decoder's features and attenuates low frequencies of the skip connections.

Source: https://arxiv.org/abs/2309.11497, equations 4 and 5, as in diffusers' `apply_freeu`, which has one
factor for a whole map. Shapes: B batch, C channels, H height, W width (in latents).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from kolors_core.denoiser import require_unet
from kolors_core.devices import unwrap_compiled
from kolors_core.module import all_or_nothing
from kolors_core.unet import UNet, UpBlock
from kolors_core.validation import check_float

NAMES = ("s1", "s2", "b1", "b2")


@dataclass(frozen=True)
class FreeU:
    """Join of one level's features with a skip connection. backbone, skip: the paper's b and s."""

    backbone: float
    skip: float

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """Concatenate x [B, C, H, W], half scaled, and the filtered skip [B, c, H, W]: [B, C + c, H, W]."""
        half = x.shape[1] // 2
        return torch.cat([x[:, :half] * self.backbone, x[:, half:], self.filter_skip(skip)], dim=1)

    def filter_skip(self, skip: Tensor) -> Tensor:
        """Multiply the skip's lowest frequencies, 0 and -1 along each side, by `self.skip`, in float32."""
        spectrum = torch.fft.fft2(skip.float())  # [B, c, H, W]
        low = torch.ones_like(spectrum.real[0, 0])  # [H, W]
        for row, column in product((0, -1), repeat=2):  # assigned, a number is copied from the host
            low[row, column].fill_(self.skip)
        return torch.fft.ifft2(spectrum * low).real.to(skip.dtype)


class FreeUMethods:
    """FreeU methods for a pipeline, named as in the reference; they change the UNet for all its pipelines."""

    unet: UNet

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Enable FreeU with s1 and b1 in the up path's first, innermost level, and s2 and b2 in the second.

        ValueError naming a value that is no number or below 0, and for a UNet of one level.
        """
        require_unet(self.unet, "FreeU")
        if len(self.unet.up) < 2:
            raise ValueError("FreeU changes two levels, and this UNet has one")
        values = zip(NAMES, (s1, s2, b1, b2), strict=True)
        s1, s2, b1, b2 = (check_float(name, value, 0) for name, value in values)
        self._set_freeu(FreeU(b1, s1), FreeU(b2, s2))

    def disable_freeu(self) -> None:
        """Restore the UNet to what it was before."""
        if self._has_unet:
            self._set_freeu(None, None)

    def _set_freeu(self, *joins: FreeU | None) -> None:
        with all_or_nothing(self.unet.up):
            for level, join in zip(cast("Sequence[UpBlock]", self.unet.up), joins, strict=False):
                level.freeu = join

    @property
    def _has_unet(self) -> bool:
        return isinstance(unwrap_compiled(self.unet), UNet)

    @property
    def freeu(self) -> dict[str, float] | None:
        """The values of s1, s2, b1 and b2; None if FreeU is not enabled."""
        levels: Any = self.unet.up[:2] if self._has_unet else ()
        joins = [level.freeu for level in levels if isinstance(level.freeu, FreeU)]
        values = [join.skip for join in joins] + [join.backbone for join in joins]
        return dict(zip(NAMES, values, strict=True)) if len(joins) == 2 else None

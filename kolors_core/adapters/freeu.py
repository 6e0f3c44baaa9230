"""FreeU: the UNet's way up hears more of what comes from below and less of the low frequencies of its skips.

Source: https://arxiv.org/abs/2309.11497, equations 4 and 5, as in diffusers' `apply_freeu`, which has one
factor for a whole map. Shapes: B batch, C channels, H height, W width (in latents).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from kolors_core.unet import UNet, UpBlock
from kolors_core.validation import check_float

NAMES = ("s1", "s2", "b1", "b2")


@dataclass(frozen=True)
class FreeU:
    """How one level joins what comes from below with a skip. backbone, skip: the paper's b and s."""

    backbone: float
    skip: float

    def __call__(self, x: Tensor, skip: Tensor) -> Tensor:
        """x: [B, C, H, W]; skip: [B, c, H, W]. Returns [B, C + c, H, W]."""
        half = x.shape[1] // 2
        return torch.cat([x[:, :half] * self.backbone, x[:, half:], self.dimmed(skip)], dim=1)

    def dimmed(self, skip: Tensor) -> Tensor:
        """The skip with its lowest frequencies, 0 and -1 along each side, times `skip`; in float32."""
        spectrum = torch.fft.fft2(skip.float())  # [B, c, H, W]
        low = torch.ones_like(spectrum.real[0, 0])  # [H, W]
        low[[[0], [-1]], [0, -1]] = self.skip
        return torch.fft.ifft2(spectrum * low).real.to(skip.dtype)


class FreeUMethods:
    """The reference's two methods, for a pipeline. Every pipeline that has this UNet sees the change."""

    unet: UNet

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Let the innermost level of the way up work with s1 and b1, the next one with s2 and b2.

        ValueError naming what is no number or below 0, and for a UNet of one level.
        """
        if len(self.unet.up) < 2:
            raise ValueError("FreeU changes two levels, and this UNet has one")
        for name, value in zip(NAMES, (s1, s2, b1, b2), strict=True):
            check_float(name, value, 0)
        self._join(FreeU(b1, s1), FreeU(b2, s2))

    def disable_freeu(self) -> None:
        """Leave the UNet as it was before."""
        self._join(None, None)

    def _join(self, *ways: FreeU | None) -> None:
        for level, way in zip(cast("Sequence[UpBlock]", self.unet.up), ways, strict=False):
            level.freeu = way

    @property
    def freeu(self) -> dict[str, float] | None:
        """s1, s2, b1 and b2; None if it is not enabled."""
        ways = [level.freeu for level in self.unet.up[:2] if isinstance(level.freeu, FreeU)]
        if len(ways) < 2:
            return None
        return dict(zip(NAMES, [way.skip for way in ways] + [way.backbone for way in ways], strict=True))

"""Previews of latents: a linear map from their channels to colors, fitted to the VAE at hand.

Shapes: B images, H and W of the latents, C their channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.image import to_images
from kolors_core.inspection.attention_report import data_uri
from kolors_core.pipelines.image_to_image import KolorsImg2ImgPipeline
from kolors_core.pipelines.stages import Task

PATCHES, SIDE = 4, 32  # patches a side of an image, and their pixels
LARGEST_STD = 1.5  # of latents without noise


class Preview:
    """Map [C + 1, 3] of one VAE's latents, and 1, to colors: least squares over patches of full colors.

    On the embedded VAE as near as any linear map fitted to images that were drawn.
    """

    def __init__(self, pipe: Task, images: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        colors = torch.randn(images, 3, PATCHES, PATCHES, generator=generator).sign()
        pixels = F.interpolate(colors, scale_factor=SIDE)  # [B, 3, H, W], in [-1, 1]
        with torch.no_grad():
            latents, _ = KolorsImg2ImgPipeline.from_pipe(pipe).encode_mean_std(pixels)
            pipe._enter_stage()  # under offload the VAE leaves the device
        latents = latents.float().cpu()
        wanted = F.interpolate(pixels, latents.shape[-2:], mode="area")
        self.colors = torch.linalg.lstsq(self._rows(latents), wanted.movedim(1, -1).reshape(-1, 3)).solution

    @staticmethod
    def _rows(latents: Tensor) -> Tensor:
        rows = latents.movedim(1, -1).flatten(0, 2)  # [B H W, C]
        return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)

    def image(self, latents: Tensor) -> Tensor:
        """Color latents [B, C, H, W] of any noise level: [B, 3, H, W] in [-1, 1]."""
        x = latents.detach().float().cpu()
        x = x / (x.std(dim=(1, 2, 3), keepdim=True) / LARGEST_STD).clamp(min=1.0)  # of what is mostly noise
        count, _, height, width = x.shape
        return (self._rows(x) @ self.colors).view(count, height, width, 3).movedim(-1, 1).clamp(-1, 1)

    def address(self, latents: Tensor) -> str:
        """Return a PNG of the first of some latents, a pixel for each position, as an address for a page."""
        return data_uri(to_images(self.image(latents[:1]), "pil")[0])

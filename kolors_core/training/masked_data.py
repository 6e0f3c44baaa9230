"""Training data for inpainting: each picture of a batch with a random mask, which the UNet reads beside it.

Source: of the masks of https://arxiv.org/abs/2109.07161, section 2.3, the boxes. Now and then the whole
picture is masked, so that the model goes on drawing from the prompt alone.
Shapes: B pictures of the whole batch, b of one rank's part.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.training.data import load_pixels, mix
from kolors_core.training.loss import Batch, Data

WHOLE = 0.2  # how often everything is masked
SMALLEST, LARGEST = 0.2, 0.8  # sides of a box, in parts of the picture's


def random_masks(count: int, height: int, width: int, draw: torch.Generator) -> Tensor:
    """Masks [count, 1, H, W] of 1 (made anew) and 0: one to three boxes anywhere, or all of it."""
    masks = torch.zeros(count, 1, height, width)
    for mask in masks:
        if float(torch.rand((), generator=draw)) < WHOLE:
            mask.fill_(1)
            continue
        for _ in range(int(torch.randint(1, 4, (), generator=draw))):
            h, w, y, x = torch.rand(4, generator=draw).tolist()
            h, w = (SMALLEST + side * (LARGEST - SMALLEST) for side in (h, w))
            top, left = round(y * (1 - h) * height), round(x * (1 - w) * width)
            mask[:, top : top + round(h * height), left : left + round(w * width)] = 1
    return masks


class MaskedData(Data):
    """`Data` whose batches have inpainting's `extra` [b, 5, H/8, W/8]: the mask, and latents of the picture
    with the mask's places grey, encoded anew in every step.

    Masks are drawn on the CPU from (seed, step) for the whole batch, as noise is. The VAE works where it is.
    """

    def at(self, step: int, part: slice, device: torch.device) -> Batch:
        """As `Data.at`."""
        batch = super().at(step, part, device)
        size, samples = self.batches.at(step)
        draw = torch.Generator().manual_seed(mix(self.config.seed, step, 2))
        masks = random_masks(len(samples), *size, draw)
        noise = torch.randn(len(samples), *batch.latents.shape[1:], generator=draw)[part]
        masks = masks[part]
        pixels = torch.stack([load_pixels(self.examples[s.example], size)[0] for s in samples[part]])
        with torch.no_grad():
            found = self.vae.encode((pixels * (1 - masks)).to(self.vae.post_quant_conv.weight))
        seen = found.mean.float() + found.std.float() * noise.to(found.std.device)  # [b, 4, H/8, W/8]
        small = F.interpolate(masks, size=seen.shape[-2:])
        return replace(batch, extra=torch.cat([small.to(device), seen.to(device)], dim=1))

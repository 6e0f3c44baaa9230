"""Self-conditioning: the denoiser also sees its own last estimate of the image.

Source: https://arxiv.org/abs/2208.04202, section 3.2. In training half of the images come with an estimate,
for which the denoiser runs once more without gradients; in drawing it is the step's before.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.ablate.change import Change, call_guided
from kolors_core.conditioning import Conditioning
from kolors_core.config import UNetConfig
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss
from kolors_core.unet import UNet


def make(config: UNetConfig) -> UNet:
    """Make a UNet of four more input channels."""
    return UNet(replace(config, in_channels=2 * config.in_channels))


class SelfConditionedLoss(DiffusionLoss):
    """Loss whose first half of a batch sees the denoiser's own estimate, and the other half zeros."""

    def each(self, batch: Batch) -> Tensor:
        """Compute the loss of each image: [b]."""
        extra, half = torch.zeros_like(batch.latents), len(batch.latents) // 2
        with torch.no_grad():
            extra[:half] = self.estimate(batch, extra)[:half]
        return super().each(replace(batch, extra=extra))

    def estimate(self, batch: Batch, extra: Tensor) -> Tensor:
        """Compute the image that the denoiser sees without an estimate: [b, 4, h, w]."""
        sigma = self.sigmas[batch.timesteps][:, None, None, None]
        noise = self.unet(
            torch.cat([(batch.latents + sigma * batch.noise) / (sigma**2 + 1) ** 0.5, extra], dim=1),
            batch.timesteps.float(), batch.text.tokens, batch.text.pooled, batch.size_ids, batch.text.counts,
        )  # fmt: skip
        return batch.latents + sigma * (batch.noise - noise)


def conditioned_on_itself(
    net: nn.Module, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
    scale: float = 1.0,
) -> Denoiser:  # fmt: skip
    """Return `denoise` of one run, which passes each step's estimate to the next; the first makes its own."""
    last: Tensor | None = None

    def step(x: Tensor, sigma: float, extra: Tensor) -> Tensor:
        parts = (None if part is None else replace(part, extra=extra) for part in (positive, negative))
        return call_guided(net, schedule, *parts, scale)(x, sigma)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal last
        last = step(x, sigma, step(x, sigma, torch.zeros_like(x)) if last is None else last)
        return last

    return denoise


CHANGE = Change(denoiser=make, loss=SelfConditionedLoss, guided=conditioned_on_itself)

"""Self-conditioning: the denoiser also sees its own last estimate of the image.

Source: https://arxiv.org/abs/2208.04202, section 3.2. In training half of the images come with an estimate,
for which the denoiser runs once more without gradients; in drawing it is the step's before.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.ablate.change import PLAIN, Change
from kolors_core.conditioning import Conditioning
from kolors_core.config import UNetConfig
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.targets import target_of
from kolors_core.training.data import Batch
from kolors_core.training.loss import DiffusionLoss, Noised
from kolors_core.unet import UNet


def make(config: UNetConfig) -> UNet:
    """Make a UNet of four more input channels."""
    return UNet(replace(config, in_channels=2 * config.in_channels))


class SelfConditionedLoss(DiffusionLoss):
    """Loss whose first half of a batch sees the denoiser's own estimate, and the other half zeros."""

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        """Compute the output [b, 4, h, w] with an estimate of the image as further channels."""
        z, extra, half = noised.latents, torch.zeros_like(noised.latents), len(noised.latents) // 2
        target, sigma = target_of(self.config.prediction_type), noised.sigma[:, None, None, None]
        with torch.no_grad():
            output = super().predict(replace(noised, latents=torch.cat([z, extra], dim=1)), batch)
            extra[:half] = target.x0(z * target.scale(sigma), sigma, output)[:half]
        return super().predict(replace(noised, latents=torch.cat([z, extra], dim=1)), batch)


def conditioned_on_itself(
    net: nn.Module, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
    scale: float = 1.0,
) -> Denoiser:  # fmt: skip
    """Return `denoise` of one run, which passes each step's estimate to the next; the first makes its own."""
    last: Tensor | None = None

    def step(x: Tensor, sigma: float, extra: Tensor) -> Tensor:
        parts = (None if part is None else replace(part, extra=extra) for part in (positive, negative))
        return PLAIN(net, schedule, *parts, scale)(x, sigma)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal last
        last = step(x, sigma, step(x, sigma, torch.zeros_like(x)) if last is None else last)
        return last

    return denoise


CHANGE = Change(denoiser=make, loss=SelfConditionedLoss, guided=conditioned_on_itself)

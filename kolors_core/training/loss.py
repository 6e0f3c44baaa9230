"""Training loss: predict the noise in the latents.

DDPM's simple loss (https://arxiv.org/abs/2006.11239, eq. 14): predict the noise of sqrt(a) latents +
sqrt(1 - a) noise, at a timestep drawn uniformly from the 1,100 of the schedule.
Shapes: b images of one rank, T training timesteps.
"""

from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM
from kolors_core.conditioning import concat_extra_channels
from kolors_core.tokenizer import TokenBatch
from kolors_core.training.data import Batch
from kolors_core.training.trainer import TrainingConfig
from kolors_core.unet import UNet


class DiffusionLoss(nn.Module):
    """Diffusion loss as one module, which DDP and FSDP need. text_encoder: None unless it is trained too.

    controlnet: a `ControlNet` to train, or another module that takes its inputs and returns residuals for
    the UNet, which is then best frozen (`requires_grad_(False)`).
    """

    def __init__(
        self, unet: UNet, text_encoder: ChatGLM | None, sigmas: Tensor, config: TrainingConfig,
        controlnet: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.unet, self.text_encoder, self.controlnet, self.config = unet, text_encoder, controlnet, config
        self.sigmas = sigmas  # [T]; not a buffer: it is not part of the model

    def state_key(self) -> tuple[float, ...]:
        """Return the sigmas, see kolors_core/module.py."""
        return tuple(self.sigmas.tolist())

    def forward(self, batch: Batch) -> Tensor:
        """Compute the mean loss of the rank's images."""
        return self.each(batch).mean()

    def each(self, batch: Batch) -> Tensor:
        """Compute the loss of each of the rank's images: [b]."""
        text = batch.text
        if isinstance(text, TokenBatch):
            assert self.text_encoder is not None
            text = self.text_encoder(text)
        sigma = self.sigmas.to(batch.latents.device)[batch.timesteps][:, None, None, None]  # [b, 1, 1, 1]
        noisy = (batch.latents + sigma * batch.noise) / (sigma**2 + 1).sqrt()
        times, noisy = batch.timesteps.float(), concat_extra_channels(noisy, batch.extra)
        inputs = noisy, times, text.tokens, text.pooled, batch.size_ids
        if (self.controlnet is None) != (batch.control is None):
            raise ValueError("a ControlNet and control images need each other: one of them is missing")
        residuals = () if self.controlnet is None else self.controlnet(*inputs, batch.control, text.counts)
        predicted = self.unet(*inputs, text.counts, residuals=residuals)
        loss = (predicted.float() - batch.noise).square().mean(dim=(1, 2, 3))  # [b]
        if self.config.min_snr_gamma is not None:
            snr = sigma.flatten() ** -2
            loss = loss * (snr.clamp(max=self.config.min_snr_gamma) / snr)
        return loss

"""Training loss: predict the noise in the latents, or another of kolors_core/targets.py.

DDPM's simple loss (https://arxiv.org/abs/2006.11239, eq. 14): predict the target of sqrt(a) latents +
sqrt(1 - a) noise, at a timestep that is drawn from those of the schedule (1,100 for Kolors; data.py).
Shapes: b images of one rank, T training timesteps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import concat_extra_channels, encode
from kolors_core.denoiser import check_accepts, check_widths, fault_of_forward
from kolors_core.module import reads_counts
from kolors_core.targets import target_of
from kolors_core.training.data import Batch, repeat_padding, timestep_density
from kolors_core.training.step import Means
from kolors_core.training.trainer import BatchSource, TrainingConfig
from kolors_core.unet import UNet
from kolors_core.validation import check_int, short_repr

BANDS = 4  # of timesteps, whose mean losses are logged
LARGEST_SIGMA = 1e12  # in the place of infinity, the last sigma at zero terminal SNR: the same to float32


@dataclass(frozen=True)
class Noised:
    """Inputs of a model at the timesteps of a batch, and the output that it is to predict."""

    latents: Tensor  # [b, 4, H/8, W/8], scaled as the model's input; with `Batch.extra`, more channels
    times: Tensor  # [b]
    sigma: Tensor  # [b]
    wanted: Tensor  # [b, 4, H/8, W/8]


class DiffusionLoss(nn.Module):
    """Diffusion loss as one module, which DDP and FSDP need. text_encoder: None unless it is trained too.

    `each` is `noised`, `predict`, `error` and `weigh` one after another: a subclass overrides one of them, or
    `text` and `added`, which `predict` gives to the UNet. `means` gets the loss of each of `BANDS` bands of
    timesteps, which a trainer logs.

    sigmas: of each training timestep [T]; infinity means pure noise. controlnet: a `ControlNet` to train, or
    another module that takes its inputs and returns residuals for the UNet, which is then best frozen
    (`requires_grad_(False)`). TypeError or ValueError, with what was expected, for what cannot be trained.
    """

    def __init__(
        self, unet: UNet, text_encoder: ChatGLM | None, sigmas: Tensor, config: TrainingConfig,
        controlnet: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if fault := fault_of_forward(unet):
            raise TypeError(f"a {type(unet).__name__} is no denoiser: {fault}")
        if not isinstance(sigmas, Tensor):
            raise TypeError(f"sigmas must be a tensor, one a training timestep, got {short_repr(sigmas)}")
        self.unet, self.text_encoder, self.controlnet, self.config = unet, text_encoder, controlnet, config
        self.sigmas = sigmas  # [T]; not a buffer: it is not part of the model
        self.means = Means()
        own = (m.parameters(recurse=False) for m in unet.modules() if not getattr(m, "is_adapter", False))
        if any(parameter.requires_grad for parameters in own for parameter in parameters):
            learner: Any = unet  # what it learns: a pipeline compares it with its scheduler
            learner.prediction_type = config.prediction_type

    def state_key(self) -> tuple[float, ...]:
        """Return the sigmas, see kolors_core/module.py."""
        return tuple(self.sigmas.tolist())

    def forward(self, batch: Batch) -> Tensor:
        """Compute the mean loss of the rank's images."""
        each, total = self.each(batch), len(self.sigmas)
        band = batch.timesteps * BANDS // total
        for i in range(BANDS):
            first, last = (-(-total * at // BANDS) for at in (i, i + 1))
            self.means.add(f"loss_t{first}-{last - 1}", each, band == i)
        return each.mean()

    def each(self, batch: Batch) -> Tensor:
        """Compute the loss of each of the rank's images: [b]."""
        noised = self.noised(batch)
        return self.weigh(self.error(self.predict(noised, batch), noised, batch), noised, batch)

    def noised(self, batch: Batch) -> Noised:
        """Add the batch's noise to its latents as the timesteps say."""
        target = target_of(self.config.prediction_type)
        sigmas = self.sigmas.to(batch.latents.device, batch.noise.dtype)  # noise is never in half precision
        try:
            sigma = sigmas[batch.timesteps].clamp(max=LARGEST_SIGMA)  # [b]
        except IndexError:
            found = f"the batch has timestep {int(batch.timesteps.max())}: give its dataset `timesteps`"
            raise ValueError(f"there are sigmas of {len(self.sigmas)} timesteps, and {found}") from None
        times, level = target.timestep(batch.timesteps, sigma, len(self.sigmas)), sigma[:, None, None, None]
        noisy = target.model_input(batch.latents + level * batch.noise, level)
        wanted = target.output(batch.latents, batch.noise, level)
        return Noised(concat_extra_channels(noisy, batch.extra), times.float(), sigma, wanted)

    def predict(self, noised: Noised, batch: Batch) -> Tensor:
        """Compute the model's output [b, 4, H/8, W/8] for the batch's captions and control images."""
        text = self.text(batch)
        inputs = noised.latents, noised.times, text.tokens, text.pooled, batch.size_ids
        optional = self.optional_inputs(self.unet, noised.latents, text, batch)
        if (self.controlnet is None) != (batch.control is None):
            raise ValueError("a ControlNet and control images need each other: one of them is missing")
        if self.controlnet is None:
            return self.unet(*inputs, text.counts, **optional)
        residuals = self.controlnet(*inputs, batch.control, text.counts)
        return self.unet(*inputs, text.counts, residuals=residuals, **optional)

    def text(self, batch: Batch) -> TextEmbedding:
        """Return the captions' embedding, or encode their tokens; one that reads no counts gets all pads."""
        tokens, encoder = batch.text, self.text_encoder
        if isinstance(tokens, TextEmbedding):
            if encoder is not None and any(parameter.requires_grad for parameter in encoder.parameters()):
                how = "make the data without a frozen text encoder"
                raise ValueError(f"a {type(encoder).__name__} learns nothing of encoded captions: {how}")
            return tokens
        if encoder is None:
            raise ValueError("captions are tokens: expected a text encoder, of the loss or of the data")
        return encode(encoder, tokens if reads_counts(encoder) else repeat_padding(tokens))

    def added(self, batch: Batch) -> Tensor | None:
        """Return what is added to the UNet's time, None or [b, time_dim]: "added" of `Batch.more`."""
        return batch.more.get("added")

    def optional_inputs(
        self, unet: nn.Module, latents: Tensor, text: TextEmbedding, batch: Batch
    ) -> dict[str, Tensor]:
        """Return what is added to the time, if anything is; an error unless a UNet reads these inputs."""
        optional = {} if (added := self.added(batch)) is None else {"added": added}
        check_widths(unet, latents, text.tokens, added)
        if optional:
            check_accepts(unet, optional)
        return optional

    def error(self, predicted: Tensor, noised: Noised, batch: Batch) -> Tensor:
        """Compute the mean squared error of each image: [b], in float32."""
        if predicted.shape != noised.wanted.shape:
            shapes = f"{list(noised.wanted.shape)}, got {list(predicted.shape)}"
            raise ValueError(f"a {type(self.unet).__name__} must return {shapes}")
        return (predicted.float() - noised.wanted).square().mean(dim=(1, 2, 3))

    def weigh(self, error: Tensor, noised: Noised, batch: Batch) -> Tensor:
        """Weigh each image's error [b] as the config says: by min-SNR, and by how often its time is drawn."""
        if self.config.min_snr_gamma is not None:
            target = target_of(self.config.prediction_type)
            error = error * target.min_snr(noised.sigma, self.config.min_snr_gamma)
        if (weights := self.config.timestep_weights) is not None:
            density = timestep_density(weights, len(self.sigmas)).to(error.device)
            error = error / density[batch.timesteps]
        return error


@torch.no_grad()
def measure_timestep_weights(
    loss: DiffusionLoss, data: BatchSource, batch_size: int, batches: int = 64, parts: int = 20
) -> tuple[float, ...]:
    """Measure `TrainingConfig.timestep_weights` on the first batches: the root mean square loss of each part.

    Drawing timesteps in this proportion gives the mean loss the least variance
    (https://arxiv.org/abs/2102.09672, eq. 18). The weights are measured once, not while training as there:
    so a batch stays a function of the step alone. ValueError if the loss has such weights already, or a part
    no timestep that was drawn.
    """
    if loss.config.timestep_weights is not None:
        raise ValueError("weights are measured by a loss that has no timestep_weights itself")
    total, device = len(loss.sigmas), next(loss.parameters()).device
    check_int("parts", parts, most=total)
    squares, counts = torch.zeros(parts, dtype=torch.float64), torch.zeros(parts)
    for step in range(check_int("batches", batches)):
        batch = data.batch(step, slice(0, batch_size), device)
        part = batch.timesteps.cpu() * parts // total
        squares.index_add_(0, part, loss.each(batch).double().cpu().square())
        counts.index_add_(0, part, torch.ones(len(part)))
    if not counts.all():
        raise ValueError(f"{batches} batches have no timestep of some of {parts} parts: take more batches")
    return tuple((squares / counts).sqrt().tolist())

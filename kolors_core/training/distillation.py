"""Consistency distillation: a UNet learns to draw in 1 to 8 steps what a teacher draws in many.

A point of the teacher's trajectory (its probability flow ODE) and the next one, a step of the solver below,
must lead to the same end. With sigma > middle > end, in terms of x = image + sigma * noise,

    f(x, sigma, end) = x0(x) + end / sigma * (x - x0(x))         Euler's step, which is DDIM's
    loss = |f(x, sigma, end) - f(y, middle, end)|                 y = the teacher's f(x, sigma, middle)

where only the first f has a gradient and |.| is a pseudo-Huber distance. end 0 gives latent consistency
models (LCM, https://arxiv.org/abs/2310.04378, algorithm 1), any end down to 0 trajectory consistency (TCD,
https://arxiv.org/abs/2402.19159, section 4.1). f(x, sigma, sigma) = x for every model, so LCM's boundary
scalings are not needed; those of the sampler `lcm` are within 1e-5 of none at the timesteps trained here.

The second f is of the student itself, not of a moving average: so LCM's authors train LoRAs
(https://arxiv.org/abs/2311.05556), https://arxiv.org/abs/2310.14189, section 3.2, finds it better where no
teacher is used, it takes no memory, and a run has no state but its weights. For drawing,
`TrainingConfig.ema_decay` averages as ever.
Shapes: b images of one rank, T training timesteps, S text tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.conditioning import concat_extra_channels
from kolors_core.targets import target_of
from kolors_core.training.data import Batch
from kolors_core.training.loss import LARGEST_SIGMA, DiffusionLoss
from kolors_core.training.run_record import digest
from kolors_core.training.trainer import TrainingConfig
from kolors_core.unet import UNet
from kolors_core.validation import check_float, check_int

HUBER = 1e-3  # differences far above it count by their size, those below by their square


class ConsistencyLoss(DiffusionLoss):
    """Loss of a student UNet, which a `Trainer` trains as it does `DiffusionLoss`.

    teacher: a frozen UNet; None: the student without the adapters that are trained. guidance_scale: the
    teacher's, baked into the student, which is then drawn at 1. negative: embedding [1, S, ...] of the
    negative prompt, for a scale above 1. solver_steps: of the teacher's whole trajectory, a divisor of T.
    trajectory: TCD, drawn with TCDScheduler; else LCM, with LCMScheduler: their `original_inference_steps`
    are solver_steps. ValueError for other settings, or ones that have no effect here.
    """

    def __init__(
        self, unet: UNet, sigmas: Tensor, config: TrainingConfig, *, teacher: UNet | None = None,
        guidance_scale: float = 1.0, negative: TextEmbedding | None = None, solver_steps: int = 50,
        trajectory: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(unet, None, sigmas, config)
        for name in ("min_snr_gamma", "timestep_weights"):
            if (value := getattr(config, name)) is not None:
                raise ValueError(f"{name} has no meaning in distillation: expected None, got {value}")
        self.scale = check_float("guidance_scale", guidance_scale, 0)
        if (self.scale > 1) != (negative is not None):
            given = "no negative prompt's embedding" if negative is None else "a negative prompt's embedding"
            wanted = "guidance_scale above 1 and `negative` need each other"
            raise ValueError(f"{wanted}, got {self.scale:g} and {given}")
        if negative is not None and len(negative.tokens) != 1:
            raise ValueError(f"negative must be the embedding of one prompt, got {len(negative.tokens)}")
        total, steps = len(sigmas), check_int("solver_steps", solver_steps, most=len(sigmas) // 2)
        if total % steps:
            raise ValueError(f"solver_steps must divide the {total} training timesteps, got {steps}")
        self.adapters = _trained_adapters(unet) if teacher is None else []
        if teacher is not None and any(parameter.requires_grad for parameter in teacher.parameters()):
            raise ValueError("the teacher must be frozen, requires_grad_(False), and not the student itself")
        self.teacher, self.negative, self.trajectory = teacher, negative, trajectory
        self.spacing = total // steps
        # By position: 0 is the image, p is training timestep p - 1.
        self.levels = torch.cat([sigmas.new_zeros(1), sigmas.clamp(max=LARGEST_SIGMA)])  # [T + 1]

    def state_key(self) -> tuple[Any, ...]:
        """Return all that the loss depends on besides models and batches, see kolors_core/module.py."""
        negative = None if self.negative is None else digest(self.negative.tokens.float())
        return *super().state_key(), self.scale, negative, self.spacing, self.trajectory

    def positions(self, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose start, middle and end of a batch's timesteps [b]: positions [b], 0 for the image.

        The solver's step that has the timestep goes from start to middle. The timestep's place in that step
        says which part of the way from there to 0 the end is, so that a batch determines its loss.
        """
        place = timesteps % self.spacing
        middle = timesteps - place
        end = middle * place // (self.spacing - 1) if self.trajectory else torch.zeros_like(middle)
        return middle + self.spacing, middle, end

    def each(self, batch: Batch) -> Tensor:
        """Compute the loss of each of the rank's images: [b]; ValueError for tokens or control images."""
        if batch.control is not None:
            raise ValueError("a ControlNet cannot be distilled: expected a batch without control images")
        start, middle, end = self.positions(batch.timesteps)
        sigma, next_sigma, last_sigma = (self._level(at) for at in (start, middle, end))
        x = batch.latents + sigma * batch.noise
        # Before the target: versions of autocast that keep casts made without gradients would use those here.
        found = move(x, self._predict(self.unet, batch, x, start), sigma, last_sigma)
        with torch.no_grad():
            with self._teaching() as teacher:
                y = move(x, self._guided(teacher, batch, x, start), sigma, next_sigma)
            wanted = self._predict(self.unet, batch, y, middle)
            wanted = move(y, wanted, next_sigma.clamp(min=self.levels[1].item()), last_sigma)
            wanted = torch.where(next_sigma > 0, wanted, y)
        difference = target_of(self.config.prediction_type).model_input(found - wanted, last_sigma)
        return ((difference**2 + HUBER**2).sqrt() - HUBER).mean(dim=(1, 2, 3))  # [b]

    def _level(self, positions: Tensor) -> Tensor:
        return self.levels.to(positions.device)[positions][:, None, None, None]  # [b, 1, 1, 1]

    def _guided(self, teacher: UNet, batch: Batch, x: Tensor, at: Tensor) -> Tensor:
        """Predict x0 as `guided` does: guiding x0 is guiding the output, in which x0 is linear."""
        positive = self._predict(teacher, batch, x, at)
        if self.negative is None:
            return positive
        one, count = self.negative.to(x.device), len(x)
        counts = None if one.counts is None else one.counts.expand(count, -1)
        text = TextEmbedding(one.tokens.expand(count, -1, -1), one.pooled.expand(count, -1), counts)
        negative = self._predict(teacher, replace(batch, text=text), x, at)
        return negative + self.scale * (positive - negative)

    def _predict(self, unet: UNet, batch: Batch, x: Tensor, at: Tensor) -> Tensor:
        """Predict x0 [b, 4, H/8, W/8] from x at positions [b]; at 0 as at 1."""
        if not isinstance(text := batch.text, TextEmbedding):
            raise ValueError(f"expected captions as a TextEmbedding, got a {type(text).__name__}")
        target, at = target_of(self.config.prediction_type), at.clamp(min=1)
        sigma = self._level(at)
        times = target.timestep(at - 1, sigma.flatten(), len(self.sigmas))
        latents = concat_extra_channels(target.model_input(x, sigma), batch.extra)
        optional = self.optional_inputs(unet, latents, text, batch)
        output = unet(
            latents, times.float(), text.tokens, text.pooled, batch.size_ids, text.counts, **optional
        )  # fmt: skip
        return target.x0(x, sigma, output.to(torch.promote_types(output.dtype, torch.float32)))

    @contextmanager
    def _teaching(self) -> Iterator[UNet]:
        """Yield the teacher: the student itself with its trained adapters off, unless it has one."""
        try:
            for part in self.adapters:
                part.is_active = False
            yield self.unet if self.teacher is None else self.teacher
        finally:
            for part in self.adapters:
                part.is_active = True


def move(x: Tensor, x0: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """Compute Euler's step of x from sigma to end, [b, 1, 1, 1] each, of which end may be 0.

    In this form, unlike `sampling.euler`'s, a huge sigma in the place of infinity loses no digits.
    """
    return x0 + end / sigma * (x - x0)


def _trained_adapters(unet: UNet) -> list[Any]:
    """List the active adapters that are trained; ValueError if something else is, or nothing."""
    parts: list[Any] = [
        part for part in unet.modules()
        if getattr(part, "is_adapter", False) and getattr(part, "is_active", False)
        and any(parameter.requires_grad for parameter in part.parameters())
    ]  # fmt: skip
    own = {id(parameter) for part in parts for parameter in part.parameters()}
    trained = {id(parameter) for parameter in unet.parameters() if parameter.requires_grad}
    if not parts or trained - own:
        expected = "a UNet of which only adapters are trained, or a teacher, such as a frozen copy"
        raise ValueError(f"the student has no teacher: expected {expected}")
    return parts

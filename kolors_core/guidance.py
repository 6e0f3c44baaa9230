"""Guidance: wraps the UNet and a schedule into `denoise(x, sigma) -> x0`, the only input of a sampler.

Shapes: B images, S text tokens; latents are [B, 4, H/8, W/8].
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from kolors_core.conditioning import Conditioning, concat_extra_channels
from kolors_core.denoiser import DenoisingModel
from kolors_core.devices import unwrap_compiled
from kolors_core.module import WrapStep, first_weight
from kolors_core.precompute import has_default_forward, predict_precomputed, predict_uncached
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.unet import UNet
from kolors_core.validation import check_float


class SigmaInterval(NamedTuple):
    """Interval of noise levels: above `low`, up to `high`."""

    low: float
    high: float


Interval = tuple[float, float]  # fractions of a run's steps, from 0 to 1; or `SigmaInterval`
GuidanceRule = Callable[..., Denoiser]  # of `guided`'s signature


def guided(
    unet: DenoisingModel, schedule: Schedule, positive: Conditioning, negative: Conditioning | None = None,
    scale: float = 1.0, *, rescale: float = 0.0, interval: Interval | None = None, precompute: bool = True,
    wrap_step: WrapStep | None = None
) -> Denoiser:  # fmt: skip
    """Apply classifier-free guidance: eps = uncond + scale * (cond - uncond) (https://arxiv.org/abs/2207.12598).

    eps: the UNet's output, also where the schedule's target is another. Without a negative, with a
    scale of at most 1, or outside the interval, the UNet runs on the positive alone. Its input is x, scaled
    (targets.py), followed by `extra`, in its own dtype; x and x0 keep theirs.

    rescale: see `cfg_rescale`. interval: see `use_inside_interval`. precompute: compute what does not depend
    on x (keys and values of text and images, each block's projection of all timesteps) once instead of in
    every step; the result is the same. A UNet that is compiled as a whole, has hooks itself, or overrides
    forward is called as a whole in every step, as is a denoiser that is another (denoiser.py). wrap_step:
    another way to run a step, such as CUDA graphs; not used for such a UNet, or without precompute.
    denoise(x, sigma) takes a sigma for each image too, [B] or [B, 1, 1, 1]; not with interval or ControlNets.
    """
    scale, rescaled = check_float("the guidance scale", scale), cfg_rescale(rescale)

    def combine(_timestep: float, noise: Tensor) -> Tensor:
        unconditional, conditional = noise.chunk(2)
        return rescaled(unconditional + scale * (conditional - unconditional), conditional)

    denoiser = partial(make_denoiser, unet, schedule, precompute=precompute, wrap_step=wrap_step)
    if negative is None or scale <= 1:
        return denoiser(positive)
    inside = denoiser(Conditioning.cat(negative, positive), 2, combine)
    return inside if interval is None else use_inside_interval(interval, schedule, inside, denoiser(positive))


def make_denoiser(
    unet: DenoisingModel, schedule: Schedule, conditioning: Conditioning, repeats: int = 1,
    combine: Callable[[Any, Tensor], Tensor] = lambda _timestep, noise: noise, *, precompute: bool = True,
    wrap_step: WrapStep | None = None
) -> Denoiser:  # fmt: skip
    """Return `denoise(x, sigma) -> x0`, computed from combine(timestep, the UNet's output for all rows).

    schedule: its `target` says what the UNet's output is, see targets.py. conditioning: rows of B images,
    `repeats` for each latent. combine: its timestep is a tensor [B] if sigma is. precompute, wrap_step: see
    `guided`. TypeError naming a feature that the denoiser cannot have, see denoiser.py.
    """
    target, total, net = schedule.target, len(schedule.training_sigmas), cast(nn.Module, unet)
    dtype, extra = first_weight(net).dtype, conditioning.extra  # `denoise` must not keep the rest alive
    repeats = repeats if extra is None else 1  # with it, `concat_extra_channels` has repeated the latents
    residuals = None
    if (nets := conditioning.residuals) is not None:
        residuals = nets.prepare(schedule, conditioning, repeats, precompute=precompute, wrap_step=wrap_step)
    if precompute and isinstance(unet, UNet) and has_default_forward(unet, UNet):
        predict = predict_precomputed(unet, schedule, conditioning, repeats, wrap_step)
    else:
        is_wrapped = precompute and not isinstance(unwrap_compiled(unet), UNet)
        predict = predict_uncached(unet, conditioning, repeats, wrap_step if is_wrapped else None)
    # Plain numbers, so that torch can trace a step.
    timestep_at = dict(zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=False))

    def timestep_of(sigma: float) -> float:
        known = timestep_at.get(sigma)
        return target.timestep(schedule.timestep(sigma), sigma, total) if known is None else known

    def denoise(x: Tensor, sigma: Any) -> Tensor:
        if isinstance(sigma, Tensor) and sigma.ndim:
            if residuals is not None:
                raise ValueError("a ControlNet takes one sigma for all images, got one for each")
            timestep: Any = torch.tensor([timestep_of(one) for one in sigma.flatten().tolist()])  # [B]
            sigma = sigma.to(x).reshape(-1, 1, 1, 1)
        else:
            timestep = timestep_of(sigma := float(sigma))
        latents = concat_extra_channels(target.model_input(x, sigma).to(dtype), extra)
        added = [] if residuals is None else residuals(latents, timestep, sigma)
        return target.x0(x, sigma, combine(timestep, predict(latents, timestep, added).to(x.dtype)))

    return denoise


def cfg_rescale(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of guided and conditional noise [B, ...] that rescales the first in each image.

    Guidance raises the standard deviation, which overexposes; `factor`, 0 to 1, moves it to the second's.
    Source: https://arxiv.org/abs/2305.08891, equations 15 and 16; `rescale_noise_cfg` in diffusers.
    """
    factor = check_float("rescale", factor, 0, 1)

    def rescale(noise: Tensor, conditional: Tensor) -> Tensor:
        axes = tuple(range(1, noise.ndim))
        ratio = conditional.std(axes, keepdim=True) / noise.std(axes, keepdim=True)  # [B, 1, 1, 1]
        return noise * (factor * ratio + (1 - factor))

    return rescale if factor else lambda noise, _conditional: noise


def use_inside_interval(
    interval: Interval, schedule: Schedule, inside: Denoiser, outside: Denoiser
) -> Denoiser:
    """Use `inside` where sigma is in the interval, `outside` elsewhere; errors as in `interval_sigmas`.

    Guidance harms at high noise levels and does little at low ones: https://arxiv.org/abs/2404.07724, eq. 6.
    """
    low, high = interval_sigmas(interval, schedule)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        if isinstance(sigma, Tensor) and sigma.ndim:
            raise ValueError("a guidance interval takes one sigma for all images, got one for each")
        return (inside if low < sigma <= high else outside)(x, sigma)

    return denoise


def interval_sigmas(interval: Interval, schedule: Schedule) -> SigmaInterval:
    """Convert an interval to noise levels; (start, stop) means steps round(start * n) to round(stop * n) - 1.

    Raises ValueError for an invalid interval, and for one that contains none of the schedule's steps.
    """
    low, high = check_interval(interval)
    *sigmas, end = schedule.sigmas.tolist()
    if not isinstance(interval, SigmaInterval):
        start, stop = round(low * len(sigmas)), round(high * len(sigmas))
        low, high = [*sigmas, end][stop], [*sigmas, end][start]
    if not any(low < sigma <= high for sigma in sigmas):
        raise ValueError(f"the guidance interval {tuple(interval)} has none of the {len(sigmas)} steps")
    return SigmaInterval(low, high)


def check_interval(interval: Interval) -> tuple[float, float]:
    """Return an interval's two numbers; ValueError if it is not one."""
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise ValueError(f"a guidance interval must be two numbers, got {interval!r}")
    low, high = (check_float("an end of the guidance interval", end) for end in interval)
    most, end = (math.inf, "") if isinstance(interval, SigmaInterval) else (1, " to 1 at most")
    if not 0 <= low < high <= most:
        raise ValueError(f"a guidance interval must rise from 0 or more{end}, got {low} to {high}")
    return low, high

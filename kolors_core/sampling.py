"""Samplers: functions of `denoise(x, sigma) -> x0`, the model's prediction of the clean latents.

x = image + sigma * noise throughout, in float32 or better. Samplers keep no state between calls.
Shapes: every tensor is [B, 4, H/8, W/8].
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor], Tensor]
Sampler = Callable[..., Tensor]
Sigmas = Tensor | Sequence[float]
Generators = torch.Generator | Sequence[torch.Generator] | None


def euler(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dsigma = (x - x0) / sigma by Euler's method.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1 without churn.
    x: noise times the schedule's `init_noise_sigma`. sigmas: n + 1 descending numbers or a tensor.
    on_step(i, x): called after step i, returns the x to continue with.
    """
    for i, (sigma, next_sigma) in enumerate(pairwise(_floats(sigmas))):
        x0 = denoise(x, sigma)
        x = x + (x - x0) / sigma * (next_sigma - sigma)
        if on_step is not None:
            x = on_step(i, x)
    return x


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *,
    noise: Callable[[], Tensor] | None = None, order: int = 2, first_order_last: bool = False
) -> Tensor:  # fmt: skip
    """Integrate by DPM-Solver++(2M), written in sigmas: h = log(sigma / next_sigma).

    Source: https://arxiv.org/abs/2211.01095, algorithm 2. x, sigmas, on_step: as for `euler`. noise: draws
    standard normal noise like x, for the same paper's SDE-DPM-Solver++. order: 1 omits the multistep term.
    first_order_last: omit it in the last step only; a step to sigma 0 always omits it.
    """
    last, steps = None, len(sigmas) - 1
    for i, (sigma, next_sigma) in enumerate(pairwise(_floats(sigmas))):
        x0 = denoise(x, sigma)
        # Drawn in the step to 0 too, so that the generator ends in the same state as the reference's.
        eps = None if noise is None else noise()
        is_first_order = order == 1 or (first_order_last and i == steps - 1)
        x = dpmpp_step(x, x0, sigma, next_sigma, None if is_first_order else last, eps)
        last = x0, sigma
        if on_step is not None:
            x = on_step(i, x)
    return x


def dpmpp_step(
    x: Tensor, x0: Tensor, sigma: float, next_sigma: float, last: tuple[Tensor, float] | None,
    eps: Tensor | None
) -> Tensor:  # fmt: skip
    """Compute x at next_sigma by a step of `dpmpp_2m`. last: the last step's x0 and sigma; None: order 1."""
    if next_sigma == 0:
        return x0
    h = math.log(sigma / next_sigma)
    if last is not None:
        last_x0, last_sigma = last
        x0 = x0 + (x0 - last_x0) * (0.5 * h / math.log(last_sigma / sigma))
    if eps is None:
        return (next_sigma / sigma) * x - math.expm1(-h) * x0
    gain = -math.expm1(-2 * h)
    x = (next_sigma / sigma) * math.exp(-h) * x + gain * x0
    return x + next_sigma * math.sqrt(gain) * eps


def _floats(sigmas: Sigmas) -> Sequence[float]:
    return sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas


def randn_latents(
    shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Draw standard normal noise [B, ...] on the generator's own device (the CPU if None), then move it.

    generator: one for the whole batch, or one for each of its B images; ValueError for another number. From
    torch 2.13 on, float16 and bfloat16 noise is float32's, rounded: a seed gives the same image in each.
    """
    if isinstance(generator, torch.Generator) or generator is None:
        source = "cpu" if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=source, dtype=dtype).to(device)
    generators = list(generator) if isinstance(generator, Sequence) else []
    if len(generators) != shape[0] or not all(isinstance(one, torch.Generator) for one in generators):
        expected = f"one torch.Generator, or a list of {shape[0]}, one for each image"
        raise ValueError(f"expected {expected}, got {generator!r}")
    return torch.cat([randn_latents((1, *shape[1:]), one, device, dtype) for one in generators])

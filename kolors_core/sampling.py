"""Samplers: functions of `denoise(x, sigma) -> x0`, the model's prediction of the clean latents.

x = image + sigma * noise throughout, in float32 or better. Samplers keep no state between calls.
Shapes: every tensor is [B, 4, H/8, W/8].

This file has Euler's method and DPM-Solver++, and what samplers share: a step of most of them integrates a
polynomial in log sigma through the last predictions (`exponential_step`). The others are in
sampling_deterministic.py, sampling_stochastic.py and sampling_distilled.py.
"""

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, float], Tensor]
OnStep = Callable[[int, Tensor], Tensor]
Sampler = Callable[..., Tensor]
Sigmas = Tensor | Sequence[float]
Generators = torch.Generator | Sequence[torch.Generator] | None
Noise = Callable[[], Tensor]  # draws standard normal noise like x
Order = int | Sequence[int]  # the highest order: one for all steps, or each step's; first steps have less
Points = list[tuple[float, Tensor]]  # sigmas and what the model predicts there
Moments = Callable[[float, int], list[float]]  # `exponential_moments`, or a method's approximation of them


def euler(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dsigma = (x - x0) / sigma by Euler's method.

    Source: Karras et al., https://arxiv.org/abs/2206.00364, algorithm 1 without churn.
    x: noise times the schedule's `init_noise_sigma`. sigmas: n + 1 descending numbers or a tensor.
    on_step(i, x): called after step i, returns the x to continue with.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        x = x + predict_noise(denoise, x, sigma) * (next_sigma - sigma)
        if on_step is not None:
            x = on_step(i, x)
    return x


def dpm_multistep(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *,
    noise: Noise | None = None, order: Order = 2, predict_x0: bool = True,
    solver_type: str = "midpoint"
) -> Tensor:  # fmt: skip
    """Integrate by the multistep DPM-Solver++ (predict_x0) or DPM-Solver (else), or their SDE forms (noise).

    Source: https://arxiv.org/abs/2211.01095 and https://arxiv.org/abs/2206.00927; diffusers'
    schedulers/scheduling_dpmsolver_multistep.py. x, sigmas, on_step: as for `euler`. noise: draws standard
    normal noise like x. order: see `Order`, 1 to 3; a step to sigma 0 is of order 1. solver_type: "midpoint"
    or "heun", the weights of order 2. Order 3 gives the second difference half its weight, as the authors'
    code does, and converges like order 2; `unipc` has the exact weights.
    """
    chosen = moments_of(solver_type, DPM_SOLVERS)

    def moments(z: float, count: int) -> list[float]:
        exact = chosen(z, count)
        return [*exact[:2], exact[2] / 2] if count == 3 else exact

    return multistep(denoise, x, sigmas, on_step, order, moments, predict_x0=predict_x0, noise=noise)


def dpmpp_2m(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *,
    noise: Noise | None = None, order: int = 2, first_order_last: bool = False
) -> Tensor:  # fmt: skip
    """Integrate by DPM-Solver++(2M), `dpm_multistep` at its defaults.

    Source: https://arxiv.org/abs/2211.01095, algorithm 2. x, sigmas, on_step: as for `euler`. noise: draws
    standard normal noise like x, for the same paper's SDE-DPM-Solver++. order: 1 omits the multistep term.
    first_order_last: omit it in the last step only; a step to sigma 0 always omits it.
    """
    steps = len(sigmas) - 1
    orders = falling_orders(order, steps) if first_order_last else [order] * steps
    return dpm_multistep(denoise, x, sigmas, on_step, noise=noise, order=orders)


def falling_orders(order: int, steps: int) -> list[int]:
    """Return each step's order where the last steps' falls to 1, as the reference's lower_order_final."""
    return [min(order, steps - i) for i in range(steps)]


def multistep(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None, order: Order, moments: Moments, *,
    predict_x0: bool, noise: Noise | None = None, uncorrected: Collection[int] | None = None
) -> Tensor:  # fmt: skip
    """Integrate with polynomials through the last predictions. uncorrected: see `unipc`; None: all steps."""
    history: Points = []
    points, start, step = history, x, partial(exponential_step, moments=moments, predict_x0=predict_x0)
    steps = steps_with_orders(sigmas, order)
    kept = max([1, *[most for _, _, most in steps]])
    for i, (sigma, next_sigma, most) in enumerate(steps):
        x0 = denoise(x, sigma)
        newest = (sigma, x0 if predict_x0 else (x - x0) / sigma)
        if points and uncorrected is not None and i - 1 not in uncorrected:
            x = step(start, sigma, [*points, newest])
        # Drawn in the step to 0 too, so that the generator ends in the same state as the reference's.
        eps = None if noise is None else noise()
        history = [newest, *history][:kept]
        start, points = x, history[:most]
        x = step(x, next_sigma, points, eps=eps)
        if on_step is not None:
            x = on_step(i, x)
    return x


def exponential_step(
    x: Tensor, next_sigma: float, points: Points, moments: Moments, *, predict_x0: bool = True,
    eps: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Integrate from the first point's sigma, where x is, to next_sigma, with a polynomial in log sigma.

    With h = log(sigma / next_sigma), and r = 0 to 1 in log sigma from sigma to next_sigma, the solution is
        exp(-h) x + h Integral[exp(-h (1 - r)) x0(r)], or x - next_sigma h Integral[exp(h (1 - r)) noise(r)]
    (propositions 4.1 of https://arxiv.org/abs/2211.01095 and 3.1 of https://arxiv.org/abs/2206.00927).
    points: x0 or, without predict_x0, the noise; a step to sigma 0 returns the first one's x0. moments: see
    `exponential_moments`. eps: noise to add in the SDE, of which the integral is twice as large.
    """
    sigma, first = points[0]
    if next_sigma == 0:
        return first if predict_x0 else x - sigma * first
    if next_sigma == sigma:
        return x
    h, drift = math.log(sigma / next_sigma), 1 if eps is None else 2
    if predict_x0:
        z, scale, x = -drift * h, drift * h, math.exp(-drift * h) * x
    else:
        z, scale = h, -drift * h * next_sigma
    weights = fit_weights([math.log(sigma / known) / h for known, _ in points], moments, z)
    for (_, predicted), weight in zip(points, weights, strict=True):
        x = x.add(predicted, alpha=scale * weight)
    if eps is None:
        return x
    return x.add(eps, alpha=next_sigma * math.sqrt(abs(math.expm1(-2 * h if predict_x0 else 2 * h))))


def exponential_moments(z: float, count: int) -> list[float]:
    """Integrate exp(z (1 - r)) r^k over r from 0 to 1, for k = 0 to count - 1.

    In the papers' terms these are k! phi_{k+1}(z); 1 / (k + 1) at z = 0.
    """
    if abs(z) > 1:
        moments = [math.expm1(z) / z]
        for k in range(1, count):
            moments.append((k * moments[-1] - 1) / z)
        return moments
    moments = [0.0]  # Backwards, where forwards would lose digits, from a k whose moment does not matter.
    for k in range(count + 20, 0, -1):
        moments.append((z * moments[-1] + 1) / k)
    return moments[: -count - 1 : -1]


def midpoint_moments(z: float, count: int) -> list[float]:
    """Return `exponential_moments`, but of two points the second as if exp were constant in the step."""
    moments = exponential_moments(z, count)
    return [moments[0], moments[0] / 2] if count == 2 else moments


DPM_SOLVERS: dict[str, Moments] = {"midpoint": midpoint_moments, "heun": exponential_moments}


def moments_of(solver_type: str, known: dict[str, Moments]) -> Moments:
    """Return the moments of a solver type; ValueError for an unknown one."""
    if solver_type not in known:
        raise ValueError(f"solver_type must be one of {', '.join(map(repr, known))}, got {solver_type!r}")
    return known[solver_type]


def fit_weights(nodes: Sequence[float], moments: Moments, z: float = 0) -> list[float]:
    """Compute weights of values at the nodes: their sum integrates the polynomial through the values.

    The integral is that of exp(z (1 - r)) times the polynomial, over r from 0 to 1, if moments are the exact.
    """
    integrals, weights = moments(z, len(nodes)), []
    for node in nodes:
        polynomial = [1.0]  # 1 at this node and 0 at the others; coefficients of rising powers
        for other in nodes:
            if other != node:
                shifted = zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)
                polynomial = [(lower - other * same) / (node - other) for lower, same in shifted]
        weights.append(sum(c * integral for c, integral in zip(polynomial, integrals, strict=True)))
    return weights


def predict_noise(denoise: Denoiser, x: Tensor, sigma: float) -> Tensor:
    """Predict the noise in x, which is also the slope dx/dsigma."""
    return (x - denoise(x, sigma)) / sigma


def steps_with_orders(sigmas: Sigmas, order: Order) -> list[tuple[float, float, int]]:
    """List each step's sigma, next sigma and highest order; ValueError for another number of orders."""
    pairs = step_ends(sigmas)
    orders = [order] * len(pairs) if isinstance(order, int) else order
    if len(orders) != len(pairs) or any(most < 1 for most in orders):
        raise ValueError(f"order must be at least 1, one or one for each of {len(pairs)} steps, got {order}")
    return [(*pair, most) for pair, most in zip(pairs, orders, strict=True)]


def step_ends(sigmas: Sigmas) -> list[tuple[float, float]]:
    """List the sigmas that each step leads from and to."""
    return list(pairwise(sigmas.tolist() if isinstance(sigmas, Tensor) else sigmas))


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

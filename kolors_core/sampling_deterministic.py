"""Deterministic samplers besides Euler and DPM-Solver++: one-step, multistep and single-step methods.

Arguments and shapes are those of sampling.py. All but `heun` and `dpm2` integrate a polynomial through the
last predictions. Its values are x0 or the noise, its variable sigma (`lms`), the number of the step (`plms`)
or log sigma (the others, `exponential_step`). `dpm_singlestep` draws noise if `noise` is given.
"""

import math
from collections.abc import Collection, Sequence

from torch import Tensor

from kolors_core.sampling import (
    DPM_SOLVERS,
    Denoiser,
    Moments,
    Noise,
    OnStep,
    Order,
    Points,
    Sigmas,
    exponential_moments,
    exponential_step,
    fit_weights,
    midpoint_moments,
    moments_of,
    multistep,
    predict_noise,
    step_ends,
    steps_with_orders,
)


def heun(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
    """Integrate by Heun's method: Euler's step, then again with the mean of the slopes at its two ends.

    Two evaluations a step, one in a step to 0. Source: Karras et al., algorithm 1 without churn; diffusers'
    schedulers/scheduling_heun_discrete.py. Arguments: as for `euler`.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        slope, size = predict_noise(denoise, x, sigma), next_sigma - sigma
        if next_sigma > 0:
            slope = (slope + predict_noise(denoise, x + slope * size, next_sigma)) / 2
        x = x + slope * size
        if on_step is not None:
            x = on_step(i, x)
    return x


def dpm2(denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None) -> Tensor:
    """Integrate by the midpoint method, with the middle in log sigma: sqrt(sigma * next_sigma).

    Two evaluations a step, one in a step to 0. Source: DPM-Solver-2 (https://arxiv.org/abs/2206.00927,
    algorithm 1) in sigmas; diffusers' schedulers/scheduling_k_dpm_2_discrete.py. Arguments: as for `euler`.
    """
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        slope, middle = predict_noise(denoise, x, sigma), math.sqrt(sigma * next_sigma)
        if next_sigma > 0:
            slope = predict_noise(denoise, x + slope * (middle - sigma), middle)
        x = x + slope * (next_sigma - sigma)
        if on_step is not None:
            x = on_step(i, x)
    return x


def lms(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, order: Order = 4
) -> Tensor:
    """Integrate by Adams-Bashforth's method: the noise is a polynomial in sigma through the last `order`.

    Source: diffusers' schedulers/scheduling_lms_discrete.py, which integrates it numerically; this is exact.
    x, sigmas, on_step: as for `euler`. order: see `Order`; 4 is the reference's.
    """
    points: Points = []
    for i, (sigma, next_sigma, most) in enumerate(steps_with_orders(sigmas, order)):
        points = [(sigma, predict_noise(denoise, x, sigma)), *points]
        size, points = next_sigma - sigma, points[:most]
        weights = fit_weights([(known - sigma) / size for known, _ in points], exponential_moments)
        for (_, noise), weight in zip(points, weights, strict=True):
            x = x.add(noise, alpha=size * weight)
        if on_step is not None:
            x = on_step(i, x)
    return x


def plms(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *,
    midpoints: Sequence[float] = ()
) -> Tensor:  # fmt: skip
    """Integrate by PNDM: as `lms` of order 4, but a polynomial in the number of the step.

    Source: https://arxiv.org/abs/2202.09778, equations 9, 12, 13; diffusers' schedulers/scheduling_pndm.py.
    x, sigmas, on_step: as for `euler`. midpoints: sigmas within the first steps, in the middle of their
    timesteps, three in the paper: these steps are Runge-Kutta's, of four evaluations. Without any, the first
    is Heun's, of two (the reference's skip_prk_steps).
    """
    history: list[Tensor] = []
    for i, (sigma, next_sigma) in enumerate(step_ends(sigmas)):
        slope, size = predict_noise(denoise, x, sigma), next_sigma - sigma
        history = [slope, *history[:3]]
        if i < len(midpoints) and next_sigma > 0:
            middle, half = midpoints[i], midpoints[i] - sigma
            second = predict_noise(denoise, x + slope * half, middle)
            third = predict_noise(denoise, x + second * half, middle)
            last = predict_noise(denoise, x + third * size, next_sigma)
            x = x + (slope + 2 * second + 2 * third + last) * (size / 6)
        elif i == 0 and len(sigmas) > 2:
            x = x + (slope + predict_noise(denoise, x + slope * size, next_sigma)) * (size / 2)
        else:
            weights = fit_weights(range(0, -len(history), -1), exponential_moments)
            for noise, weight in zip(history, weights, strict=True):
                x = x.add(noise, alpha=size * weight)
        if on_step is not None:
            x = on_step(i, x)
    return x


def deis(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, order: Order = 2
) -> Tensor:
    """Integrate by DEIS: the noise is a polynomial in log sigma through the last `order`.

    Source: https://arxiv.org/abs/2204.13902, the log-rho form; diffusers' scheduling_deis_multistep.py.
    x, sigmas, on_step: as for `euler`. order: see `Order`; a step to sigma 0 is of order 1.
    """
    return multistep(denoise, x, sigmas, on_step, order, exponential_moments, predict_x0=False)


def unipc(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *, order: Order = 2,
    predict_x0: bool = True, solver_type: str = "bh2", disable_corrector: Collection[int] = ()
) -> Tensor:  # fmt: skip
    """Integrate by UniPC: each prediction also corrects the step that led to it, with no more evaluations.

    Source: https://arxiv.org/abs/2302.04867; diffusers' schedulers/scheduling_unipc_multistep.py.
    x, sigmas, on_step: as for `euler`; the correction starts again from the x before the step, so that what
    on_step changed lives on in the prediction only. order: see `Order`; the paper's last steps fall,
    `falling_orders`; a step to sigma 0 is of order 1. predict_x0: extrapolate x0, else the noise.
    solver_type: "bh1" or "bh2", the paper's B(h). disable_corrector: steps that are not corrected.
    """
    return multistep(
        denoise, x, sigmas, on_step, order, moments_of(solver_type, UNIPC_SOLVERS), predict_x0=predict_x0,
        uncorrected=disable_corrector
    )  # fmt: skip


def bh1_moments(z: float, count: int) -> list[float]:
    """Return `exponential_moments`, but of two points the second at z = 0 (UniPC's B(h) = h)."""
    moments = exponential_moments(z, count)
    return [moments[0], 1 / 2] if count == 2 else moments


UNIPC_SOLVERS: dict[str, Moments] = {"bh1": bh1_moments, "bh2": midpoint_moments}


def dpm_singlestep(
    denoise: Denoiser, x: Tensor, sigmas: Sigmas, on_step: OnStep | None = None, *,
    noise: Noise | None = None, order: Order = 2, predict_x0: bool = True,
    solver_type: str = "midpoint"
) -> Tensor:  # fmt: skip
    """Integrate by the single-step DPM-Solver++ or DPM-Solver: a step of order k spans k sigmas.

    It is written as k steps, each of one evaluation: step j of them starts again from the first one's x, and
    is of order j. Source: as for `dpm_multistep`; diffusers' schedulers/scheduling_dpmsolver_singlestep.py.
    Arguments: as for `dpm_multistep`, but order, if a sequence, is as `singlestep_orders` gives it; if a
    number, it does. Order 3 with "midpoint" omits the middle one of three predictions.
    """
    solver, start = moments_of(solver_type, DPM_SOLVERS), x
    if isinstance(order, int):
        order = singlestep_orders(order, len(sigmas) - 1)
    history: Points = []
    for i, (sigma, next_sigma, most) in enumerate(steps_with_orders(sigmas, order)):
        x0 = denoise(x, sigma)
        history = [*history[-2:], (sigma, x0 if predict_x0 else (x - x0) / sigma)]
        eps, points = None if noise is None else noise(), history[-most if next_sigma > 0 else -1 :]
        start, moments = x if len(points) == 1 else start, solver
        if len(points) == 3:
            points, moments = points[:: 2 if solver_type == "midpoint" else 1], exponential_moments
        x = exponential_step(start, next_sigma, points, moments, predict_x0=predict_x0, eps=eps)
        if on_step is not None:
            x = on_step(i, x)
    return x


def singlestep_orders(order: int, steps: int, *, lower_order_final: bool = True) -> list[int]:
    """Return each step's order for `dpm_singlestep`: 1 to `order`, again and again.

    lower_order_final: the last is 1 where it would be `order`, as the reference's.
    """
    orders = [i % order + 1 for i in range(steps)]
    return [*orders[:-1], 1] if lower_order_final and steps % order == 0 else orders

"""Samplers: every step against the reference's schedulers, and the order that each converges with."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, our_trajectory, reference_trajectory
from kolors_core.sampling import Sampler, dpm_multistep, dpmpp_2m, euler, exponential_moments, randn_latents
from kolors_core.sampling_deterministic import (
    deis,
    dpm2,
    dpm_singlestep,
    heun,
    lms,
    plms,
    singlestep_orders,
    unipc,
)
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import EXACT, FLOAT32, relative_error
from tests.support.versions import draws_rounded

pytestmark = pytest.mark.numerical

RUNS = [
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    (DPMSolverMultistepScheduler, {"solver_order": 1}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
]


@pytest.mark.parametrize("steps", [5, 25, 50])
@pytest.mark.parametrize(
    ("kind", "changes"), RUNS, ids=[f"{k.__name__[:5]}-{'-'.join(map(str, c.values()))}" for k, c in RUNS]
)
def test_every_step_equals_the_reference(kind: type[Scheduler], changes: dict, steps: int) -> None:
    theirs, their_state = reference_trajectory(kind, KOLORS_SCHEDULER | changes, steps)
    ours, our_state = our_trajectory(kind, KOLORS_SCHEDULER | changes, steps)
    assert len(ours) == len(theirs) == steps
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(mine, other) < FLOAT32, f"step {i}"
    assert torch.equal(our_state, their_state), "the generator must be left where the reference leaves it"


@pytest.mark.parametrize(
    ("kind", "changes", "wrong"),
    [
        (EulerDiscreteScheduler, {}, {"steps_offset": 0}),
        (EulerDiscreteScheduler, {}, {"beta_end": 0.012}),
        (DPMSolverMultistepScheduler, {}, {"solver_order": 1}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {"use_karras_sigmas": False}),
    ],
)
def test_parity_can_fail(kind: type[Scheduler], changes: dict, wrong: dict) -> None:
    theirs, _ = reference_trajectory(kind, KOLORS_SCHEDULER | changes, 25)
    ours, _ = our_trajectory(kind, KOLORS_SCHEDULER | changes | wrong, 25)
    assert relative_error(ours[-1], theirs[-1]) > 10 * FLOAT32


@draws_rounded
def test_noise_is_the_same_in_every_precision() -> None:
    def draw(dtype: torch.dtype) -> Tensor:
        return randn_latents(SHAPE, torch.Generator().manual_seed(3), torch.device("cpu"), dtype)

    assert torch.equal(draw(torch.float32).to(torch.float16), draw(torch.float16))
    assert torch.equal(draw(torch.float32).to(torch.bfloat16), draw(torch.bfloat16))


def test_noise_of_a_list_is_each_generators_own() -> None:
    cpu = torch.device("cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    listed = randn_latents(SHAPE, generators, cpu, torch.float32)
    alone = randn_latents((1, *SHAPE[1:]), torch.Generator().manual_seed(4), cpu, torch.float32)
    assert torch.equal(listed[1:], alone)
    with pytest.raises(ValueError, match="a list of 2, one for each image"):
        randn_latents(SHAPE, [torch.Generator()], cpu, torch.float32)


def test_nothing_is_held_between_calls() -> None:
    first, _ = our_trajectory(DPMSolverMultistepScheduler, KOLORS_SCHEDULER, 5)
    second, _ = our_trajectory(DPMSolverMultistepScheduler, KOLORS_SCHEDULER, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def gaussian_error(sampler: Any, steps: int, power: int = 1) -> float:
    """The error for data N(0, 1), of ideal denoiser x / (1 + sigma^2): x grows as (1 + sigma^2)^(power / 2).

    The first steps are short, as a multistep method's first ones are of a low order.
    """
    high, low = math.log(20), math.log(0.05)
    sigmas = [math.exp(high + (low - high) * (i / steps) ** 3) for i in range(steps + 1)]
    x = torch.ones(1, dtype=torch.float64)
    exact = x * ((1 + sigmas[-1] ** 2) / (1 + sigmas[0] ** 2)) ** (power / 2)
    return relative_error(sampler(lambda x, sigma: x / (1 + sigma**2), x, sigmas), exact)


def singlestep(order: int, solver_type: str, **options: Any) -> Sampler:
    def sampler(denoise: Any, x: Tensor, sigmas: list[float], **more: Any) -> Tensor:
        orders = singlestep_orders(order, len(sigmas) - 1, lower_order_final=False)
        return dpm_singlestep(denoise, x, sigmas, order=orders, solver_type=solver_type, **options, **more)

    return sampler


ORDERS: dict[str, tuple[Any, float]] = {
    "euler": (euler, 1), "heun": (heun, 2), "dpm2": (dpm2, 2), "plms": (plms, 2), "dpmpp_2m": (dpmpp_2m, 2),
    **{f"lms{k}": (partial(lms, order=k), k) for k in (1, 2, 3, 4)},
    **{f"deis{k}": (partial(deis, order=k), k) for k in (1, 2, 3)},
    **{f"unipc{k}": (partial(unipc, order=k), k + 1) for k in (1, 2, 3)},
    "unipc2-bh1": (partial(unipc, solver_type="bh1"), 3),
    **{f"unip{k}": (partial(unipc, order=k, disable_corrector=range(999)), k) for k in (1, 2, 3)},
    "unipc2-noise": (partial(unipc, predict_x0=False), 3),
    "2m-heun": (partial(dpm_multistep, solver_type="heun"), 2),
    "2m-noise": (partial(dpm_multistep, solver_type="heun", predict_x0=False), 2),
    "3m": (partial(dpm_multistep, order=3), 2),  # see its docstring
    **{f"single{k}-{s}": (singlestep(k, s), k) for k in (1, 2, 3) for s in ("midpoint", "heun")},
    "single2-noise": (singlestep(2, "midpoint", predict_x0=False), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_twice_the_steps_divide_the_error_by_two_to_the_order(name: str) -> None:
    sampler, order = ORDERS[name]
    coarse, fine = (gaussian_error(sampler, steps) for steps in (192, 384))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_sde_without_its_noise_has_twice_the_slope(order: int) -> None:
    """With dx/dsigma = 2 noise x grows as 1 + sigma^2, and x0 is constant: its polynomials are exact."""
    multistep = partial(dpm_multistep, order=order)
    for sampler, measured in ((multistep, min(order, 2)), (singlestep(order, "heun"), order)):
        silent = partial(sampler, noise=lambda: torch.zeros(1, dtype=torch.float64))
        assert gaussian_error(silent, 24, power=2) < EXACT
        silent = partial(silent, predict_x0=False)
        coarse, fine = (gaussian_error(silent, steps, power=2) for steps in (192, 384))
        assert math.log2(coarse / fine) == pytest.approx(measured, abs=0.3)


def test_the_sde_keeps_the_distribution() -> None:
    """For data N(0, 1) x has variance 1 + sigma^2 at every sigma."""
    generator, shape = torch.Generator().manual_seed(0), (100_000,)
    sigmas = [math.exp(2 - 4 * i / 200) for i in range(201)]
    for predict_x0 in (True, False):
        x = torch.randn(shape, generator=generator) * (1 + sigmas[0] ** 2) ** 0.5
        x = dpm_multistep(
            lambda x, sigma: x / (1 + sigma**2), x, sigmas, predict_x0=predict_x0,
            noise=lambda: torch.randn(shape, generator=generator),
        )  # fmt: skip
        assert x.var().item() == pytest.approx(1 + sigmas[-1] ** 2, rel=0.02)


@pytest.mark.parametrize("z", [-30.0, -1.001, -0.999, -1e-3, -1e-9, 0.0, 1e-9, 0.5, 2.0])
def test_moments_are_the_integrals(z: float) -> None:
    nodes, weights = np.polynomial.legendre.leggauss(60)
    r = (nodes + 1) / 2
    exact = [float((weights / 2 * np.exp(z * (1 - r)) * r**k).sum()) for k in range(4)]
    assert exponential_moments(z, 4) == pytest.approx(exact, rel=1e-11)


SAMPLERS = (euler, heun, dpm2, lms, plms, deis, unipc, dpm_multistep, dpmpp_2m, dpm_singlestep)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_on_step_returns_goes_on(sampler: Sampler) -> None:
    sigmas, seen = [5.0, 2.0, 1.0, 0.5, 0.0], []

    def on_step(i: int, x: Tensor) -> Tensor:
        seen.append(i)
        return torch.full_like(x, float(i))

    start = torch.ones(SHAPE)
    end = sampler(lambda x, sigma: x / (1 + sigma**2), start, torch.tensor(sigmas), on_step)
    assert seen == [0, 1, 2, 3] and (end == 3).all() and (start == 1).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_to_zero_is_the_clean_image(sampler: Sampler) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_error(sampler(lambda x, sigma: x / (1 + sigma**2), x, [3.0, 0.0]), x / 10) < EXACT


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (deis, {"order": [1, 2]}, "one or one for each of 4 steps"),
        (lms, {"order": 0}, "at least 1"),
        (unipc, {"solver_type": "midpoint"}, "solver_type must be one of 'bh1', 'bh2', got 'midpoint'"),
        (dpm_multistep, {"solver_type": "bh1"}, "one of 'midpoint', 'heun'"),
        (dpm_singlestep, {"solver_type": "bh1"}, "one of 'midpoint', 'heun'"),
    ],
)
@pytest.mark.exact
def test_wrong_options_are_refused(sampler: Sampler, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampler(lambda x, sigma: x, torch.ones(SHAPE), [5.0, 2.0, 1.0, 0.5, 0.0], **options)

"""Stochastic samplers against the reference's schedulers, written-out forms, and a known distribution."""

import math
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, predict
from kolors_core.sampling import Denoiser, Sampler, dpm_multistep, euler
from kolors_core.sampling_deterministic import dpm2, heun
from kolors_core.sampling_stochastic import ancestral, churn, dpmpp_sde, restart
from kolors_core.sigmas import karras, sigma_to_timestep
from tests.support.small import EXACT, FLOAT32, relative_error
from tests.support.trajectories import (
    KOLORS,
    check_equal,
    our_run,
    randn,
    reference_run,
    run_sigmas,
    stand_in,
    training_sigmas,
)

pytestmark = pytest.mark.numerical
STEPS = [5, 10, 25, 50]
SPACINGS = ["leading", "linspace", "trailing"]


@pytest.mark.parametrize("spacing", SPACINGS)
def test_euler_ancestral(spacing: str) -> None:
    """It draws in every step, the last too."""
    theirs = diffusers.EulerAncestralDiscreteScheduler.from_config(KOLORS, timestep_spacing=spacing)
    for steps in STEPS:
        reference = reference_run(theirs, steps)
        check_equal(our_run(ancestral, theirs, stand_in(theirs.timesteps)), reference, steps)


@pytest.mark.parametrize("family", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
def test_kdpm2_ancestral(family: dict) -> None:
    """It draws in every step but the last. Of Karras' timesteps, only the first of a step is rounded."""
    theirs = diffusers.KDPM2AncestralDiscreteScheduler.from_config(KOLORS, **family)
    for steps in STEPS:
        reference = reference_run(theirs, steps)
        options = {"sampler": dpm2, "draw_last": False}
        check_equal(our_run(ancestral, theirs, stand_in(theirs.timesteps), **options), reference, steps)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim(eta: float, spacing: str, to_one: bool) -> None:
    """It draws in every step if eta is not 0."""
    config = KOLORS | {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
    theirs = diffusers.DDIMScheduler.from_config(config)
    end = 0.0 if to_one else training_sigmas(theirs)[0].item()
    for steps in STEPS:
        reference = reference_run(theirs, steps, eta=eta)
        check_equal(
            our_run(ancestral, theirs, stand_in(theirs.timesteps), end=end, eta=eta), reference, steps
        )


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("linspace", 0)])
def test_ddpm(spacing: str, offset: int, variance: str) -> None:
    """It draws in every step but one of timestep 0."""
    config = KOLORS | {"timestep_spacing": spacing, "steps_offset": offset, "variance_type": variance}
    theirs = diffusers.DDPMScheduler.from_config(config)
    for steps in STEPS:
        reference = reference_run(theirs, steps)
        options = {"fixed_large": variance == "fixed_large", "draw_last": bool(theirs.timesteps[-1] > 0)}
        check_equal(our_run(ancestral, theirs, stand_in(theirs.timesteps), **options), reference, steps)


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("EulerAncestral", {}, {"eta": 0.999}), ("EulerAncestral", {}, {"draw_last": False}),
        ("EulerAncestral", {}, {"fixed_large": True}), ("EulerAncestral", {}, {"sampler": dpm2}),
        ("KDPM2Ancestral", {"sampler": dpm2, "draw_last": False}, {"draw_last": True}),
        ("KDPM2Ancestral", {"sampler": dpm2, "draw_last": False}, {"sampler": heun}),
    ],
)  # fmt: skip
def test_parity_can_fail(kind: str, right: dict, wrong: dict) -> None:
    theirs = getattr(diffusers, f"{kind}DiscreteScheduler").from_config(KOLORS)
    reference, timesteps = reference_run(theirs, 10), theirs.timesteps
    check_equal(our_run(ancestral, theirs, stand_in(timesteps), **right), reference, 10)
    with pytest.raises((AssertionError, StopIteration)):
        check_equal(our_run(ancestral, theirs, stand_in(timesteps), **(right | wrong)), reference, 10)


def point(x: Tensor, sigma: float) -> Tensor:
    """The denoiser of data of one image, MEAN everywhere: x - MEAN is noise of sigma, at any step size."""
    return torch.full_like(x, MEAN)


def test_ddim_steps_to_the_next_timestep() -> None:
    """The reference's step goes down T // n timesteps: not to the next one, with linspace spacing."""
    theirs = diffusers.DDIMScheduler.from_config(KOLORS, timestep_spacing="linspace")
    theirs.set_timesteps(10)
    sigmas = run_sigmas(theirs)
    noise = randn(torch.Generator().manual_seed(0))
    x = ancestral(point, MEAN + sigmas[0] * noise, sigmas[:10], noise=no_noise, eta=0.0)
    assert relative_error(x - MEAN, sigmas[9] * noise) < FLOAT32
    latents = (MEAN + sigmas[0] * noise) / (sigmas[0] ** 2 + 1) ** 0.5
    for timestep, sigma in zip(theirs.timesteps[:9], sigmas, strict=False):
        output = (latents * (sigma**2 + 1) ** 0.5 - MEAN) / sigma
        latents = theirs.step(output, timestep, latents).prev_sample
    assert relative_error(latents * (sigmas[9] ** 2 + 1) ** 0.5 - MEAN, sigmas[9] * noise) > 1


CHURNS = [
    {"s_churn": 3.0}, {"s_churn": 1e9, "s_noise": 1.01}, {"s_churn": 8.0, "s_tmin": 0.2, "s_tmax": 6.0},
]  # fmt: skip


@pytest.mark.parametrize("arguments", [{}, *CHURNS])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "EDMEulerScheduler"])
def test_churn(kind: str, arguments: dict) -> None:
    """The reference's step is right where its model output is of x and sigma after the noise is added."""
    theirs = getattr(diffusers, kind).from_config(KOLORS if kind[:3] == "Eul" else {})
    for steps in STEPS:
        theirs.set_timesteps(steps)
        denoise = edm_stand_in if kind[:3] == "EDM" else interpolated_stand_in(theirs)
        reference = churned_reference_run(theirs, denoise, **arguments)
        check_equal(our_run(churn, theirs, denoise, **arguments), reference, steps)
        if arguments and steps == 50:
            wrong = arguments | {"s_churn": arguments["s_churn"] * 0.9, "s_tmax": 5.0}
            assert relative_error(our_run(churn, theirs, denoise, **wrong)[0][-1], reference[0][-1]) > 1e-3


def interpolated_stand_in(theirs: Any) -> Denoiser:
    table = training_sigmas(theirs)
    return lambda x, sigma: x - sigma * predict(x / (sigma**2 + 1) ** 0.5, sigma_to_timestep(sigma, table))


def edm_stand_in(x: Tensor, sigma: float) -> Tensor:
    """Preconditioned as Karras et al., table 1, with data of standard deviation 0.5."""
    total = sigma**2 + 0.25
    output = predict(x / total**0.5, 0.25 * math.log(sigma))
    return 0.25 / total * x + sigma * 0.5 / total**0.5 * output


def churned_reference_run(theirs: Any, denoise: Denoiser, **arguments: Any) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, trajectory = randn(generator) * theirs.init_noise_sigma, []
    s_churn, s_noise = arguments.get("s_churn", 0.0), arguments.get("s_noise", 1.0)
    for sigma, timestep in zip(theirs.sigmas.tolist(), theirs.timesteps, strict=False):
        inside = arguments.get("s_tmin", 0.0) <= sigma <= arguments.get("s_tmax", math.inf)
        gamma = min(s_churn / len(theirs.timesteps), 2**0.5 - 1) if inside else 0.0
        raised = sigma * (1 + gamma)
        ahead = torch.Generator()
        ahead.set_state(generator.get_state())
        x = latents + s_noise * (raised**2 - sigma**2) ** 0.5 * randn(ahead)
        output = (x - denoise(x, raised)) / raised
        if isinstance(theirs, diffusers.EDMEulerScheduler):
            total = raised**2 + 0.25
            output = (denoise(x, raised) - 0.25 / total * x) / (raised * 0.5 / total**0.5)
        theirs.scale_model_input(latents, timestep)
        latents = theirs.step(output, timestep, latents, generator=generator, **arguments).prev_sample
        trajectory.append(latents)
    return trajectory, generator.get_state()


def test_churn_is_removed_again() -> None:
    """The reference's UNet, run before the noise is added, does not see it, so that it stays in the image."""
    theirs = diffusers.EulerDiscreteScheduler.from_config(KOLORS)
    theirs.set_timesteps(10)
    sigmas, generator, options = theirs.sigmas.tolist(), torch.Generator().manual_seed(0), {"s_churn": 5.0}
    start = MEAN + sigmas[0] * torch.randn(20_000, generator=generator)
    draw = partial(torch.randn, 20_000, generator=generator)
    x = churn(point, start, sigmas[:4], noise=draw, **options)
    assert (x - MEAN).std().item() == pytest.approx(sigmas[3], rel=0.02)
    for sigma, timestep in zip(sigmas[:3], theirs.timesteps, strict=False):
        theirs.scale_model_input(start, timestep)
        output = (start - MEAN) / sigma
        start = theirs.step(output, timestep, start, generator=generator, **options).prev_sample
    assert (start - MEAN).std().item() > 1.3 * sigmas[3]


class Increments:
    """Noise of a Brownian motion in sigma, for the reference: to a step's midpoint, then of the step."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator, self.middle, self.first = generator, None, None

    def __call__(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        if self.middle is None:
            self.middle = next_sigma
            self.first = (sigma - next_sigma).sqrt() * randn(self.generator).double()
            return self.first / (sigma - next_sigma).sqrt()
        walked = self.first + (self.middle - next_sigma).sqrt() * randn(self.generator).double()
        self.middle = None
        return walked / (sigma - next_sigma).sqrt()


@pytest.mark.parametrize("family", [{}, {"use_karras_sigmas": True}])
def test_dpmpp_sde(monkeypatch: pytest.MonkeyPatch, family: dict) -> None:
    """The reference's class in float64, with increments in order of time in place of its Brownian tree."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    theirs = DPMSolverSDEScheduler.from_config(KOLORS, **family)
    for steps in STEPS:
        theirs.set_timesteps(steps)
        theirs.sigmas = theirs.sigmas.double()
        generator, trajectory = torch.Generator().manual_seed(0), []
        latents = randn(generator).double() * theirs.init_noise_sigma
        theirs.noise_sampler = Increments(generator)
        for timestep in theirs.timesteps:
            noise = predict(theirs.scale_model_input(latents, timestep), timestep)
            latents = theirs.step(noise, timestep, latents).prev_sample
            trajectory.append(latents)
        reference = [*trajectory[1::2], trajectory[-1]], generator.get_state()
        ours = our_run(dpmpp_sde, theirs, stand_in(theirs.timesteps), dtype=torch.float64)
        check_equal(ours, reference, steps, EXACT)
        wrong = our_run(dpmpp_sde, theirs, stand_in(theirs.timesteps), eta=0.99)
        assert relative_error(wrong[0][-1], reference[0][-1]) > 1e-3


def no_noise() -> Tensor:
    raise AssertionError("noise was drawn")


SIGMAS = [*karras(0.03, 29.0, 20), 0.0]


def draws(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


def smooth(x: Tensor, sigma: float) -> Tensor:
    return x - sigma * predict(x / (sigma**2 + 1) ** 0.5, 100 * math.log(1 + sigma))


def test_dpmpp_3m_sde_is_the_multistep_solver_of_order_3_with_noise() -> None:
    """k-diffusion's `sample_dpmpp_3m_sde` with its eta of 1, written out."""
    noise, x = draws(), 29 * draws(1)()
    ours = dpm_multistep(smooth, x, SIGMAS, noise=draws(), order=3, solver_type="heun")
    x0s: list[Tensor] = []
    for i in range(len(SIGMAS) - 2):
        x0s.append(smooth(x, SIGMAS[i]))
        h = math.log(SIGMAS[i] / SIGMAS[i + 1])
        x = math.exp(-2 * h) * x + (1 - math.exp(-2 * h)) * x0s[i]
        phi2 = (math.exp(-2 * h) - 1) / (2 * h) + 1
        r0, r1 = (math.log(SIGMAS[i - k - 1] / SIGMAS[i - k]) / h if i > k else 0.0 for k in (0, 1))
        if i > 1:
            d10, d11 = (x0s[i] - x0s[i - 1]) / r0, (x0s[i - 1] - x0s[i - 2]) / r1
            d1, d2 = d10 + (d10 - d11) * r0 / (r0 + r1), (d10 - d11) / (r0 + r1)
            x = x + phi2 * d1 - (phi2 / (2 * h) - 0.5) * d2
        elif i > 0:
            x = x + phi2 * (x0s[i] - x0s[i - 1]) / r0
        x = x + SIGMAS[i + 1] * math.sqrt(1 - math.exp(-2 * h)) * noise()
    assert relative_error(ours, smooth(x, SIGMAS[-2])) < EXACT
    for wrong in ({"order": 2, "solver_type": "heun"}, {"order": 3, "solver_type": "midpoint"}):
        other = dpm_multistep(smooth, 29 * draws(1)(), SIGMAS, noise=draws(), **wrong)
        assert relative_error(other, ours) > 1e-3


def test_restart_written_out() -> None:
    """Heun's steps, and K times noise from t_min up to t_max and Heun's steps down again."""

    def step(x: Tensor, sigma: float, next_sigma: float) -> Tensor:
        d = (x - smooth(x, sigma)) / sigma
        if next_sigma == 0:
            return x - sigma * d
        moved = x + (next_sigma - sigma) * d
        return x + (next_sigma - sigma) * (d + (moved - smooth(moved, next_sigma)) / next_sigma) / 2

    restarts = {0.3: (4, 2, 5.0), 0.05: (3, 1, 0.6)}
    nearest = {min(SIGMAS, key=lambda s: abs(s - low)): plan for low, plan in restarts.items()}
    noise, x, evaluations = draws(), 29 * draws(1)(), 0
    ours = restart(smooth, x, SIGMAS, noise=draws(), restarts=restarts)
    for sigma, next_sigma in zip(SIGMAS, SIGMAS[1:], strict=False):
        x = step(x, sigma, next_sigma)
        count, repeats, high = nearest.get(next_sigma, (0, 0, 0.0))
        ladder = [(high ** (1 / 7) + m / count * (next_sigma ** (1 / 7) - high ** (1 / 7))) ** 7 for m in
                  range(count + 1)] if repeats else []  # fmt: skip
        for _ in range(repeats):
            x = x + math.sqrt(high**2 - next_sigma**2) * noise()
            for above, below in zip(ladder, ladder[1:], strict=False):
                x = step(x, above, below)
                evaluations += 2
    assert evaluations == 2 * (4 * 2 + 3)
    assert relative_error(ours, x) < EXACT
    fewer = restart(smooth, 29 * draws(1)(), SIGMAS, noise=draws(), restarts={0.3: (4, 2, 5.0)})
    assert relative_error(fewer, x) > 1e-3
    with pytest.raises(ValueError, match="sigma_max must be above its sigma_min, 0.247"):
        restart(smooth, x, SIGMAS, noise=draws(), restarts={0.3: (4, 2, 0.2)})


@pytest.mark.parametrize("sampler", [euler, heun, dpm2])
@pytest.mark.parametrize(
    "stochastic", [partial(ancestral, eta=0.0), partial(churn, s_churn=0.0), partial(restart, restarts={})]
)
def test_without_noise_it_is_the_deterministic_sampler(stochastic: Sampler, sampler: Sampler) -> None:
    x = 29 * draws()()
    for dtype in (torch.float32, torch.float64):
        ours = stochastic(smooth, x.to(dtype), SIGMAS, noise=no_noise, sampler=sampler)
        assert torch.equal(ours, sampler(smooth, x.to(dtype), SIGMAS))


def test_dpmpp_sde_without_noise() -> None:
    """DPM-Solver++(2S), algorithm 1 of its paper with r = 1/2."""
    x = 29 * draws()()
    ours = dpmpp_sde(smooth, x, SIGMAS, noise=no_noise, eta=0.0)
    for sigma, next_sigma in zip(SIGMAS[:-1], SIGMAS[1:-1], strict=False):
        middle = math.sqrt(sigma * next_sigma)
        u = middle / sigma * x + (1 - middle / sigma) * smooth(x, sigma)
        x = next_sigma / sigma * x + (1 - next_sigma / sigma) * smooth(u, middle)
    assert relative_error(ours, smooth(x, SIGMAS[-2])) < EXACT


# The second number: how far 100 steps may be from the variance of the data, by a sampler's order.
EVERY: dict[str, tuple[Sampler, float]] = {
    "ancestral": (ancestral, 0.1), "ancestral, eta 0.5": (partial(ancestral, eta=0.5), 0.1),
    "DDPM, fixed_large": (partial(ancestral, fixed_large=True, draw_last=False), 0.1),
    "KDPM2 ancestral": (partial(ancestral, sampler=dpm2), 0.04), "churn": (partial(churn, s_churn=10.0), 0.1),
    "Heun with churn": (partial(churn, s_churn=10.0, sampler=heun), 0.04), "DPM++ SDE": (dpmpp_sde, 0.04),
    "DPM++ SDE, eta 0.5": (partial(dpmpp_sde, eta=0.5), 0.04),
    "DPM++ 3M SDE": (partial(dpm_multistep, order=3, solver_type="heun"), 0.04),
    "restart": (partial(restart, restarts={0.1: (20, 3, 2.0), 1.0: (8, 1, 5.0)}), 0.04),
}  # fmt: skip
MEAN, VARIANCE = 0.7, 0.25


def ideal(x: Tensor, sigma: float) -> Tensor:
    """The mean of the clean image given x, of data with the distribution N(MEAN, VARIANCE)."""
    return MEAN + VARIANCE / (VARIANCE + sigma**2) * (x - MEAN)


@pytest.mark.parametrize("name", EVERY)
def test_the_distribution_is_kept(name: str) -> None:
    """Of 20,000 numbers, whose own variance scatters by 1%."""
    (sampler, bound), sigmas, noise = EVERY[name], [*karras(0.01, 29.0, 100), 0.0], draws(shape=(20_000,))
    x = sampler(ideal, MEAN + math.sqrt(sigmas[0] ** 2 + VARIANCE) * noise(), sigmas, noise=noise)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.var().item() == pytest.approx(VARIANCE, rel=bound)
    louder = sampler(ideal, MEAN + sigmas[0] * noise(), sigmas, noise=lambda: 1.2 * noise())
    assert louder.var().item() > 1.15 * VARIANCE, "the test must see too much noise"


@pytest.mark.parametrize("name", EVERY)
def test_on_step_sees_and_changes_every_step(name: str) -> None:
    seen = []

    def on_step(i: int, x: Tensor) -> Tensor:
        seen.append(i)
        return torch.zeros_like(x) if i == 18 else x

    x = EVERY[name][0](lambda x, sigma: x, draws()(), torch.tensor(SIGMAS), on_step, noise=draws(2))
    assert seen == list(range(20)) and x.abs().max() < 1.0

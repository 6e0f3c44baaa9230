"""Targets: conversions of a model's output to x0, against the reference's schedulers over whole runs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from benchmarks.parity.samplers import predict
from kolors_core.conditioning import Conditioning
from kolors_core.guidance import guided, make_denoiser
from kolors_core.sampling import dpmpp_2m, euler
from kolors_core.schedule import Schedule
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.targets import TARGETS, target_of
from kolors_core.training.loss import LARGEST_SIGMA
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import EXACT, FLOAT32, relative_error

SHAPE = (2, 4, 6, 5)
PRESERVING = ("epsilon", "v_prediction", "sample")
TABLE = {
    name: KOLORS_SCHEDULER[name]
    for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
}
TOTAL = KOLORS_SCHEDULER["num_train_timesteps"]


def normal(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class StandIn(nn.Module):
    """What `make_denoiser` asks of a UNet; it keeps the inputs and timesteps that it was called with."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 1, 1, dtype=dtype)
        self.seen: list[tuple[Tensor, float]] = []

    def forward(self, latents: Tensor, time: Tensor, *_rest: Any) -> Tensor:
        self.seen.append((latents, float(time)))
        return predict(latents, float(time)) * torch.linspace(0.5, 1.0, len(latents)).view(-1, 1, 1, 1)


def conditioning(rows: int) -> Conditioning:
    return Conditioning(torch.zeros(rows, 3, 2), torch.zeros(rows, 2), torch.zeros(rows, 6))


def denoiser(schedule: Schedule, dtype: torch.dtype) -> Callable[[Tensor, float], Tensor]:
    with torch.no_grad():
        return make_denoiser(StandIn(dtype), schedule, conditioning(2))  # type: ignore[arg-type]


def reference_run(theirs: Any, dtype: torch.dtype, **told: Any) -> list[Tensor]:
    """The reference's latents after each step."""
    theirs, net, steps = copy.deepcopy(theirs), StandIn(dtype), list[Tensor]()
    latents = normal(0, dtype) * getattr(theirs, "init_noise_sigma", 1.0)
    for timestep in theirs.timesteps:
        scaled = (
            theirs.scale_model_input(latents, timestep) if hasattr(theirs, "scale_model_input") else latents
        )
        latents = theirs.step(net(scaled, timestep), timestep, latents, return_dict=False, **told)[0]
        steps.append(latents)
    return steps


def our_run(
    sampler: Callable[..., Tensor], schedule: Schedule, scale: Callable[[float], float], dtype: torch.dtype
) -> list[Tensor]:
    """Ours, in the reference's scale of latents."""
    sigmas, steps = schedule.sigmas.tolist(), list[Tensor]()

    def on_step(i: int, x: Tensor) -> Tensor:
        steps.append(x / scale(sigmas[i + 1]))
        return x

    sampler(denoiser(schedule, dtype), normal(0, dtype) * schedule.init_noise_sigma, sigmas, on_step)
    return steps


def worst(mine: list[Tensor], other: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(mine, other, strict=True))


def preserving(sigma: float) -> float:
    return (sigma**2 + 1) ** 0.5


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("name", PRESERVING)
def test_euler_converts_as_the_reference(name: str, steps: int) -> None:
    theirs = diffusers.EulerDiscreteScheduler(**KOLORS_SCHEDULER | {"prediction_type": name})
    theirs.set_timesteps(steps)
    schedule = EulerDiscreteScheduler().schedule(steps)
    expected = reference_run(theirs, torch.float32)
    error = worst(
        our_run(euler, replace(schedule, target=TARGETS[name]), lambda _: 1.0, torch.float32), expected
    )
    assert error < FLOAT32
    for other in set(TARGETS) - {name}:
        wrong = our_run(euler, replace(schedule, target=TARGETS[other]), lambda _: 1.0, torch.float32)
        assert worst(wrong, expected) > 0.01, "the test can fail"


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("name", PRESERVING)
def test_dpm_solver_converts_as_the_reference(name: str, steps: int) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(KOLORS_SCHEDULER | {"prediction_type": name})
    theirs.set_timesteps(steps)
    schedule = DPMSolverMultistepScheduler().schedule(steps)
    sampler = dpmpp(schedule)
    expected = reference_run(theirs, torch.float32)
    error = worst(
        our_run(sampler, replace(schedule, target=TARGETS[name]), preserving, torch.float32), expected
    )
    assert error < FLOAT32


def dpmpp(schedule: Schedule) -> Callable[..., Tensor]:
    return lambda *run: dpmpp_2m(*run, first_order_last=len(schedule.timesteps) < 15)


def flow_schedule(times: Tensor, told: Tensor) -> Schedule:
    """A schedule of the reference's sigmas, which are times t, and its timesteps."""
    sigmas, table = times.double() / (1 - times.double()), torch.arange(1.0, TOTAL + 1) / TOTAL
    sigma = sigmas[0].item()
    return Schedule(
        sigmas, told.double(), sigma + 1, table / (1 - table), whole_timesteps=False,
        target=TARGETS["flow_prediction"],
    )  # fmt: skip


def straight(sigma: float) -> float:
    return sigma + 1


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_equals_the_references_dpm_solver(steps: int, shift: float) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        KOLORS_SCHEDULER, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    theirs.set_timesteps(steps)
    schedule = flow_schedule(theirs.sigmas, theirs.timesteps)
    expected = reference_run(theirs, torch.float32)
    error = worst(our_run(dpmpp(schedule), schedule, straight, torch.float32), expected)
    assert error < FLOAT32
    wrong = replace(schedule, timesteps=schedule.timesteps + 5)
    assert worst(our_run(dpmpp(schedule), wrong, straight, torch.float32), expected) > 10 * FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 25, 50])
def test_flow_equals_the_references_euler(steps: int) -> None:
    """From the last training timestep but one: at t = 1 sigma is infinite."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(TOTAL, shift=3.0)
    theirs.set_timesteps(sigmas=torch.linspace(1 - 1 / TOTAL, 1 / TOTAL, steps).tolist())
    schedule = flow_schedule(theirs.sigmas, theirs.timesteps)
    expected = reference_run(theirs, torch.float32)
    mine = our_run(euler, schedule, straight, torch.float64)  # at sigma 3297 float32 has fewer digits
    assert worst(mine, expected) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_v_prediction_at_zero_terminal_snr_equals_the_reference(kind: str, steps: int) -> None:
    """From sigma 4096, by which both stand for infinity."""
    config = KOLORS_SCHEDULER | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    theirs = getattr(diffusers, kind).from_config(config, prediction_type="v_prediction")
    theirs.set_timesteps(steps)
    is_euler = kind.startswith("Euler")
    sigma = theirs.sigmas[0].item()
    assert sigma == pytest.approx(4096)
    schedule = Schedule(
        theirs.sigmas.double(), theirs.timesteps.double(), sigma if is_euler else preserving(sigma),
        theirs.sigmas, whole_timesteps=False, target=TARGETS["v_prediction"],
    )  # fmt: skip
    sampler, scale = (euler, lambda _: 1.0) if is_euler else (dpmpp(schedule), preserving)
    expected, exact = reference_run(theirs, torch.float32), our_run(sampler, schedule, scale, torch.float64)
    mine = our_run(sampler, schedule, scale, torch.float32)
    assert worst(exact, mine) < max(FLOAT32, 1.1 * worst(exact, expected)), "no less exact than the reference"
    assert worst(mine, expected) < 10 * FLOAT32


@pytest.mark.parametrize("name", TARGETS)
def test_conversions_equal_the_references(name: str) -> None:
    """In float64, for which its sigmas are converted."""
    is_flow = name == "flow_prediction"
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(
        KOLORS_SCHEDULER, prediction_type=name, use_flow_sigmas=is_flow
    )
    theirs.set_timesteps(10)
    theirs.sigmas = theirs.sigmas.double()
    for i, known in enumerate(theirs.sigmas.tolist()[:-1]):
        theirs._step_index = i
        sigma = known / (1 - known) if is_flow else known
        x, output = normal(i) * sigma, normal(100 + i)
        latents = x / (straight(sigma) if is_flow else preserving(sigma))
        expected = theirs.convert_model_output(output, sample=latents)
        assert relative_error(target_of(name).x0(x, sigma, output), expected) < EXACT
        assert relative_error(target_of(name).model_input(x, sigma), latents) < EXACT
        each = torch.full((2, 1, 1, 1), sigma, dtype=torch.float64)
        assert relative_error(target_of(name).x0(x, each, output), expected) < EXACT


@pytest.mark.parametrize("name", TARGETS)
def test_a_perfect_output_gives_the_image(name: str) -> None:
    target, image, noise = target_of(name), normal(1), normal(2)
    for sigma in (0.03, 1.0, 29.0, 4096.0):
        output = target.output(image, noise, sigma)
        assert relative_error(target.x0(image + sigma * noise, sigma, output), image) < EXACT


@pytest.mark.parametrize("zero_snr", [False, True])
def test_training_targets_are_the_references(zero_snr: bool) -> None:
    theirs = diffusers.DDPMScheduler(**TABLE, rescale_betas_zero_snr=zero_snr)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    alphas, image, noise = theirs.alphas_cumprod, normal(1), normal(2)
    for timestep in (0, 500, TOTAL - 1):
        times = torch.full((2,), timestep)
        sigma = (((1 - alphas) / alphas) ** 0.5)[times].clamp(max=LARGEST_SIGMA).view(2, 1, 1, 1)
        assert not zero_snr or timestep < TOTAL - 1 or sigma.max() == LARGEST_SIGMA
        noisy = theirs.add_noise(image, noise, times)
        velocity = theirs.get_velocity(image, noise, times)
        for name, expected in zip(PRESERVING, (noise, velocity, image), strict=True):
            target = target_of(name)
            assert relative_error(target.model_input(image + sigma * noise, sigma), noisy) < EXACT
            assert relative_error(target.output(image, noise, sigma), expected) < EXACT


def test_flows_training_is_the_references() -> None:
    """Its noising and timesteps; the velocity is that of its training example, noise - image."""
    theirs, target = diffusers.FlowMatchEulerDiscreteScheduler(TOTAL, shift=3.0), target_of("flow_prediction")
    image, noise = normal(1), normal(2)
    for i in (0, 1, 500, TOTAL - 1):
        times, t = theirs.timesteps[[i, i]], theirs.sigmas[i].double()
        sigma = (t / (1 - t)).clamp(max=LARGEST_SIGMA)
        noisy = theirs.scale_noise(image, times, noise)
        assert relative_error(target.model_input(image + sigma * noise, sigma), noisy) < EXACT
        assert target.timestep(times, sigma, TOTAL).item() == pytest.approx(times[0].item(), rel=1e-6)
        assert torch.equal(target.output(image, noise, sigma), noise - image)


def test_min_snr_weighs_errors_of_the_image() -> None:
    """Every target's weight is min(snr, gamma) times the squared derivative of x0 by the output."""
    sigmas = torch.tensor([0.02, 0.3, 1.0, 5.0, 29.0], dtype=torch.float64)
    for name, target in TARGETS.items():
        weights = target.min_snr(sigmas, 5.0)
        for sigma, weight in zip(sigmas.tolist(), weights.tolist(), strict=True):
            output = torch.ones((), dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(target.x0(torch.ones(()), sigma, output), output)
            assert weight == pytest.approx(min(sigma**-2, 5.0) * slope.item() ** 2, rel=EXACT), name


def test_min_snr_is_the_references() -> None:
    """The lines of its text-to-image training example."""
    theirs, timesteps = diffusers.DDPMScheduler(**TABLE), torch.arange(TOTAL)
    snr = compute_snr(theirs, timesteps)
    weights = torch.stack([snr, 5.0 * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    sigmas = EulerDiscreteScheduler().training_sigmas()
    assert relative_error(target_of("epsilon").min_snr(sigmas, 5.0), weights / snr) < FLOAT32
    assert relative_error(target_of("v_prediction").min_snr(sigmas, 5.0), weights / (snr + 1)) < FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_epsilon_is_bit_for_bit_x_minus_sigma_times_the_noise(dtype: torch.dtype) -> None:
    schedule, net, x = EulerDiscreteScheduler().schedule(10), StandIn(dtype), normal(0, torch.float32)
    alone = guided(net, schedule, conditioning(2))  # type: ignore[arg-type]
    both = guided(net, schedule, conditioning(2), conditioning(2), 5.0)  # type: ignore[arg-type]
    for sigma in (*schedule.sigmas.tolist()[:-1], 3.3):
        time = torch.tensor(schedule.timestep(sigma))
        latents = (x * 3 / (sigma**2 + 1) ** 0.5).to(dtype)
        noise = net(latents, time).to(torch.float32)
        assert torch.equal(alone(x * 3, sigma), x * 3 - sigma * noise)
        negative, positive = net(latents.repeat(2, 1, 1, 1), time).to(torch.float32).chunk(2)
        noise = negative + 5.0 * (positive - negative)
        assert torch.equal(both(x * 3, sigma), x * 3 - sigma * noise)


@torch.no_grad()
def test_the_model_is_told_the_schedules_time_and_between_its_steps_the_targets() -> None:
    table = torch.arange(1, TOTAL) / TOTAL
    schedule = flow_schedule(table[[999, 499]], torch.tensor([1000.0, 500.0]))
    schedule = replace(schedule, sigmas=torch.cat([schedule.sigmas, torch.zeros(1).double()]))
    for prediction, between in (("flow_prediction", TOTAL / 4), ("epsilon", schedule.timestep(1 / 3))):
        net = StandIn(torch.float32)
        denoise = guided(net, replace(schedule, target=TARGETS[prediction]), conditioning(2))  # type: ignore[arg-type]
        for sigma in (*schedule.sigmas.tolist()[:2], 1 / 3):
            denoise(normal(0, torch.float32), sigma)
        assert [time for _, time in net.seen] == pytest.approx([1000.0, 500.0, between])


@pytest.mark.parametrize("wrong", ["v-prediction", "eps", None, 3])
def test_another_name_is_refused(wrong: Any) -> None:
    message = f"prediction_type must be one of 'epsilon', .*, 'flow_prediction', got {wrong!r}"
    with pytest.raises(ValueError, match=message):
        target_of(wrong)

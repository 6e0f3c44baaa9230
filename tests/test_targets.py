"""Targets: conversions between a model's output and x0, against the reference's schedulers over whole runs."""

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
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler, Schedule
from kolors_core.targets import TARGETS, target_of
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import EXACT, FLOAT32, relative_error

SHAPE = (2, 4, 6, 5)
PRESERVING = ("epsilon", "v_prediction", "sample")
TABLE = {
    name: KOLORS_SCHEDULER[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
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
    net, latents, steps = StandIn(dtype), normal(0, dtype) * getattr(theirs, "init_noise_sigma", 1.0), []
    for timestep in theirs.timesteps:
        scaled = theirs.scale_model_input(latents, timestep) if hasattr(theirs, "scale_model_input") else latents
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
    error = worst(our_run(euler, replace(schedule, prediction=name), lambda _: 1.0, torch.float32), expected)
    print(name, steps, error)
    assert error < FLOAT32
    for other in set(TARGETS) - {name}:
        wrong = our_run(euler, replace(schedule, prediction=other), lambda _: 1.0, torch.float32)
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
    error = worst(our_run(sampler, replace(schedule, prediction=name), preserving, torch.float32), expected)
    print(name, steps, error)
    assert error < FLOAT32


def dpmpp(schedule: Schedule) -> Callable[..., Tensor]:
    return lambda *run: dpmpp_2m(*run, first_order_last=schedule.first_order_last)

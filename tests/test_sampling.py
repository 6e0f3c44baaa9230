"""Samplers: trajectories against the reference's schedulers, step by step, with the same noise."""

from collections.abc import Callable

import diffusers
import pytest
import torch
from torch import Tensor

from kolors_core.sampling import dpmpp_2m, draw_noise, euler, sampler_of
from kolors_core.schedule import DPMSolverMultistepScheduler, EulerDiscreteScheduler, Schedule, Scheduler
from tests.reference_folder import KOLORS_SCHEDULER
from tests.small import FLOAT32, relative_error

SHAPE = (2, 4, 6, 5)
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


def predict(latents: Tensor, timestep: float) -> Tensor:
    """A stand-in for the UNet: not linear, and it depends on the timestep."""
    return torch.tanh(latents.roll(1, dims=-1) * 0.8 + latents * 0.3) + 1e-3 * float(timestep) * torch.sin(
        latents
    )


def our_denoise(schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * predict(x / (sigma**2 + 1) ** 0.5, schedule.timestep(sigma))

    return denoise


def reference_trajectory(kind: type[Scheduler], changes: dict, steps: int) -> tuple[list[Tensor], Tensor]:
    """The reference's latents after each step, and the generator's state at the end."""
    theirs = getattr(diffusers, kind.__name__)(**(KOLORS_SCHEDULER | changes))
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * theirs.init_noise_sigma
    trajectory = []
    for timestep in theirs.timesteps:
        noise = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(noise, timestep, latents, generator=generator, return_dict=False)[0]
        trajectory.append(latents)
    return trajectory, generator.get_state()


def our_trajectory(kind: type[Scheduler], changes: dict, steps: int) -> tuple[list[Tensor], Tensor]:
    scheduler = kind.from_config(KOLORS_SCHEDULER | changes)
    schedule = scheduler.schedule(steps)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return draw_noise(SHAPE, generator, torch.device("cpu"), torch.float32)

    trajectory = []

    def on_step(i: int, x: Tensor) -> Tensor:
        trajectory.append(x / scheduler.latent_scale(schedule.sigmas[i + 1].item()))
        return x

    sampler_of(scheduler, schedule, noise)(
        our_denoise(schedule), noise() * schedule.start_scale, schedule.sigmas, on_step
    )
    return trajectory, generator.get_state()


@pytest.mark.parametrize("steps", [5, 25, 50])
@pytest.mark.parametrize(
    ("kind", "changes"), RUNS, ids=[f"{k.__name__[:5]}-{'-'.join(map(str, c.values()))}" for k, c in RUNS]
)
def test_every_step_equals_the_reference(kind: type[Scheduler], changes: dict, steps: int) -> None:
    theirs, their_state = reference_trajectory(kind, changes, steps)
    ours, our_state = our_trajectory(kind, changes, steps)
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
    theirs, _ = reference_trajectory(kind, changes, 25)
    ours, _ = our_trajectory(kind, changes | wrong, 25)
    assert relative_error(ours[-1], theirs[-1]) > 10 * FLOAT32


def test_samplers_converge_to_the_exact_solution() -> None:
    """For data N(0, 1) the ideal denoiser is x / (1 + sigma^2), and x ends at x0 / sqrt(1 + sigma0^2)."""
    sigmas = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(100).sigmas
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    exact = x / (1 + sigmas[0] ** 2) ** 0.5
    errors = {
        name: relative_error(sampler(lambda x, sigma: x / (1 + sigma**2), x, sigmas), exact)
        for name, sampler in (("euler", euler), ("2m", dpmpp_2m))
    }
    assert errors["euler"] < 0.05 and errors["2m"] < 0.002, errors


def test_noise_is_the_same_in_every_precision_and_for_lists() -> None:
    cpu = torch.device("cpu")

    def draw(dtype: torch.dtype) -> Tensor:
        return draw_noise(SHAPE, torch.Generator().manual_seed(3), cpu, dtype)

    assert torch.equal(draw(torch.float32).to(torch.float16), draw(torch.float16))
    assert torch.equal(draw(torch.float32).to(torch.bfloat16), draw(torch.bfloat16))
    listed = draw_noise(SHAPE, [torch.Generator().manual_seed(seed) for seed in (3, 4)], cpu, torch.float32)
    alone = draw_noise((1, *SHAPE[1:]), torch.Generator().manual_seed(4), cpu, torch.float32)
    assert torch.equal(listed[1:], alone)
    with pytest.raises(ValueError, match="a list of 2, one for each picture"):
        draw_noise(SHAPE, [torch.Generator()], cpu, torch.float32)


def test_nothing_is_held_between_calls() -> None:
    first, _ = our_trajectory(DPMSolverMultistepScheduler, {}, 5)
    second, _ = our_trajectory(DPMSolverMultistepScheduler, {}, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

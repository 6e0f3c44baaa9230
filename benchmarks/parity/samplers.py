"""Schedulers and samplers: schedules, and every step of a run with a stand-in for the UNet."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.parity.layers import Layer
from benchmarks.parity.measure import DTYPES, FLOAT32, Measured, Result, error_of, name_of
from kolors_core.sampling import randn_latents
from kolors_core.schedule import Schedule, Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

SHAPE = (2, 4, 6, 5)
KARRAS = {"use_karras_sigmas": True}
SOLVERS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "Euler": (EulerDiscreteScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "DPM++ 2M Karras": (DPMSolverMultistepScheduler, KARRAS),
    "SDE-DPM++ 2M Karras": (DPMSolverMultistepScheduler, KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
}
STEPS = 25
LEFT_OUT = {
    name_of(dtype): "the reference's schedulers always compute in float32"
    for dtype in DTYPES
    if dtype != torch.float32
}


def predict(latents: Tensor, timestep: float) -> Tensor:
    """A stand-in for the UNet: not linear, and it depends on the timestep."""
    return torch.tanh(latents.roll(1, dims=-1) * 0.8 + latents * 0.3) + 1e-3 * float(timestep) * torch.sin(
        latents
    )


def our_denoise(schedule: Schedule) -> Callable[[Tensor, float], Tensor]:
    """What it says of the clean latents."""

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return x - sigma * predict(x / (sigma**2 + 1) ** 0.5, schedule.timestep(sigma))

    return denoise


def reference_trajectory(
    kind: type[Scheduler], config: Mapping[str, Any], steps: int
) -> tuple[list[Tensor], Tensor]:
    """The reference's latents after each step, and the generator's state at the end."""
    theirs = getattr(diffusers, kind.__name__).from_config(config)
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * theirs.init_noise_sigma
    trajectory = []
    for timestep in theirs.timesteps:
        noise = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(noise, timestep, latents, generator=generator, return_dict=False)[0]
        trajectory.append(latents)
    return trajectory, generator.get_state()


def our_trajectory(
    kind: type[Scheduler], config: Mapping[str, Any], steps: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """Ours likewise, with the same noise in every dtype."""
    scheduler = kind.from_config(config)
    schedule = scheduler.schedule(steps)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return randn_latents(SHAPE, generator, torch.device("cpu"), torch.float32).to(dtype)

    trajectory = []

    def on_step(i: int, x: Tensor) -> Tensor:
        trajectory.append(x / scheduler.latent_scale(schedule.sigmas[i + 1].item()))
        return x

    scheduler.sampler(schedule, noise)(
        our_denoise(schedule), noise() * schedule.init_noise_sigma, schedule.sigmas, on_step
    )
    return trajectory, generator.get_state()


def measure_samplers(config: Mapping[str, Any]) -> Iterator[Result]:
    """Each in float32, which the reference's schedulers always compute in; float64 is ours, therefore."""
    shared = {key: value for key, value in config.items() if not key.startswith("_")}
    for label, (kind, changes) in SOLVERS.items():
        public = shared | changes
        theirs = getattr(diffusers, kind.__name__).from_config(public)
        theirs.set_timesteps(STEPS)
        schedule = kind.from_config(public).schedule(STEPS)
        runs = our_trajectory(kind, public, STEPS)[0], reference_trajectory(kind, public, STEPS)[0]
        exact = our_trajectory(kind, public, STEPS, torch.float64)[0]
        layers = [
            Layer.of(f"step {i}", f"step {i}", *latents)
            for i, latents in enumerate(zip(*runs, exact, strict=True), 1)
        ]
        errors = [
            error_of("timesteps", schedule.timesteps, theirs.timesteps, schedule.timesteps),
            error_of("sigmas", schedule.sigmas, theirs.sigmas, schedule.sigmas),
            error_of("latents", runs[0][-1], runs[1][-1], exact[-1]),
        ]
        measured = Measured.of(label, "float32", FLOAT32, errors, layers)
        yield Result(name=label, weights="–", measured=[measured], left_out=LEFT_OUT, note="", unit="step")

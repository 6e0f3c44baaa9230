"""Schedulers and samplers: schedules, and every step of a run with a stand-in for the UNet."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.parity.layers import Layer
from benchmarks.parity.measure import DTYPES, FLOAT32, Measured, Result, error_of, name_of
from kolors_core.sampling import Sampler, randn_latents
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


@dataclass(frozen=True)
class Run:
    """One run: the latents before each evaluation of the UNet and at the end, and the generator's last state.

    A sampler of two evaluations a step has the latents within the steps, too.
    """

    latents: list[Tensor]
    state: Tensor


def reference_run(theirs: Any, dtype: torch.dtype = torch.float32, first: int = 0) -> Run:
    """The run of a scheduler of the reference after `set_timesteps`, from one of its timesteps on."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator).to(dtype) * float(theirs.init_noise_sigma)
    given = {"generator": generator} if "generator" in theirs.step.__code__.co_varnames else {}
    trajectory = [latents]
    if first > 0:
        theirs.set_begin_index(first)
    for timestep in theirs.timesteps[first:]:
        noise = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(noise, timestep, latents, return_dict=False, **given)[0]
        trajectory.append(latents)
    return Run(trajectory, generator.get_state())


def our_run(
    sampler: Sampler,
    theirs: Any,
    dtype: torch.dtype = torch.float32,
    first: int = 0,
    stochastic: bool = False,
) -> Run:
    """Our sampler's run on the timesteps and sigmas of a scheduler of the reference, latents at its scale."""
    generator = torch.Generator().manual_seed(0)
    sigmas, unit_variance = reference_sigmas(theirs)
    timesteps = iter(theirs.timesteps[first:].tolist())
    trajectory = []

    def noise() -> Tensor:
        return torch.randn(SHAPE, generator=generator).to(dtype)

    def scale(sigma: float) -> float:
        return (sigma**2 + 1) ** 0.5 if unit_variance else 1

    def denoise(x: Tensor, sigma: float) -> Tensor:
        trajectory.append(x / scale(sigma))
        return x - sigma * predict(x / (sigma**2 + 1) ** 0.5, next(timesteps))

    x = noise() * float(theirs.init_noise_sigma) * scale(sigmas[first])
    sampler = partial(sampler, noise=noise) if stochastic else sampler
    trajectory.append(sampler(denoise, x, sigmas[first:]) / scale(sigmas[-1]))
    return Run(trajectory, generator.get_state())


def reference_sigmas(theirs: Any) -> tuple[list[float], bool]:
    """The n + 1 sigmas of a run of the reference, and whether its latents have variance 1."""
    kind = type(theirs).__name__
    if kind == "PNDMScheduler":  # which names timesteps only
        alphas = theirs.alphas_cumprod.double()[torch.tensor(theirs._timesteps[::-1].astype("int64"))]
        alphas = torch.cat([alphas, theirs.final_alpha_cumprod.double()[None]])
        return ((1 - alphas) / alphas).sqrt().tolist(), True
    repeats = kind in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler")  # one for each evaluation
    sigmas = torch.unique_consecutive(theirs.sigmas) if repeats else theirs.sigmas
    return sigmas.tolist(), not repeats and kind not in ("LMSDiscreteScheduler", "EulerDiscreteScheduler")


def use_float64(theirs: Any) -> None:
    """Let a scheduler of the reference compute in float64, after `set_timesteps`."""
    for name in ("sigmas", "alphas_cumprod", "final_alpha_cumprod"):
        if hasattr(theirs, name):
            setattr(theirs, name, getattr(theirs, name).double())
    if hasattr(theirs, "sigmas_interpol"):
        sigmas = torch.unique_consecutive(theirs.sigmas)
        middle = (sigmas * sigmas.roll(1)).sqrt()
        theirs.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])


def reference_trajectory(
    kind: type[Scheduler], config: Mapping[str, Any], steps: int
) -> tuple[list[Tensor], Tensor]:
    """The reference's latents after each step, and the generator's state at the end."""
    theirs = getattr(diffusers, kind.__name__).from_config(config)
    theirs.set_timesteps(steps)
    run = reference_run(theirs)
    return run.latents[1:], run.state


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

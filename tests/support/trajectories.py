"""Runs of a reference's scheduler, and of our samplers on its numbers: same noise, same stand-in UNet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, predict
from kolors_core.sampling import Denoiser, Sampler
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import FLOAT32, relative_error

KOLORS = KOLORS_SCHEDULER | {"clip_sample": False}  # some of the classes clip by default
Predict = Callable[[Tensor, float], Tensor]
Run = tuple[list[Tensor], Tensor]  # the latents after each step, and the generator's state at the end


def randn(generator: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=generator)


def training_sigmas(theirs: Any) -> Tensor:
    return ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5


def run_sigmas(theirs: Any, end: float = 0.0) -> list[float]:
    """The run's sigmas, once each; the scheduler's own where it has them, else of its timesteps and `end`."""
    if hasattr(theirs, "sigmas"):
        return theirs.sigmas.double().unique_consecutive().tolist()
    return [*training_sigmas(theirs)[theirs.timesteps].tolist(), end]


def stand_in(timesteps: Tensor, predict: Predict = predict) -> Denoiser:
    """`denoise` of a stand-in for the UNet; timesteps: of each evaluation of a run, in order."""
    left = iter(timesteps.tolist())
    return lambda x, sigma: x - sigma * predict(x / (sigma**2 + 1) ** 0.5, next(left))


def reference_run(theirs: Any, steps: int, *, predict: Predict = predict, **arguments: Any) -> Run:
    """arguments: of `step`."""
    theirs.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = randn(generator) * theirs.init_noise_sigma
    trajectory = []
    for timestep in theirs.timesteps:
        noise = predict(theirs.scale_model_input(latents, timestep), timestep)
        latents = theirs.step(noise, timestep, latents, generator=generator, **arguments).prev_sample
        trajectory.append(latents)
    if theirs.order == 2:  # two evaluations a step, but for the last
        trajectory = [*trajectory[1::2], trajectory[-1]]
    return trajectory, generator.get_state()


def our_run(
    sampler: Sampler, theirs: Any, denoise: Denoiser, /, end: float = 0.0,
    dtype: torch.dtype = torch.float32, **options: Any
) -> Run:  # fmt: skip
    """On the numbers that the reference's scheduler has set; latents scaled as it scales them."""
    sigmas = run_sigmas(theirs, end)
    has_variance_one = not hasattr(theirs, "sigmas")
    scales = [(sigma**2 + 1) ** 0.5 if has_variance_one else 1.0 for sigma in sigmas]
    generator = torch.Generator().manual_seed(0)
    noise = lambda: randn(generator).to(dtype)  # noqa: E731
    start = noise() * (scales[0] if has_variance_one else theirs.init_noise_sigma)
    trajectory = []

    def on_step(i: int, x: Tensor) -> Tensor:
        trajectory.append(x / scales[i + 1])
        return x

    sampler(denoise, start, sigmas, on_step, noise=noise, **options)
    return trajectory, generator.get_state()


def check_equal(ours: Run, theirs: Run, steps: int, bound: float = FLOAT32) -> None:
    assert len(ours[0]) == len(theirs[0]) == steps
    for i, (mine, other) in enumerate(zip(ours[0], theirs[0], strict=True)):
        assert relative_error(mine, other) < bound, f"step {i} of {steps}"
    assert torch.equal(ours[1], theirs[1]), "the generator must be left where the reference leaves it"

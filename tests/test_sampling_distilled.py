"""Samplers of distilled models against the reference's schedulers, and with exact models."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from benchmarks.parity.samplers import predict
from kolors_core.sampling import Denoiser, Sampler, euler
from kolors_core.sampling_distilled import boundary_scalings, lcm, lower_sigma, tcd
from kolors_core.sigmas import karras
from tests.support.small import relative_error
from tests.support.trajectories import (
    KOLORS,
    Run,
    check_equal,
    our_run,
    reference_run,
    stand_in,
    training_sigmas,
)

pytestmark = pytest.mark.numerical
# With "epsilon" the stand-in's clean latents grow with sigma, and rounding doubles in every step. With
# "sample", a step from sigma 29 to latents below 1 rounds to 8e-6 in float32, so that ours are in float64.
STEPS = {"epsilon": [1, 2, 4, 5, 8, 10, 25], "sample": [1, 2, 4, 5, 8, 10, 25, 50]}


def clean(latents: Tensor, timestep: float) -> Tensor:
    return torch.tanh(predict(latents, timestep))


def reference(theirs: Any, steps: int, **arguments: Any) -> Run:
    predicts_noise = theirs.config.prediction_type == "epsilon"
    return reference_run(theirs, steps, predict=predict if predicts_noise else clean, **arguments)


def ours(sampler: Sampler, theirs: Any, **options: Any) -> Run:
    dtype = torch.float32 if theirs.config.prediction_type == "epsilon" else torch.float64
    return our_run(sampler, theirs, model(theirs), dtype=dtype, **options)


def model(theirs: Any) -> Denoiser:
    if theirs.config.prediction_type == "epsilon":
        return stand_in(theirs.timesteps)
    left = iter(theirs.timesteps.tolist())
    return lambda x, sigma: clean(x / (sigma**2 + 1) ** 0.5, next(left))


def timestep_of(sigma: float, theirs: Any) -> int:
    return int((training_sigmas(theirs) - sigma).abs().argmin())


@pytest.mark.parametrize("prediction", STEPS)
@pytest.mark.parametrize("scaling", [10.0, 0.01])
def test_lcm(scaling: float, prediction: str) -> None:
    """It draws in every step but the last; the released models' scaling leaves c_skip below 1e-5."""
    theirs = diffusers.LCMScheduler.from_config(KOLORS, timestep_scaling=scaling, prediction_type=prediction)
    scalings = lambda sigma: boundary_scalings(timestep_of(sigma, theirs), scaling)  # noqa: E731
    for steps in STEPS[prediction]:
        expected = reference(theirs, steps)
        check_equal(ours(lcm, theirs, scalings=scalings), expected, steps)
        if scaling < 1:
            without, _ = ours(lcm, theirs)
            assert relative_error(without[-1], expected[0][-1]) > 1e-4


def test_boundary_scalings() -> None:
    assert boundary_scalings(0) == (1.0, 0.0)
    theirs = diffusers.LCMScheduler.from_config(KOLORS)
    for timestep in (1, 21, 1099):
        expected = theirs.get_scalings_for_boundary_condition_discrete(timestep)
        assert boundary_scalings(timestep) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("prediction", STEPS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_tcd(eta: float, prediction: str) -> None:
    """It draws in every step but the last if eta is not 0, and ends at the sigma of timestep 0."""
    theirs = diffusers.TCDScheduler.from_config(KOLORS, prediction_type=prediction)
    table = training_sigmas(theirs)
    lower, other = (
        partial(lower_sigma, training_sigmas=table, eta=value) for value in (eta, abs(eta - 0.05))
    )
    end = table[0].item()
    for steps in STEPS[prediction]:
        expected = reference(theirs, steps, eta=eta)
        check_equal(ours(tcd, theirs, end=end, lower=lower), expected, steps)
        if steps > 1:
            wrong, _ = ours(tcd, theirs, end=end, lower=other)
            assert relative_error(wrong[-2], expected[0][-2]) > 1e-3


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.3, 0.45, 0.7, 0.9, 1.0])
def test_lower_sigma_rounds_as_the_reference(eta: float) -> None:
    """It computes in float32; in float64 (1 - 0.9) * 10 is below 1."""
    timesteps = torch.arange(1100)
    expected = torch.stack([torch.floor((1 - eta) * timestep).long() for timestep in timesteps])
    found = [lower_sigma(float(timestep), timesteps, eta) for timestep in timesteps]
    assert found == expected.tolist()
    assert eta != 0.9 or found[10] == 1 != math.floor((1 - eta) * 10)


def test_tcd_without_noise_is_euler() -> None:
    sigmas = karras(0.03, 29.0, 8)
    x = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(x / sigma)

    def no_noise() -> Tensor:
        raise AssertionError("noise was drawn")

    assert torch.equal(tcd(denoise, x, sigmas, noise=no_noise, lower=lambda s: s), euler(denoise, x, sigmas))


@pytest.mark.parametrize("eta", [None, 0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 4, 8])
def test_an_exact_model_keeps_the_distribution(steps: int, eta: float | None) -> None:
    """Of data N(0, 0.25), for which the end of the trajectory is known, any number of steps is exact.

    LCM's model returns the end at sigma 0, TCD's the x0 whose straight line meets the trajectory where the
    step ends. Of 20,000 numbers, whose own variance scatters by 1%.
    """
    variance, table = 0.25, torch.linspace(0.03, 29.0, 500, dtype=torch.float64)
    sigmas = [table[i].item() for i in torch.linspace(499, 0, steps + 1).long()]
    generator = torch.Generator().manual_seed(0)
    lower = partial(lower_sigma, training_sigmas=table, eta=eta or 0.0)

    def noise() -> Tensor:
        return torch.randn(20_000, generator=generator, dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        end = 0.0 if eta is None else lower(sigmas[sigmas.index(sigma) + 1])
        ratio = math.sqrt((variance + end**2) / (variance + sigma**2))
        return x * (ratio - end / sigma) / (1 - end / sigma)

    def sample(noise: Callable[[], Tensor]) -> float:
        start = math.sqrt(sigmas[0] ** 2 + variance) * noise()
        run = partial(lcm, denoise) if eta is None else partial(tcd, denoise, lower=lower)
        seen = []
        run(start, sigmas, lambda i, x: (seen.append(x), x)[1], noise=noise)
        assert len(seen) == steps
        expected = [sigma**2 + variance for sigma in sigmas[1:]]
        errors = [abs(x.var().item() / e - 1) for x, e in zip(seen, expected, strict=True)]
        return max(errors)

    assert sample(noise) < 0.04
    assert sample(lambda: 1.1 * noise()) > 0.04, "the test must see too much noise"

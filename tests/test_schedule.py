"""Schedules: equal to the reference's to the last bit, for all spacings and step counts."""

import math
from itertools import product

import diffusers
import mpmath
import numpy as np
import pytest
import torch
from diffusers.schedulers import AysSchedules

from kolors_core.schedule import Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.sigmas import (
    AYS_SD15,
    AYS_SDXL,
    AYS_TINY,
    align_your_steps,
    beta_quantile,
    exponential,
    polyexponential,
    sigma_to_timestep,
    simple,
    time_to_sigma,
)
from tests.support.reference_folder import KOLORS_SCHEDULER

pytestmark = pytest.mark.numerical

MODEL_SPECS = {
    EulerDiscreteScheduler: diffusers.EulerDiscreteScheduler,
    DPMSolverMultistepScheduler: diffusers.DPMSolverMultistepScheduler,
}
STEPS = (1, 2, 3, 4, 7, 10, 14, 15, 25, 30, 49, 50, 100, 137, 549)


def both(kind: type[Scheduler], **changes: object) -> tuple[Scheduler, object]:
    theirs = MODEL_SPECS[kind](**(KOLORS_SCHEDULER | changes))
    return kind.from_config(theirs.config), theirs


@pytest.mark.parametrize("kind", MODEL_SPECS)
@pytest.mark.parametrize(
    ("spacing", "karras", "final", "betas"),
    list(
        product(
            ("leading", "linspace", "trailing"),
            (False, True),
            ("zero", "sigma_min"),
            ("scaled_linear", "linear"),
        )
    ),
)
def test_every_number_is_the_references(
    kind: type[Scheduler], spacing: str, karras: bool, final: str, betas: str
) -> None:
    ours, theirs = both(
        kind, timestep_spacing=spacing, use_karras_sigmas=karras, final_sigmas_type=final, beta_schedule=betas
    )
    compared = 0
    for steps in STEPS:
        theirs.set_timesteps(steps)
        schedule = ours.schedule(steps)
        assert len(schedule.timesteps) == steps
        if spacing == "trailing" and steps in (15, 30):
            continue  # there the reference's numpy.arange goes one timestep too far, to -1
        compared += 1
        assert torch.equal(schedule.sigmas, theirs.sigmas.double()), steps
        assert torch.equal(schedule.timesteps, theirs.timesteps.double()), steps
        if kind is EulerDiscreteScheduler:
            assert schedule.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma), rel=1e-7)
    assert compared >= len(STEPS) - 2


def test_the_released_numbers() -> None:
    euler = EulerDiscreteScheduler()
    assert euler.training_sigmas()[[0, -1]].tolist() == pytest.approx([0.02917, 29.061], rel=1e-3)
    for steps, first, sigma, scale in ((50, 1079, 25.2814, 25.3011), (25, 1057, 21.7838, 21.8068)):
        schedule = euler.schedule(steps)
        assert schedule.timesteps[0] == first
        assert schedule.sigmas[0] == pytest.approx(sigma, abs=1e-4)
        assert schedule.init_noise_sigma == pytest.approx(scale, abs=1e-4)
    karras = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(25)
    assert karras.timesteps[:2].tolist() == [1099, 1072]


@pytest.mark.parametrize("kind", MODEL_SPECS)
def test_own_timesteps(kind: type[Scheduler]) -> None:
    ours, theirs = both(kind)
    own = [1099, 900, 700, 333, 12, 0]
    theirs.set_timesteps(timesteps=own)
    schedule = ours.schedule(timesteps=own)
    assert torch.equal(schedule.sigmas, theirs.sigmas.double())
    assert torch.equal(schedule.timesteps, theirs.timesteps.double())


@pytest.mark.parametrize("karras", [False, True])
def test_own_sigmas(karras: bool) -> None:
    ours, theirs = both(EulerDiscreteScheduler, use_karras_sigmas=karras)
    own = [29.0, 11.5, 3.25, 0.7, 0.03, 0.0]
    theirs.set_timesteps(sigmas=own)
    schedule = ours.schedule(sigmas=own)
    assert torch.equal(schedule.sigmas, theirs.sigmas.double())
    assert torch.equal(schedule.timesteps, theirs.timesteps.double())
    rounded = DPMSolverMultistepScheduler().schedule(sigmas=own)  # the reference's takes no sigmas
    assert torch.equal(rounded.timesteps, schedule.timesteps.round())


def test_the_quantile_of_a_beta_distribution() -> None:
    """Compared with 30 digits: bisection on the incomplete beta function."""
    mpmath.mp.dps = 30
    shares = [1e-9, 0.02, 0.3, 0.4999, 0.5, 0.7, 0.999]
    for a, b in ((0.6, 0.6), (0.3, 3.0), (1.0, 1.0)):
        for share, got in zip(shares, beta_quantile(np.array(shares), a, b), strict=True):
            low, high = mpmath.mpf(0), mpmath.mpf(1)
            for _ in range(70):
                middle = (low + high) / 2
                is_below = mpmath.betainc(a, b, 0, middle, regularized=True) < share
                low, high = (middle, high) if is_below else (low, middle)
            assert abs(got - float(low)) < 1e-15
        assert beta_quantile(np.array([0.0, 1.0]), a, b).tolist() == [0, 1]


def test_families_of_sigmas_beside_the_references() -> None:
    table = EulerDiscreteScheduler().training_sigmas()
    low, high = table[0].item(), table[-1].item()
    assert np.allclose(polyexponential(low, high, 9), exponential(low, high, 9), rtol=1e-12)
    ramp = [(1 - i / 4) ** 2 for i in range(5)]  # as k-diffusion writes it
    written_out = [math.exp(r * (math.log(high) - math.log(low)) + math.log(low)) for r in ramp]
    assert np.allclose(polyexponential(low, high, 5, rho=2.0), written_out, rtol=1e-12)
    assert simple(table, 3).tolist() == [table[-(1 + int(i * 1100 / 3))].item() for i in range(3)]
    for published in (AYS_SD15, AYS_SDXL, AYS_TINY):
        assert np.allclose(align_your_steps(10, published), published[:-1], rtol=1e-12)
        between = align_your_steps(20, published)
        assert len(between) == 20 and between[1] == pytest.approx(math.sqrt(published[0] * published[1]))
    schedule = EulerDiscreteScheduler().schedule(sigmas=[*align_your_steps(7), 0.0])
    assert len(schedule.timesteps) == 7
    assert AYS_SDXL[:-1] == tuple(AysSchedules["StableDiffusionXLSigmas"][:-1])
    assert AYS_SD15[:-1] == tuple(AysSchedules["StableDiffusionSigmas"][:-1])


def test_pure_noise_has_a_finite_sigma() -> None:
    assert time_to_sigma(torch.tensor([1.0, 0.5, 0.0])).tolist() == [2**24 - 1, 1.0, 0.0]
    assert EulerDiscreteScheduler(rescale_betas_zero_snr=True).training_sigmas()[-1] == 4096


def test_timestep_of_a_sigma() -> None:
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    schedule = scheduler.schedule(10)
    for sigma, timestep in zip(schedule.sigmas.tolist(), schedule.timesteps.tolist(), strict=False):
        assert schedule.timestep(sigma) == timestep
    table = scheduler.training_sigmas()
    assert sigma_to_timestep(table[700].item(), table) == pytest.approx(700, abs=1e-2)
    assert 699 < schedule.timestep((table[699] * table[700]).sqrt().item()) < 700
    assert (sigma_to_timestep(1e-9, table), sigma_to_timestep(1e9, table)) == (0, 1099)
    whole = DPMSolverMultistepScheduler().schedule(10).timestep(table[700].item() * 1.0001)
    assert whole == 700


@pytest.mark.parametrize(("end", "kept"), [(0.5, 25), (0.8, 40), (1.0, 50)])
def test_until_keeps_the_first_part(end: float, kept: int) -> None:
    """As the reference: timesteps at or above round(1100 - end * 1100)."""
    schedule = EulerDiscreteScheduler().schedule(50)
    part = schedule.before(end)
    assert len(part.timesteps) == kept == int((schedule.timesteps >= round(1100 - end * 1100)).sum())
    assert torch.equal(part.sigmas, schedule.sigmas[: kept + 1])
    assert part.init_noise_sigma == schedule.init_noise_sigma


@pytest.mark.exact
def test_from_config_takes_the_published_and_the_siblings_fields() -> None:
    published = KOLORS_SCHEDULER | {
        "_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.18.0.dev0", "clip_sample": False,
        "clip_sample_range": 1.0, "dynamic_thresholding_ratio": 0.995, "interpolation_type": "linear",
        "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "sample_max_value": 1.0,
        "set_alpha_to_one": False, "skip_prk_steps": True, "thresholding": False, "trained_betas": None,
        "use_karras_sigmas": False,
    }  # fmt: skip
    euler = EulerDiscreteScheduler.from_config(published)
    assert euler == EulerDiscreteScheduler()
    solver = DPMSolverMultistepScheduler.from_config(euler.config, use_karras_sigmas=True)
    assert solver.use_karras_sigmas and solver.config.num_train_timesteps == 1100
    assert EulerDiscreteScheduler.from_config(solver.config, use_karras_sigmas=False) == euler
    reference = diffusers.DPMSolverMultistepScheduler.from_config(solver.to_public())
    assert reference.config.num_train_timesteps == 1100 and reference.config.use_karras_sigmas
    assert solver.describe() == "DPMSolverMultistepScheduler(use_karras_sigmas=True)"


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"prediction_type": "velocity"}, {}, "prediction_type must be one of 'epsilon', 'v_prediction'"),
        ({"thresholding": True}, {}, "thresholding is True"),
        ({"solver_order": 4}, {}, "solver_order must be a whole number from 1 to 3, got 4"),
        ({}, {"karras": True}, "has no field 'karras'"),
        ({"beta_end": 2.0}, {}, "beta_end < 1 does not hold"),
        ({"num_train_timesteps": -5}, {}, "num_train_timesteps must be a whole number from 2"),
        ({"timestep_spacing": "odd"}, {}, "timestep_spacing must be one of"),
        ({"steps_offset": 1.5}, {}, "steps_offset must be a whole number from 0 to 1099, got 1.5"),
        ({"use_karras_sigmas": "yes"}, {}, "use_karras_sigmas must be one of False, True, got 'yes'"),
        ({"beta_schedule": "cosine"}, {}, "beta_schedule must be one of"),
        ({"algorithm_type": "dpm"}, {}, "algorithm_type must be one of"),
    ],
)  # fmt: skip
@pytest.mark.exact
def test_what_would_change_the_result_is_refused(config: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DPMSolverMultistepScheduler.from_config(config, **changes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of"), ({"steps": 3, "sigmas": [2.0, 1.0]}, "exactly one of"),
        ({"steps": 0}, "from 1 to 1099, got 0"), ({"steps": -3}, "got -3"), ({"steps": 1100}, "got 1100"),
        ({"steps": 2.5}, "got 2.5"), ({"steps": True}, "got True"),
        ({"timesteps": []}, "must fall strictly"), ({"timesteps": [3, 3]}, "must fall strictly"),
        ({"timesteps": [1100, 3]}, "within 0.0 to 1099"), ({"timesteps": [3, -1]}, "within 0.0 to 1099"),
        ({"sigmas": [1.0, 2.0]}, "must fall strictly"), ({"sigmas": [1.0]}, "at least two"),
        ({"sigmas": [float("nan"), 0.0]}, "must fall strictly"),
    ],
)  # fmt: skip
@pytest.mark.exact
def test_bad_runs_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EulerDiscreteScheduler().schedule(**given)


def test_karras_sets_its_own_timesteps() -> None:
    with pytest.raises(ValueError, match="use_karras_sigmas"):
        EulerDiscreteScheduler(use_karras_sigmas=True).schedule(timesteps=[5, 3])
    with pytest.raises(ValueError, match="leaves none"):
        EulerDiscreteScheduler().schedule(5).before(0.001)
    with pytest.raises(ValueError, match="above 0 and at most 1, got 1.5"):
        EulerDiscreteScheduler().schedule(5).before(1.5)

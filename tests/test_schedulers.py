"""Schedulers of all names: their numbers equal to the reference's to the last bit, and their fields."""

import json
import math
from dataclasses import fields
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
import torch

from kolors_core.schedulers import SCHEDULERS
from kolors_core.sigmas import time_to_sigma
from kolors_core.targets import TARGETS
from tests.support.reference_schedulers import (
    parameters,
    reference_scheduler,
    run_numbers,
    use_our_quantile,
)

pytestmark = pytest.mark.numerical

MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, FLOW_MATCH = "UniPCMultistepScheduler", "FlowMatchEulerDiscreteScheduler"
STEPS = (1, 7, 25, 50)
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SPACINGS: tuple[dict[str, Any], ...] = (
    {}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min"},
)  # fmt: skip
FAMILIES: tuple[dict[str, Any], ...] = (
    {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True},
    {"use_lu_lambdas": True}, FLOW,
)  # fmt: skip
SINGLE: tuple[dict[str, Any], ...] = (
    *({"beta_schedule": name} for name in ("linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid")),
    {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
    {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True, "lambda_min_clipped": -5.1},
    {"trained_betas": np.linspace(0.001, 0.02, 1100).tolist()}, {"rescale_betas_zero_snr": True},
    {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"rescale_betas_zero_snr": True, "use_karras_sigmas": True},
    {"set_alpha_to_one": True}, {"steps_offset": 0}, {"sigma_min": 0.1, "sigma_max": 20.0},
    {"sigma_min": 0.1, "sigma_max": 20.0, "use_karras_sigmas": True}, {"lambda_min_clipped": -1.0},
    {"lambda_min_clipped": -1.0, "timestep_spacing": "trailing"}, FLOW | {"flow_shift": 3.0},
    {"shift": 3.0}, {"shift": 3.0, "use_karras_sigmas": True}, FLOW | {"use_karras_sigmas": True},
    {"original_inference_steps": 100}, {"sigma_schedule": "exponential"}, {"num_train_timesteps": 1000},
)  # fmt: skip


def variants(name: str) -> list[dict[str, Any]]:
    """Combinations of fields that the class of the reference has and accepts."""
    known = parameters(name)
    crossed = [spacing | family for spacing, family in product(SPACINGS, FAMILIES)]
    found = [one for one in (*crossed, *SINGLE) if one.keys() <= known.keys()]
    return [one for one in found if is_accepted(name, one)]


def is_accepted(name: str, given: dict[str, Any]) -> bool:
    """Only UniPC takes times of a flow from Karras' sigmas; others of the reference compute nonsense."""
    if given.get("use_flow_sigmas") and given.get("use_karras_sigmas"):
        return name == "UniPCMultistepScheduler"
    schedules = {"DDPMScheduler": ("laplace", "sigmoid"), "HeunDiscreteScheduler": ("exp",)}
    special = given.get("beta_schedule") in ("laplace", "sigmoid", "exp")
    return not special or given["beta_schedule"] in schedules.get(name, ())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_number_is_the_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_our_quantile(monkeypatch)
    found = variants(name)
    assert len(found) >= (2 if name.startswith("EDM") else 3)
    for given in found:
        ours, theirs = SCHEDULERS[name].from_config({}, **given), reference_scheduler(name, **given)
        for steps in STEPS:
            theirs.set_timesteps(steps)
            schedule, (sigmas, times) = ours.schedule(steps), run_numbers(theirs)
            if given.get("use_flow_sigmas") or name.startswith("Flow"):
                sigmas = time_to_sigma(sigmas)
            assert torch.equal(schedule.sigmas, sigmas), (given, steps)
            assert torch.equal(schedule.timesteps, times), (given, steps)
            scale = float(getattr(theirs, "init_noise_sigma", 1.0))
            assert scale in (1.0, schedule.init_noise_sigma), (given, steps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_given_timesteps_and_sigmas(name: str) -> None:
    ours, own = SCHEDULERS[name](), [1099, 900, 700, 333, 12, 1]
    theirs = reference_scheduler(name)
    takes = theirs.set_timesteps.__code__.co_varnames[: theirs.set_timesteps.__code__.co_argcount]
    if "timesteps" in takes and not name.startswith("Flow"):  # where the reference shifts the sigmas alone
        theirs.set_timesteps(timesteps=own)
        sigmas, times = run_numbers(theirs)
        schedule = ours.schedule(timesteps=own)
        assert torch.equal(schedule.sigmas, sigmas) and torch.equal(schedule.timesteps, times)
    elif not name.startswith("EDM"):
        assert ours.schedule(timesteps=own).timesteps.tolist() == own
    given = [20.0, 3.0, 0.5, 0.0]
    assert ours.schedule(sigmas=given).sigmas.tolist() == given


@pytest.mark.parametrize("name", SCHEDULERS)
def test_fields_are_the_references(name: str) -> None:
    kind, theirs = SCHEDULERS[name], parameters(name)
    ours = {field.name: field.default for field in fields(kind)}
    assert ours.keys() | kind.fixed.keys() == theirs.keys()
    assert not ours.keys() & kind.fixed.keys()
    released = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing"}
    released |= {"steps_offset", "set_alpha_to_one"}
    for field, value in ours.items():
        assert field in released or value == theirs[field], field
    public = json.loads(json.dumps(kind().to_public()))
    assert public.pop("_class_name") == name and public.keys() == theirs.keys()
    made = reference_scheduler(name, **public)
    for steps in (5, 25):
        made.set_timesteps(steps)
        sigmas = run_numbers(made)[0]
        sigmas = time_to_sigma(sigmas) if name.startswith("Flow") else sigmas
        assert torch.equal(kind().schedule(steps).sigmas, sigmas)


@pytest.mark.exact
def test_from_any_config_to_any_class() -> None:
    """Fields that a class lacks are ignored in a config, in theirs and in ours."""
    special = {"num_train_timesteps": 1000, "beta_end": 0.012, "use_karras_sigmas": True}
    for one, other in permutations(SCHEDULERS, 2):
        known = {field.name for field in fields(SCHEDULERS[one])}
        made = SCHEDULERS[one](**{name: value for name, value in special.items() if name in known})
        ours = SCHEDULERS[other].from_config(made.config)
        assert ours == SCHEDULERS[other].from_config(made.to_public())
        kept = known & {field.name for field in fields(ours)} & special.keys()
        assert all(getattr(ours, name) == special[name] for name in kept), (one, other)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.exact
def test_the_references_config_is_taken(name: str) -> None:
    """Of each class with the released fields; with its own defaults, what clips is refused."""
    kind = SCHEDULERS[name]
    theirs = reference_scheduler(name)
    assert kind.from_config(theirs.config) == kind()
    for field, values in kind.fixed.items():
        assert all(kind.from_config({}, **{field: value}) == kind() for value in values if value is not ...)
        if ... not in values:
            for value in ("odd", np.ones(3)):
                with pytest.raises(ValueError, match=f"{name}: {field} is .*, expected"):
                    kind.from_config({field: value})


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.exact
def test_misspelt_and_foreign_fields(name: str) -> None:
    kind = SCHEDULERS[name]
    for make in (lambda **given: kind.from_config(given), lambda **given: kind.from_config({}, **given)):
        with pytest.raises(ValueError, match="'num_train_timestep', did you mean num_train_timesteps?"):
            make(num_train_timestep=1000)
        with pytest.raises(ValueError, match=f"{name} has no field 'xyz'; it has .*num_train_timesteps"):
            make(xyz=3)
    others = {field.name for other in SCHEDULERS.values() for field in fields(other)}
    for field in others - {field.name for field in fields(kind)} - kind.fixed.keys():
        assert kind.from_config({field: "other"}) == kind()
        with pytest.raises(ValueError, match=f"{name} has no field '{field}', .*Scheduler has"):
            kind.from_config({}, **{field: "other"})


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, "clip_sample is True, expected False"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps is False, expected True"),
        ("PNDMScheduler", {"prediction_type": "sample"}, "prediction_type must be one of 'epsilon', 'v_"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "prediction_type must be one of"),
        ("EulerDiscreteScheduler", {"beta_schedule": "exp"}, "beta_schedule must be one of"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True},
         "only one of use_karras_sigmas and use_beta_sigmas can be set"),
        (MULTISTEP, {"use_karras_sigmas": True, "use_lu_lambdas": True},
         "only one of use_karras_sigmas and use_lu_lambdas can be set"),
        (MULTISTEP, FLOW | {"use_karras_sigmas": True}, "only one of use_karras_sigmas and"),
        (UNIPC, FLOW | {"use_beta_sigmas": True}, "only one of use_beta_sigmas and use_fl"),
        (MULTISTEP, {"use_flow_sigmas": True}, "use_flow_sigmas needs prediction_type"),
        (MULTISTEP, {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver' needs fin"),
        (SINGLESTEP, {"algorithm_type": "dpmsolver"}, "needs final_sigmas_type 'sigma_min'"),
        (SINGLESTEP, {"algorithm_type": "sde-dpmsolver"}, "algorithm_type must be one of"),
        (MULTISTEP, {"solver_order": 4}, "solver_order must be a whole number from 1 to 3"),
        (MULTISTEP, {"lambda_min_clipped": math.inf}, "lambda_min_clipped must be a number"),
        (MULTISTEP, FLOW | {"flow_shift": 0.0}, "flow_shift must be 1e-10 or more"),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type is 'sde-dpmsolver"),
        (UNIPC, {"shift_terminal": 0.1}, "shift_terminal is 0.1, expected None"),
        (UNIPC, {"disable_corrector": [0]}, r"disable_corrector is \[0\], expected \[\]"),
        ("DDPMScheduler", {"variance_type": "learned"}, "variance_type must be one of"),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2]}, "trained_betas must be num_train"),
        ("EulerDiscreteScheduler", {"sigma_min": 3.0, "sigma_max": 1.0}, "sigma_min must be below sigma_max"),
        ("EDMEulerScheduler", {"sigma_schedule": "beta"}, "sigma_schedule must be one of"),
        (FLOW_MATCH, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "only one of"),
        (FLOW_MATCH, {"invert_sigmas": True}, "invert_sigmas is True, expected False"),
    ],
)  # fmt: skip
@pytest.mark.exact
def test_what_is_not_computed_is_refused(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SCHEDULERS[name].from_config({}, **given)


@pytest.mark.exact
def test_other_names_of_a_value() -> None:
    """The reference's classes take some values of each other, as one of theirs."""
    multistep, unipc = SCHEDULERS[MULTISTEP], SCHEDULERS[UNIPC]
    assert multistep.from_config({"algorithm_type": "deis", "solver_type": "bh1"}) == multistep()
    assert multistep.from_config({"variance_type": "fixed_small", "use_karras_sigmas": None}) == multistep()
    assert unipc.from_config({"solver_type": "logrho"}) == unipc()
    assert SCHEDULERS["DDPMScheduler"].from_config({"variance_type": "fixed_small_log"}).describe() == (
        "DDPMScheduler"
    )


@pytest.mark.exact
def test_bad_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at most original_inference_steps, 50, got 51"):
        SCHEDULERS["LCMScheduler"]().schedule(51)
    with pytest.raises(ValueError, match="no training timesteps"):
        SCHEDULERS["EDMEulerScheduler"]().schedule(timesteps=[3, 2])
    flow = SCHEDULERS[UNIPC].from_config({}, **FLOW)
    with pytest.raises(ValueError, match="timesteps cannot be given with use_flow_sigmas"):
        flow.schedule(timesteps=[3, 2])


def test_a_flow_on_the_sigmas_of_a_diffusion() -> None:
    """The model's time is t = sigma / (1 + sigma) on any sigmas; the reference uses sigma itself as t."""
    kind = SCHEDULERS[MULTISTEP]
    schedule = kind.from_config({}, prediction_type="flow_prediction", use_karras_sigmas=True).schedule(9)
    times = schedule.sigmas[:-1] / (1 + schedule.sigmas[:-1])
    assert (
        torch.equal(schedule.timesteps, (1100 * times).trunc())
        and schedule.target == TARGETS["flow_prediction"]
    )


def test_orders_are_cut_with_the_steps() -> None:
    kind = SCHEDULERS[MULTISTEP]
    schedule = kind.from_config({}, solver_order=3).schedule(10)
    assert schedule.orders == (*[3] * 8, 2, 1)
    assert schedule.before(0.5).orders == (3,) * 5 and schedule.last_steps(0.3).orders == (3, 2, 1)
    assert kind().schedule(15).orders == (2,) * 15
    assert kind.from_config({}, euler_at_final=True).schedule(15).orders == (*[2] * 14, 1)

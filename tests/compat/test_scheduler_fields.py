"""Fields of the reference's schedulers: taken at the values that ours works with, and refused at others."""

import inspect
import math
from typing import Any

import diffusers
import numpy as np
import pytest

from kolors_core import schedulers
from kolors_core.compat.scheduler_fields import Fields
from kolors_core.compat.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from kolors_core.schedule import Scheduler
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.reference_schedulers import parameters

STATEFUL = (EulerDiscreteScheduler, DPMSolverMultistepScheduler)
KINDS = (*STATEFUL, schedulers.EulerDiscreteScheduler, schedulers.DPMSolverMultistepScheduler)
DEFAULTS = {
    name: parameter.default
    for kind in STATEFUL
    for name, parameter in inspect.signature(getattr(diffusers, kind.__name__)).parameters.items()
}  # of the reference's, where those of the released Kolors are ours
FIELDS = DEFAULTS | KOLORS_SCHEDULER
# What another schedule or image would be of, and is not here, of each class.
REFUSED = {
    "EulerDiscreteScheduler": {"interpolation_type": "log_linear", "timestep_type": "continuous"},
    "DPMSolverMultistepScheduler": {
        "use_dynamic_shifting": True, "thresholding": True, "variance_type": "learned",
    },
}  # fmt: skip
UNUSED = {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0, "time_shift_type": "linear"}
SAME = {"solver_type": "bh2", "use_beta_sigmas": None, "use_lu_lambdas": None, "thresholding": None}


def ways(kind: type[Scheduler], name: str, value: Any) -> list[Any]:
    """The ways to give a field; the constructor of a plain class takes its own alone."""
    found = [
        lambda: kind.from_config({**kind().config, name: value}),
        lambda: kind.from_config(kind().config, **{name: value}),
    ]
    return [*found, lambda: kind(**{name: value})] if kind in STATEFUL else found


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_references_is_taken(kind: type[Scheduler]) -> None:
    assert len(FIELDS) > 30
    for name, value in FIELDS.items():
        for make in ways(kind, name, value):
            assert make() == kind(), name
    assert kind.from_config(FIELDS) == kind.from_config(kind().config, **FIELDS) == kind()


@pytest.mark.parametrize("kind", KINDS)
def test_values_without_effect_are_taken(kind: type[Scheduler]) -> None:
    for name, value in (UNUSED | SAME).items():
        own = {**kind._field_values()}
        for make in ways(kind, name, value)[: None if name in own else 1]:  # a change is of the class's own
            assert make() == kind(), name


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_be_another_image_is_refused(kind: type[Scheduler]) -> None:
    for name, value in REFUSED[kind.__name__].items():
        for refused in (value, np.ones(3)):
            for make in ways(kind, name, refused):
                with pytest.raises(ValueError, match=rf"^{kind.__name__}: {name} is .+, expected .+"):
                    make()


def test_an_editor_completes_the_fields_of_all_classes() -> None:
    theirs = {field for name in schedulers.SCHEDULERS for field in parameters(name)}
    assert Fields.__annotations__.keys() == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_a_misspelt_field_names_the_nearest(kind: type[Scheduler]) -> None:
    for wrong, right in (
        ("use_karas_sigmas", "use_karras_sigmas"), ("karras_sigmas", "use_karras_sigmas"),
        ("spacing", "timestep_spacing"), ("final_sigma_type", "final_sigmas_type"),
    ):  # fmt: skip
        for make in ways(kind, wrong, True)[1:]:
            with pytest.raises(ValueError, match=f"has no field '{wrong}', did you mean {right}?"):
                make()
    for make in ways(kind, "xyz", 1):
        with pytest.raises(ValueError, match="has no field 'xyz'; it has .*beta_start"):
            make()


def test_a_field_of_the_other_class_is_none_of_this() -> None:
    """In a config it is ignored, as in the reference; a change is asked for, and would do nothing."""
    config = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=1).config
    for kind in (EulerDiscreteScheduler, schedulers.EulerDiscreteScheduler):
        assert kind.from_config(config) == kind()
        with pytest.raises(ValueError, match="has no field 'solver_order', DPMSolverMultistepScheduler has"):
            kind.from_config(config, solver_order=1)
    with pytest.raises(ValueError, match="'algorithm_type', DPMSolverMultistepScheduler has"):
        EulerDiscreteScheduler(algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_config_has_what_the_references_has(kind: type[Scheduler]) -> None:
    theirs = getattr(diffusers, kind.__name__)(**KOLORS_SCHEDULER, use_karras_sigmas=True).config
    config = kind(use_karras_sigmas=True).config
    assert config == {name: value for name, value in theirs.items() if not name.startswith("_")}
    assert config.prediction_type == config["prediction_type"] == config.get("prediction_type") == "epsilon"
    assert config.get("absent", 3) == 3
    with pytest.raises(AttributeError, match="no field 'absent'"):
        _ = config.absent


def test_one_scheduler_from_anothers_config_as_users_write_it() -> None:
    made = DPMSolverMultistepScheduler.from_config(
        EulerDiscreteScheduler().config, algorithm_type="sde-dpmsolver++", use_karras_sigmas=True
    )
    assert made == DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    assert made.config.lambda_min_clipped == -math.inf and made.config.solver_type == "midpoint"
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(made.config)
    assert {name: theirs.config[name] for name in made.config} == made.config
    assert DPMSolverMultistepScheduler.from_config(theirs.config) == made

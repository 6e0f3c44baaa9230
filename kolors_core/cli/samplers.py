"""Samplers and schedules of the command line: a name -> a class of scheduler and its fields."""

from dataclasses import fields
from typing import Any

from kolors_core.diffusion import FAMILIES
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import SCHEDULERS

Fields = dict[str, Any]
KARRAS: Fields = {"use_karras_sigmas": True}
SCHEDULES: dict[str, Fields] = {
    **{spacing: {"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")},
    "karras": KARRAS, "exponential": {"use_exponential_sigmas": True}, "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
}  # fmt: skip
OWN = "own"  # the checkpoint's scheduler
_SOLVER, _SINGLE = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
# Each sets every field that distinguishes it, since the checkpoint's own scheduler may be any of them.
SAMPLERS: dict[str, tuple[type[Scheduler] | None, Fields]] = {
    name: (SCHEDULERS[kind] if kind else None, given)
    for name, kind, given in (
        ("euler", "EulerDiscreteScheduler", {}),
        ("euler-karras", "EulerDiscreteScheduler", KARRAS),
        ("dpmpp-2m", _SOLVER, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("dpmpp-2m-karras", _SOLVER, KARRAS | {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("dpmpp-2m-sde", _SOLVER, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
        ("dpmpp-2m-sde-karras", _SOLVER, KARRAS | {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
        ("dpmpp-3m", _SOLVER, {"algorithm_type": "dpmsolver++", "solver_order": 3}),
        ("dpmpp-3m-sde", _SOLVER, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("dpmpp-2s", _SINGLE, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("dpmpp-sde", "DPMSolverSDEScheduler", {}),
        ("unipc", "UniPCMultistepScheduler", {}),
        ("deis", "DEISMultistepScheduler", {"algorithm_type": "deis"}),
        ("heun", "HeunDiscreteScheduler", {}),
        ("dpm2", "KDPM2DiscreteScheduler", {}),
        ("dpm2-ancestral", "KDPM2AncestralDiscreteScheduler", {}),
        ("euler-ancestral", "EulerAncestralDiscreteScheduler", {}),
        ("lms", "LMSDiscreteScheduler", {}),
        ("pndm", "PNDMScheduler", {}),
        ("ddim", "DDIMScheduler", {}),
        ("ddpm", "DDPMScheduler", {}),
        ("lcm", "LCMScheduler", {}),
        ("tcd", "TCDScheduler", {}),
        (OWN, "", {}),
    )
}
FEW_STEPS = ("lcm", "tcd")
MANY_STEPS = ("euler", "ddim", "ddpm", "pndm", "lms", OWN)


def default_steps(sampler: str) -> int:
    """Return a sampler's default number of steps."""
    return 4 if sampler in FEW_STEPS else 50 if sampler.startswith(MANY_STEPS) else 25


def choose_scheduler(own: Scheduler, sampler: str, schedule: str | None) -> Scheduler:
    """Build the scheduler of a sampler and a schedule, from the checkpoint's.

    ValueError for a sampler without such a schedule, or of models that predict something else.
    """
    kind, changes = SAMPLERS[sampler]
    if kind is None:
        return own if schedule is None else with_schedule(own, schedule)
    chosen = _changed(kind, own, changes)
    if chosen.target != own.target:
        expected = f"a {type(own).__name__} of {own.prediction_type}"
        raise ValueError(
            f"--sampler {sampler} is of other models, the checkpoint has {expected}: --sampler own"
        )
    return chosen if schedule is None else with_schedule(chosen, schedule)


def with_schedule(scheduler: Scheduler, schedule: str) -> Scheduler:
    """Return the same scheduler with a schedule's fields; ValueError if its class has no such field."""
    return _changed(type(scheduler), scheduler, SCHEDULES[schedule])


def _changed(kind: type[Scheduler], own: Scheduler, changes: Fields) -> Scheduler:
    """Build a scheduler of a class from another's config, with these changes and no other family."""
    off = {field.name: False for field in fields(kind) if FAMILIES.get(field.name) is not None}
    return kind.from_config(own.config, **{**off, **changes})

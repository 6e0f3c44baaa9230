"""Loops of one's own with a scheduler of any name: every step as the reference's class of that name."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import kolors_core
from benchmarks.parity.samplers import SHAPE, predict
from kolors_core import schedulers
from kolors_core.compat.stateful_scheduler import STATEFUL, StatefulScheduler
from tests.support.reference_schedulers import TWICE, reference_scheduler, use_exact_integrals
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical

NAMES = [name for name in schedulers.SCHEDULERS if name != "DPMSolverSDEScheduler"]  # whose noise is a tree's
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "sample", "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
]


Run = tuple[list[Tensor], Tensor]  # the latents after each evaluation, and the generator's last state


def ours(name: str, **fields: Any) -> StatefulScheduler:
    kind: Any = getattr(kolors_core, name)
    return kind(**fields)


def loop(scheduler: Any, steps: int, first: int = 0, keep: Tensor | None = None) -> Run:
    """The latents after each evaluation of the model; keep: a mask of what the loop sets back to 0.3."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    if first and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    scale = getattr(scheduler, "scale_model_input", lambda latents, _: latents)
    draws = {"generator": generator} if "generator" in type(scheduler).step.__code__.co_varnames else {}
    found = []
    for timestep in scheduler.timesteps[first:]:
        output = predict(scale(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, return_dict=False, **draws)[0]
        latents = latents if keep is None else torch.where(keep, torch.full_like(latents, 0.3), latents)
        found.append(latents)
    return found, generator.get_state()


def assert_equal(mine: Run, theirs: Run) -> None:
    for i, pair in enumerate(zip(mine[0], theirs[0], strict=True)):
        assert relative_error(*pair) < FLOAT32, f"evaluation {i}"
    assert torch.equal(mine[1], theirs[1]), "the generator must be left where the reference leaves it"


@pytest.mark.parametrize(("name", "fields"), [*((name, {}) for name in NAMES), *OTHERS], ids=str)
def test_every_step_equals_the_references(
    name: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_integrals(monkeypatch)
    theirs, mine = reference_scheduler(name, **fields), ours(name, **fields)
    for steps in (4, 11):
        assert_equal(loop(mine, steps), loop(theirs, steps))
        assert relative_error(mine.timesteps.double(), theirs.timesteps.double()) < 1e-6
        assert float(mine.init_noise_sigma) == pytest.approx(float(getattr(theirs, "init_noise_sigma", 1.0)))
    assert mine.order == getattr(theirs, "order", 1) and mine.step_index == len(mine.timesteps)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("PNDM", "LMS"))])
def test_from_the_middle_and_with_changed_latents(name: str) -> None:
    """The reference's PNDM begins with the second half of a step, its LMS with weights of a later one."""
    theirs, mine, begin = reference_scheduler(name), ours(name), 4 if name.startswith(TWICE) else 2
    assert_equal(loop(mine, 6, begin), loop(theirs, 6, begin))
    if not name.startswith(TWICE):  # where a step's first half is no result
        keep = torch.arange(SHAPE[-1]) < 2
        assert_equal(loop(mine, 6, keep=keep), loop(theirs, 6, keep=keep))
        assert relative_error(loop(mine, 6)[0][-1], loop(mine, 6, keep=keep)[0][-1]) > 0.01


@pytest.mark.parametrize("name", ["DDIMScheduler", "TCDScheduler"])
def test_eta(name: str) -> None:
    theirs, mine, runs = reference_scheduler(name), ours(name), []
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(SHAPE, generator=generator)
        for timestep in scheduler.timesteps:
            output = predict(latents, timestep)
            latents = scheduler.step(output, timestep, latents, eta=0.6, generator=generator).prev_sample
        runs.append(latents)
    assert relative_error(runs[1], runs[0]) < FLOAT32


@pytest.mark.parametrize("name", schedulers.SCHEDULERS)
@pytest.mark.exact
def test_every_name_is_a_class_with_the_references_interface(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_integrals(monkeypatch)
    scheduler, theirs = ours(name), reference_scheduler(name)
    assert type(scheduler) is STATEFUL[schedulers.SCHEDULERS[name]] and len(scheduler) == 1100
    assert scheduler == type(scheduler).from_config(ours("EulerDiscreteScheduler").config)
    assert {name for name in theirs.config if name[0] != "_"} == scheduler.config.keys()
    times = scheduler.timesteps
    assert len(times) == 1100 and all(a > b for a, b in pairwise(times.tolist()))
    scheduler.set_timesteps(3)
    theirs.set_timesteps(3)
    clean, noise = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0)
    if hasattr(theirs, "add_noise") and not name.startswith("EDM"):
        expected = theirs.add_noise(clean, noise, theirs.timesteps[:1])
        assert relative_error(scheduler.add_noise(clean, noise, scheduler.timesteps[:1]), expected) < FLOAT32
    step = scheduler.step(clean, scheduler.timesteps[0], clean)
    result: Any = theirs.step(clean, scheduler.timesteps[0], clean) if name in NAMES else step
    assert len(step.to_tuple()) == len(result.keys()), "whether there are clean latents, too"

"""Schedulers for custom loops: every step, timestep and sigma as of the reference's, and all its fields."""

import copy
import json
import pickle
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from benchmarks.parity.samplers import SHAPE, predict
from kolors_core import KolorsPipeline, schedulers
from kolors_core.compat.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, of
from kolors_core.compat.stateful_scheduler import STATEFUL, StatefulScheduler
from tests.support.hub import environment, files_of, serving
from tests.support.processes import run_program
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical

KINDS = (EulerDiscreteScheduler, DPMSolverMultistepScheduler)
# The reference rounds sigmas and samples to float32 in float64 too; there, and in float16, each step is
# compared by itself, from the same latents.
TOLERANCES = {torch.float64: 1e-6, torch.float32: FLOAT32, torch.float16: 2e-3}
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
SPACINGS = [{"timestep_spacing": spacing} for spacing in ("leading", "linspace", "trailing")]
RUNS = [
    *((kind, changes) for kind in KINDS for changes in (*SPACINGS, KARRAS)),
    (EulerDiscreteScheduler, {"final_sigmas_type": "sigma_min"}),
    (EulerDiscreteScheduler, {"beta_schedule": "linear", "steps_offset": 0}),
    (DPMSolverMultistepScheduler, {"solver_order": 1}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    *((DPMSolverMultistepScheduler, SDE | changes) for changes in (*SPACINGS, KARRAS)),
    (DPMSolverMultistepScheduler, SDE | {"solver_order": 1}),
]
NAMES = [f"{kind.__name__[:5]}-{'-'.join(map(str, changes.values()))}" for kind, changes in RUNS]


def reference(kind: type[StatefulScheduler], changes: dict[str, Any]) -> Any:
    return getattr(diffusers, kind.__name__)(**KOLORS_SCHEDULER | changes)


def loop(
    scheduler: Any, begin: dict[str, Any], dtype: torch.dtype = torch.float32, first: int = 0,
    path: Sequence[tuple[torch.Tensor, ...]] = (), **more: Any
) -> tuple[list[tuple[torch.Tensor, ...]], torch.Tensor]:  # fmt: skip
    """A custom loop as its users write it; returns the results of each step and the generator's state.

    path: the results of another loop, whose latents each step begins with.
    """
    scheduler.set_timesteps(**begin)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    timesteps = scheduler.timesteps[first:]
    if first:
        scheduler.set_begin_index(first)
        noise = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
        latents = scheduler.add_noise(latents, noise, timesteps[:1].repeat(len(latents)))
    else:
        latents = latents * scheduler.init_noise_sigma
    results = [(latents,)]
    for i, timestep in enumerate(timesteps):
        latents = path[i][0] if path else latents
        output = predict(scheduler.scale_model_input(latents, timestep), timestep)
        result = scheduler.step(output, timestep, latents, generator=generator, **more, return_dict=False)
        latents = result[0]
        results.append(result)
    assert scheduler.step_index == len(scheduler.timesteps)
    return results, generator.get_state()


def assert_equal_loops(
    kind: type[StatefulScheduler], changes: dict[str, Any], begin: dict[str, Any],
    dtype: torch.dtype = torch.float32, first: int = 0, **more: Any
) -> None:  # fmt: skip
    theirs, ours = reference(kind, changes), kind(**KOLORS_SCHEDULER | changes)
    expected, state = loop(theirs, begin, dtype, first, **more)
    path = () if dtype == torch.float32 else expected
    results, own_state = loop(ours, begin, dtype, first, path, **more)
    assert torch.equal(ours.timesteps, theirs.timesteps) and ours.timesteps.dtype == theirs.timesteps.dtype
    assert torch.equal(ours.sigmas, theirs.sigmas) and ours.sigmas.dtype == theirs.sigmas.dtype
    assert ours.num_inference_steps == theirs.num_inference_steps
    assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
    assert (ours.begin_index, ours.step_index) == (theirs.begin_index, theirs.step_index)
    assert len(results) == len(expected) > 1
    for i, pair in enumerate(zip(results, expected, strict=True)):
        for mine, other in zip(*pair, strict=True):
            assert mine.dtype == other.dtype
            assert relative_error(mine, other) < TOLERANCES[dtype], f"step {i}"
    assert torch.equal(own_state, state), "the generator must be left where the reference leaves it"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("kind", "changes"), RUNS, ids=NAMES)
def test_every_step_equals_the_references(
    kind: type[StatefulScheduler], changes: dict, dtype: torch.dtype
) -> None:
    for steps in (5, 10, 25, 50):
        assert_equal_loops(kind, changes, {"num_inference_steps": steps}, dtype)


@pytest.mark.parametrize("first", [1, 4, 9])
@pytest.mark.parametrize(("kind", "changes"), RUNS, ids=NAMES)
def test_a_given_image_is_noised_and_denoised_from_the_middle(
    kind: type[StatefulScheduler], changes: dict, first: int
) -> None:
    assert_equal_loops(kind, changes, {"num_inference_steps": 10}, first=first)


@pytest.mark.parametrize("kind", KINDS)
def test_own_timesteps_and_sigmas(kind: type[StatefulScheduler]) -> None:
    assert_equal_loops(kind, {}, {"timesteps": [1099, 900, 700, 333, 12, 0], "device": "cpu"})
    sigmas = [29.0, 11.5, 3.25, 0.7, 0.03, 0.0]
    if kind is EulerDiscreteScheduler:
        assert_equal_loops(kind, {}, {"sigmas": sigmas})
        return
    scheduler = kind()  # the reference's takes no sigmas
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.sigmas.tolist() == pytest.approx(sigmas) and scheduler.num_inference_steps == 5


@pytest.mark.parametrize("steps", [5, 10, 25, 50])
@pytest.mark.parametrize(
    "more", [{"s_churn": 4.0, "s_noise": 1.01}, {"s_churn": 90.0, "s_tmin": 0.3, "s_tmax": 9}]
)
def test_churn(steps: int, more: dict[str, float]) -> None:
    for dtype in TOLERANCES:
        assert_equal_loops(EulerDiscreteScheduler, {}, {"num_inference_steps": steps}, dtype, **more)


def test_variance_noise() -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert_equal_loops(DPMSolverMultistepScheduler, SDE, {"num_inference_steps": 10}, variance_noise=noise)


@pytest.mark.parametrize(("kind", "changes", "wrong"), [
    (EulerDiscreteScheduler, {}, {"steps_offset": 0}), (DPMSolverMultistepScheduler, {}, {"solver_order": 1}),
    (DPMSolverMultistepScheduler, SDE, {"algorithm_type": "dpmsolver++"}),
])  # fmt: skip
def test_parity_can_fail(kind: type[StatefulScheduler], changes: dict, wrong: dict) -> None:
    begin = {"num_inference_steps": 10}
    theirs, ours = reference(kind, changes), kind(**KOLORS_SCHEDULER | changes | wrong)
    assert relative_error(loop(ours, begin)[0][-1][0], loop(theirs, begin)[0][-1][0]) > 10 * FLOAT32


def test_a_generator_for_each_image() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    latents = [torch.full(SHAPE, 0.5)] * 2
    for scheduler in (reference(DPMSolverMultistepScheduler, SDE), DPMSolverMultistepScheduler(**SDE)):
        scheduler.set_timesteps(5)
        for generator in generators:
            generator.manual_seed(3)
        output = predict(latents[0], 900)
        step = scheduler.step(output, scheduler.timesteps[0], latents[0], generator=generators)
        latents.append(step.prev_sample)
    assert relative_error(latents[-1], latents[-2]) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
def test_noise_at_any_timestep(kind: type[StatefulScheduler]) -> None:
    """With a begin index before and after the first step, and without one, as for each image of a batch."""
    schedulers = [reference(kind, {}), kind()]
    clean, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    results: Sequence[list[torch.Tensor]] = [], []
    for scheduler, found in zip(schedulers, results, strict=True):
        scheduler.set_timesteps(10)
        several = scheduler.timesteps[[7, 2]]
        found.append(scheduler.add_noise(clean, noise, several))
        scheduler.set_begin_index(3)
        found.append(scheduler.add_noise(clean, noise, several))
        scheduler.step(scheduler.scale_model_input(clean, several[0]), scheduler.timesteps[3], clean)
        found.append(scheduler.add_noise(clean, noise, several))
        found.append(scheduler.add_noise(clean.half(), noise.half(), several[:1]).float())
    assert len(results[0]) == 4
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        assert relative_error(ours, theirs) < (1e-3 if i == 3 else FLOAT32), i


def test_of_a_timestep_that_is_there_twice_the_second_counts() -> None:
    """Karras' sigmas are so dense at the end that their rounded timesteps repeat."""
    theirs, ours = reference(DPMSolverMultistepScheduler, KARRAS), DPMSolverMultistepScheduler(**KARRAS)
    clean, noise = torch.randn(2, 100, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(100)
    assert len(ours.timesteps.unique()) < 100
    expected = theirs.add_noise(clean, noise, theirs.timesteps)
    assert relative_error(ours.add_noise(clean, noise, ours.timesteps), expected) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_loop_knows_nothing_of_the_first(kind: type[StatefulScheduler]) -> None:
    scheduler = kind()
    loop(scheduler, {"num_inference_steps": 10})
    again, fresh = (loop(one, {"num_inference_steps": 5})[0] for one in (scheduler, kind()))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(again, fresh, strict=True))


def test_before_set_timesteps_there_is_a_step_for_each_training_timestep() -> None:
    """As training scripts use it; the reference's DPM-Solver++ has its sigmas in the opposite order then."""
    clean, noise = torch.randn(2, 3, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([0, 500, 1099])
    theirs, ours = reference(EulerDiscreteScheduler, {}), EulerDiscreteScheduler()
    assert torch.equal(ours.timesteps, theirs.timesteps) and torch.equal(ours.sigmas, theirs.sigmas)
    expected = theirs.add_noise(clean, noise, timesteps)
    assert relative_error(ours.add_noise(clean, noise, timesteps), expected) < FLOAT32
    ddpm = diffusers.DDPMScheduler.from_config(theirs.config)
    solver = DPMSolverMultistepScheduler()
    expected = ddpm.add_noise(clean, noise, timesteps)
    assert relative_error(solver.add_noise(clean, noise, timesteps), expected) < FLOAT32
    wrong = reference(DPMSolverMultistepScheduler, {}).add_noise(clean, noise, timesteps)
    assert relative_error(wrong, expected) > 0.1
    assert ours.num_inference_steps is None and len(ours) == len(theirs) == 1100


def test_velocity_and_shares() -> None:
    """As of the reference's DDPM; its Euler takes them from a table that runs against its timesteps."""
    sample, noise = torch.randn(2, 3, *SHAPE[1:], generator=torch.Generator().manual_seed(1))
    theirs, ours, timesteps = (
        reference(EulerDiscreteScheduler, {}),
        EulerDiscreteScheduler(),
        [3.0, 500.0, 1090.0],
    )
    ddpm = diffusers.DDPMScheduler.from_config(theirs.config)
    expected = ddpm.get_velocity(sample, noise, torch.tensor(timesteps).long())
    assert relative_error(ours.get_velocity(sample, noise, torch.tensor(timesteps)), expected) < FLOAT32
    assert relative_error(theirs.get_velocity(sample, noise, torch.tensor(timesteps)), expected) > 0.1
    assert relative_error(ours.alphas_cumprod, theirs.alphas_cumprod) < FLOAT32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.exact
def test_results_by_name_and_as_a_tuple(kind: type[StatefulScheduler]) -> None:
    scheduler: Any = kind()
    scheduler.set_timesteps(5)
    timestep, latents = scheduler.timesteps[0], torch.ones(SHAPE)
    names = {"prev_sample"} | ({"pred_original_sample"} if kind is EulerDiscreteScheduler else set())
    named = scheduler.step(latents, timestep, scheduler.scale_model_input(latents, timestep))
    assert named[0] is named.prev_sample is named["prev_sample"] and {*named.keys()} == names
    assert scheduler.order == 1 and scheduler.compatibles == [*STATEFUL.values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.exact
def test_the_description_is_the_plain_one_and_frozen(kind: type[StatefulScheduler]) -> None:
    described: Any = getattr(schedulers, kind.__name__)(use_karras_sigmas=True)
    scheduler: Any = of(described)
    assert type(scheduler) is kind and of(scheduler) is scheduler and isinstance(scheduler, type(described))
    assert scheduler.describe() == described.describe() and scheduler.to_public() == described.to_public()
    assert [f.name for f in fields(scheduler)] == [f.name for f in fields(described)]
    for name in ("beta_end", "timesteps", "step_index", "anything"):
        with pytest.raises(FrozenInstanceError):
            setattr(scheduler, name, 0.5)
    scheduler.set_timesteps(5)
    scheduler.set_begin_index(2)
    assert scheduler == kind(use_karras_sigmas=True) != kind()
    assert hash(scheduler) == hash(kind(use_karras_sigmas=True))
    assert replace(scheduler, steps_offset=0).config.steps_offset == 0
    for twin in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert twin == scheduler and torch.equal(twin.timesteps, scheduler.timesteps)
        twin.set_begin_index(4)
        assert (twin.begin_index, scheduler.begin_index) == (4, 2)


@pytest.mark.exact
def test_another_class_of_scheduler_stays_as_it_is() -> None:
    class Own(schedulers.EulerDiscreteScheduler):
        pass

    own = Own()
    assert of(own) is own


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_draws_the_same_by_the_stateful_scheduler(kind: type[StatefulScheduler]) -> None:
    pipe = KolorsPipeline.from_pretrained("tiny")
    pipe.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (getattr(schedulers, kind.__name__)(), kind()):
        pipe.scheduler = scheduler
        generator = torch.Generator().manual_seed(0)
        images.append(pipe("cat", num_inference_steps=2, generator=generator, output_type="np").images)
    assert np.array_equal(*images)


@pytest.mark.parametrize(("call", "message"), [
    (lambda s: s.step(torch.ones(SHAPE), s.timesteps[0], torch.ones(1, 4, 6, 5)), r"one shape, got \[2, 4"),
    (lambda s: s.step(torch.ones(SHAPE), 1.5, torch.ones(SHAPE)), "one of scheduler.timesteps, .* got 1.5"),
    (lambda s: s.set_begin_index(5), "begin_index must be a whole number from 0 to 4, got 5"),
    (lambda s: s.set_begin_index(-1), "got -1"),
    (lambda s: s.set_timesteps(), "exactly one of steps, timesteps and sigmas"),
    (lambda s: s.set_timesteps(5, timesteps=[3]), "exactly one of"),
    (lambda s: s.set_timesteps(0), "the number of steps must be"),
    (lambda s: s.add_noise(torch.ones(SHAPE), torch.ones(SHAPE), torch.tensor([2.5])), "got 2.5"),
    (lambda s: [s.step(torch.ones(SHAPE), t, torch.ones(SHAPE)) for t in (*s.timesteps, 5.0)], "all 5 steps"),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.exact
def test_wrong_calls(kind: type[StatefulScheduler], call: Any, message: str) -> None:
    scheduler = kind()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match=message):
        call(scheduler)


@pytest.mark.exact
def test_a_step_that_fails_does_not_count() -> None:
    scheduler, latents = DPMSolverMultistepScheduler(**SDE), torch.ones(SHAPE)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="a list of 2, one for each image"):
        scheduler.step(latents, scheduler.timesteps[0], latents, generator=[torch.Generator()])
    scheduler.step(latents, scheduler.timesteps[0], latents)
    assert scheduler.step_index == 1


@pytest.mark.exact
def test_eulers_step_takes_no_index() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    for index in (0, torch.tensor(1)):
        with pytest.raises(ValueError, match="must be one of scheduler.timesteps, got the integer"):
            scheduler.step(torch.ones(SHAPE), index, torch.ones(SHAPE))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.exact
def test_saved_and_loaded_by_both_libraries(kind: type[StatefulScheduler], tmp_path: Path) -> None:
    scheduler = kind(use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert kind.from_pretrained(tmp_path / "scheduler") == scheduler
    assert kind.from_pretrained(str(tmp_path), subfolder="scheduler") == scheduler
    theirs = getattr(diffusers, kind.__name__).from_pretrained(tmp_path, subfolder="scheduler")
    assert theirs.config.use_karras_sigmas and theirs.config.num_train_timesteps == 1100
    theirs.save_pretrained(tmp_path / "theirs")
    assert kind.from_pretrained(tmp_path / "theirs") == scheduler
    with pytest.raises(FileNotFoundError, match="no such file, give subfolder='scheduler'"):
        kind.from_pretrained(tmp_path)
    assert kind.from_pretrained("tiny") == kind.from_pretrained("tiny", "scheduler") == kind()  # Euler's file


@pytest.mark.exact
def test_of_a_hub_repository_one_file_is_fetched(tmp_path: Path) -> None:
    EulerDiscreteScheduler(steps_offset=3).save_pretrained(tmp_path / "scheduler")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    program = """
from kolors_core.compat.schedulers import DPMSolverMultistepScheduler
scheduler = DPMSolverMultistepScheduler.from_pretrained("someone/kolors", subfolder="scheduler")
print(scheduler.steps_offset)
"""
    with serving({"someone/kolors": {"main": files_of(tmp_path)}}) as hub:
        run = run_program(program, env=environment(hub.endpoint, tmp_path / "home"))
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr
    assert hub.fetched("someone/kolors") == ["scheduler/scheduler_config.json"]


@pytest.mark.exact
def test_a_faulty_config_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "scheduler_config.json"
    for changes, message in (
        ({"prediction_type": "velocity"}, "prediction_type must be one of 'epsilon'"),
        ({"beta_end": None}, "0 < beta_start"),
    ):
        file.write_text(json.dumps(KOLORS_SCHEDULER | changes))
        with pytest.raises(ValueError, match=f"scheduler_config.json: .*{message}"):
            EulerDiscreteScheduler.from_pretrained(tmp_path)
    file.write_text("{}")
    with pytest.raises(ValueError, match="the field num_train_timesteps is missing"):
        EulerDiscreteScheduler.from_pretrained(tmp_path)

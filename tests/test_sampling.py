"""Samplers: trajectories against the reference's schedulers, step by step, with the same noise."""

import pytest
import torch
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, our_trajectory, reference_trajectory
from kolors_core.sampling import dpmpp_2m, euler, randn_latents
from kolors_core.schedule import Scheduler
from kolors_core.schedulers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.small import FLOAT32, relative_error
from tests.support.versions import draws_rounded

pytestmark = pytest.mark.numerical

RUNS = [
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}),
    (DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
    (DPMSolverMultistepScheduler, {"solver_order": 1}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
]


@pytest.mark.parametrize("steps", [5, 25, 50])
@pytest.mark.parametrize(
    ("kind", "changes"), RUNS, ids=[f"{k.__name__[:5]}-{'-'.join(map(str, c.values()))}" for k, c in RUNS]
)
def test_every_step_equals_the_reference(kind: type[Scheduler], changes: dict, steps: int) -> None:
    theirs, their_state = reference_trajectory(kind, KOLORS_SCHEDULER | changes, steps)
    ours, our_state = our_trajectory(kind, KOLORS_SCHEDULER | changes, steps)
    assert len(ours) == len(theirs) == steps
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert relative_error(mine, other) < FLOAT32, f"step {i}"
    assert torch.equal(our_state, their_state), "the generator must be left where the reference leaves it"


@pytest.mark.parametrize(
    ("kind", "changes", "wrong"),
    [
        (EulerDiscreteScheduler, {}, {"steps_offset": 0}),
        (EulerDiscreteScheduler, {}, {"beta_end": 0.012}),
        (DPMSolverMultistepScheduler, {}, {"solver_order": 1}),
        (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {"use_karras_sigmas": False}),
    ],
)
def test_parity_can_fail(kind: type[Scheduler], changes: dict, wrong: dict) -> None:
    theirs, _ = reference_trajectory(kind, KOLORS_SCHEDULER | changes, 25)
    ours, _ = our_trajectory(kind, KOLORS_SCHEDULER | changes | wrong, 25)
    assert relative_error(ours[-1], theirs[-1]) > 10 * FLOAT32


def test_samplers_converge_to_the_exact_solution() -> None:
    """For data N(0, 1) the ideal denoiser is x / (1 + sigma^2), and x ends at x0 / sqrt(1 + sigma0^2)."""
    sigmas = DPMSolverMultistepScheduler(use_karras_sigmas=True).schedule(100).sigmas
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    exact = x / (1 + sigmas[0] ** 2) ** 0.5
    errors = {
        name: relative_error(sampler(lambda x, sigma: x / (1 + sigma**2), x, sigmas), exact)
        for name, sampler in (("euler", euler), ("2m", dpmpp_2m))
    }
    assert errors["euler"] < 0.05 and errors["2m"] < 0.002, errors


@draws_rounded
def test_noise_is_the_same_in_every_precision() -> None:
    def draw(dtype: torch.dtype) -> Tensor:
        return randn_latents(SHAPE, torch.Generator().manual_seed(3), torch.device("cpu"), dtype)

    assert torch.equal(draw(torch.float32).to(torch.float16), draw(torch.float16))
    assert torch.equal(draw(torch.float32).to(torch.bfloat16), draw(torch.bfloat16))


def test_noise_of_a_list_is_each_generators_own() -> None:
    cpu = torch.device("cpu")
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    listed = randn_latents(SHAPE, generators, cpu, torch.float32)
    alone = randn_latents((1, *SHAPE[1:]), torch.Generator().manual_seed(4), cpu, torch.float32)
    assert torch.equal(listed[1:], alone)
    with pytest.raises(ValueError, match="a list of 2, one for each image"):
        randn_latents(SHAPE, [torch.Generator()], cpu, torch.float32)


def test_nothing_is_held_between_calls() -> None:
    first, _ = our_trajectory(DPMSolverMultistepScheduler, KOLORS_SCHEDULER, 5)
    second, _ = our_trajectory(DPMSolverMultistepScheduler, KOLORS_SCHEDULER, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

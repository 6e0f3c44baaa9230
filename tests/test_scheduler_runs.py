"""Whole runs of every scheduler: each step's latents, and the generator's end, against the reference's."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, predict
from kolors_core.sampling import Denoiser
from kolors_core.schedule import Schedule
from kolors_core.schedulers import SCHEDULERS
from tests.support.reference_schedulers import TWICE, reference_scheduler, use_exact_integrals
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical

MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
UNIPC, FLOW = "UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
END = {"final_sigmas_type": "sigma_min"}
V = {"prediction_type": "v_prediction"}
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in SCHEDULERS if name != "DPMSolverSDEScheduler"),  # whose noise is a tree's
    (MULTISTEP, {"solver_order": 3}), (MULTISTEP, {"algorithm_type": "dpmsolver"} | END),
    (MULTISTEP, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
    (MULTISTEP, FLOW | {"flow_shift": 3.0}), (MULTISTEP, {"euler_at_final": True} | END),
    (SINGLESTEP, {"solver_order": 3}), (SINGLESTEP, {"lower_order_final": True, "use_karras_sigmas": True}),
    (SINGLESTEP, {"algorithm_type": "dpmsolver"} | END), (SINGLESTEP, {"algorithm_type": "sde-dpmsolver++"}),
    (UNIPC, {"solver_order": 3, "solver_type": "bh1"} | END), (UNIPC, {"predict_x0": False} | END),
    (UNIPC, {"lower_order_final": False} | END), (UNIPC, FLOW), (UNIPC, {"use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {"use_karras_sigmas": True}), ("DEISMultistepScheduler", FLOW),
    ("DDPMScheduler", {"variance_type": "fixed_large"}), ("DDIMScheduler", {"set_alpha_to_one": True} | V),
    ("LCMScheduler", {"timestep_scaling": 1e-3}), ("EulerAncestralDiscreteScheduler", V),
    ("HeunDiscreteScheduler", V), ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"} | V),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_exponential_sigmas": True}),
)  # fmt: skip


def denoiser(schedule: Schedule) -> Denoiser:
    def denoise(x: Tensor, sigma: float) -> Tensor:
        output = predict(schedule.target.model_input(x, sigma), schedule.timestep(sigma))
        return schedule.target.x0(x, sigma, output)

    return denoise


@pytest.fixture(autouse=True)
def integrals(monkeypatch: pytest.MonkeyPatch) -> None:
    use_exact_integrals(monkeypatch)


def reference_run(theirs: Any, steps: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    theirs.set_timesteps(steps)
    theirs.sigmas = getattr(theirs, "sigmas", torch.zeros(1)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(SHAPE, generator=generator).to(dtype) * getattr(theirs, "init_noise_sigma", 1.0)
    draws = {"generator": generator} if "generator" in theirs.step.__code__.co_varnames else {}
    found = []
    for timestep in theirs.timesteps:
        scale = getattr(theirs, "scale_model_input", lambda latents, _: latents)
        output = predict(scale(latents, timestep), timestep)
        latents = theirs.step(output, timestep, latents, return_dict=False, **draws)[0]
        found.append(latents)
    if type(theirs).__name__.startswith(TWICE):
        found = [*found[1::2], found[-1]]
    return found[-steps:], generator.get_state()  # the first step of PNDM is two


def our_run(scheduler: Any, steps: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    schedule, generator, found = scheduler.schedule(steps), torch.Generator().manual_seed(0), []

    def noise() -> Tensor:
        return torch.randn(SHAPE, generator=generator).to(dtype)

    def on_step(i: int, x: Tensor) -> Tensor:
        found.append(x / scheduler.latent_scale(schedule.sigmas[i + 1].item()))
        return x

    x = noise() * schedule.init_noise_sigma
    scheduler.sampler(schedule, noise)(denoiser(schedule), x, schedule.sigmas, on_step)
    return found, generator.get_state()


@pytest.mark.parametrize(
    ("name", "given"), RUNS, ids=[f"{n}-{'-'.join(map(str, g.values()))}" for n, g in RUNS]
)
def test_every_step_is_the_references(name: str, given: dict[str, Any]) -> None:
    # The reference's DEIS loses four digits in float32 on the small alphas of a flow.
    dtype = torch.float64 if name.startswith("DEIS") and FLOW.items() <= given.items() else torch.float32
    for steps in (4, 10, 25):
        ours, our_state = our_run(SCHEDULERS[name].from_config({}, **given), steps, dtype)
        theirs, their_state = reference_run(reference_scheduler(name, **given), steps, dtype)
        errors = [relative_error(mine, other) for mine, other in zip(ours, theirs, strict=True)]
        assert max(errors) < FLOAT32, (steps, errors)
        assert torch.equal(our_state, their_state), steps


def test_the_comparison_can_fail() -> None:
    theirs = reference_run(reference_scheduler(UNIPC), 10, torch.float32)[0]
    for wrong in (
        {"solver_type": "bh1"},
        {"solver_order": 3},
        {"lower_order_final": False, "solver_order": 3},
    ):
        ours = our_run(SCHEDULERS[UNIPC].from_config({}, **wrong), 10, torch.float32)[0]
        assert relative_error(ours[-1], theirs[-1]) > 10 * FLOAT32


def test_the_sde_solver_runs() -> None:
    run, state = our_run(SCHEDULERS["DPMSolverSDEScheduler"](), 5, torch.float32)
    assert len(run) == 5 and all(latents.isfinite().all() for latents in run)
    assert not torch.equal(state, torch.Generator().manual_seed(0).get_state())

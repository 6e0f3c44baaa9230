"""Deterministic samplers and DPM-Solver's SDE forms: every evaluation's latents against the reference.

A function is compared on the sigmas and timesteps that the reference's `set_timesteps` computes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete
from torch import Tensor

from benchmarks.parity.samplers import SHAPE, our_run, reference_run, reference_sigmas, use_float64
from kolors_core.sampling import Sampler, dpm_multistep, falling_orders
from kolors_core.sampling_deterministic import (
    deis,
    dpm2,
    dpm_singlestep,
    heun,
    lms,
    plms,
    singlestep_orders,
    unipc,
)
from tests.support.reference_folder import KOLORS_SCHEDULER
from tests.support.reference_schedulers import use_exact_integrals
from tests.support.small import EXACT, FLOAT32, relative_error

pytestmark = pytest.mark.numerical

HEUN, KDPM2, LMS = "HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"
PNDM, DEIS, UNIPC = "PNDMScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
KARRAS = {"use_karras_sigmas": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
STEPS = (5, 10, 25, 50)


@pytest.fixture(autouse=True)
def integrals(monkeypatch: pytest.MonkeyPatch) -> None:
    use_exact_integrals(monkeypatch)


def reference(name: str, changes: dict[str, Any], steps: int) -> Any:
    config = KOLORS_SCHEDULER | {"prediction_type": "epsilon"} | changes
    kind = scheduling_lms_discrete.LMSDiscreteScheduler if name == LMS else getattr(diffusers, name)
    scheduler = kind.from_config(config)
    scheduler.set_timesteps(steps)
    return scheduler


def our_sampler(theirs: Any) -> Sampler:
    """Our function for a scheduler of the reference, with its options."""
    config, steps = theirs.config, len(theirs.timesteps)
    name = type(theirs).__name__
    if name == PNDM:
        return partial(plms, midpoints=() if config.skip_prk_steps else middle_sigmas(theirs))
    if name not in OPTIONS:
        return {HEUN: heun, KDPM2: dpm2, LMS: lms}[name]
    order = config.solver_order
    if name == UNIPC:
        order = falling_orders(order, steps) if config.lower_order_final else order
    elif name == SINGLESTEP:
        order = singlestep_orders(order, steps, lower_order_final=config.lower_order_final)
    elif config.lower_order_final and steps < 15:
        order = falling_orders(order, steps)
    elif config.get("euler_at_final"):
        order = [order] * (steps - 1) + [1]
    return partial(OPTIONS[name](config), order=order)


OPTIONS: dict[str, Callable[[Any], Sampler]] = {
    DEIS: lambda config: deis,
    UNIPC: lambda config: partial(
        unipc, predict_x0=config.predict_x0, solver_type=config.solver_type,
        disable_corrector=config.disable_corrector,
    ),
    MULTISTEP: lambda config: partial(
        dpm_multistep, predict_x0="++" in config.algorithm_type, solver_type=config.solver_type
    ),
    SINGLESTEP: lambda config: partial(
        dpm_singlestep, predict_x0="++" in config.algorithm_type, solver_type=config.solver_type
    ),
}  # fmt: skip


def middle_sigmas(theirs: Any) -> list[float]:
    """The sigmas in the middle of PNDM's first three steps, by timestep."""
    half = theirs.config.num_train_timesteps // theirs.num_inference_steps // 2
    alphas = theirs.alphas_cumprod.double()[torch.tensor(theirs._timesteps[:-4:-1].astype("int64")) - half]
    return ((1 - alphas) / alphas).sqrt().tolist()


def is_stochastic(theirs: Any) -> bool:
    return "sde" in theirs.config.get("algorithm_type", "")


def cases() -> list[tuple[str, dict[str, Any]]]:
    """Each class with each of its options."""
    simple = (HEUN, KDPM2, LMS)
    rows = [(name, changes) for name in simple for changes in ({}, KARRAS)]
    for changes in ({"skip_prk_steps": True}, {"skip_prk_steps": False, "set_alpha_to_one": True}):
        rows.append((PNDM, changes))
    for order in (1, 2, 3):
        one = {"solver_order": order}
        rows.append((DEIS, one | (KARRAS if order != 2 else {})))
        for solver in ("bh1", "bh2"):
            for changes in ({} if solver == "bh2" else SIGMA_MIN, SIGMA_MIN | {"predict_x0": False}):
                rows.append((UNIPC, one | {"solver_type": solver} | changes))
        for solver in ("midpoint", "heun")[: 1 if order == 1 else None]:
            for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"):
                end = {} if "++" in algorithm else SIGMA_MIN
                given = one | {"algorithm_type": algorithm, "solver_type": solver} | end
                third_sde = order == 3 and "sde" in algorithm  # see below
                if not third_sde:
                    rows.append((MULTISTEP, given))
                if algorithm != "sde-dpmsolver" and not (third_sde and solver == "heun"):
                    rows.append((SINGLESTEP, given))
    ends = (KARRAS, SIGMA_MIN | {"euler_at_final": True}, SIGMA_MIN | {"lower_order_final": False})
    rows += [
        (name, {"solver_order": 3, "solver_type": "heun"} | changes)
        for changes in ends for name in (MULTISTEP, SINGLESTEP)
    ]  # fmt: skip
    uneven = SIGMA_MIN | {"lower_order_final": False, "disable_corrector": [0, 2, 3]}
    rows += [(UNIPC, uneven | {"solver_order": order}) for order in (2, 3)]
    return rows


CASES = cases()
IDS = [f"{name[:-9]}-{'-'.join(map(str, changes.values()))}" for name, changes in CASES]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=IDS)
def test_every_evaluation_is_the_references(name: str, changes: dict[str, Any]) -> None:
    for steps in STEPS:
        theirs = reference(name, changes, steps)
        ours, stochastic = our_sampler(theirs), is_stochastic(theirs)
        known, got = reference_run(theirs), our_run(ours, theirs, stochastic=stochastic)
        # The reference's third-order DEIS loses its digits in float32, by cancellation; not in float64.
        most = 1e-3 if name == DEIS and changes["solver_order"] == 3 else FLOAT32
        assert len(got.latents) == len(known.latents)
        for i, (mine, other) in enumerate(zip(got.latents, known.latents, strict=True)):
            assert relative_error(mine, other) < most, f"{steps} steps, evaluation {i}"
        assert torch.equal(got.state, known.state), "the generator must be left where the reference leaves it"


IN_FLOAT64 = [
    (name, changes) for name, changes in CASES
    if name != MULTISTEP and "sde" not in changes.get("algorithm_type", "")
]  # fmt: skip


@pytest.mark.parametrize("steps", [10, 25])
def test_in_float64_it_is_the_references_to_its_last_digits(steps: int) -> None:
    """All classes but the multistep DPM-Solver, which rounds latents to float32, and SDE forms' noise."""
    for name, changes in IN_FLOAT64:
        theirs = reference(name, changes, steps)
        use_float64(theirs)
        known, got = (run.latents for run in (
            reference_run(theirs, torch.float64), our_run(our_sampler(theirs), theirs, torch.float64)
        ))  # fmt: skip
        error = max(relative_error(*pair) for pair in zip(got, known, strict=True))
        assert known[-1].dtype == torch.float64 and error < EXACT, (name, changes, error)


@pytest.mark.parametrize(
    ("name", "changes", "wrong"),
    [
        (LMS, {}, partial(lms, order=3)),
        (PNDM, {"skip_prk_steps": True}, None),
        (PNDM, {"skip_prk_steps": False}, None),
        (DEIS, {}, partial(deis, order=3)),
        (UNIPC, {}, partial(unipc, solver_type="bh1")),
        (UNIPC, {}, partial(unipc, predict_x0=False)),
        (UNIPC, {}, partial(unipc, disable_corrector=[7])),
        (UNIPC, {"lower_order_final": False} | SIGMA_MIN, partial(unipc, order=[2] * 24 + [1])),
        (MULTISTEP, {}, partial(dpm_multistep, solver_type="heun")),
        (MULTISTEP, {}, partial(dpm_multistep, predict_x0=False)),
        (MULTISTEP, {"solver_order": 3}, partial(unipc, order=3, disable_corrector=range(25))),
        (SINGLESTEP, {}, partial(dpm_singlestep, solver_type="heun")),
        (SINGLESTEP, {"solver_order": 3}, partial(dpm_singlestep, order=3, solver_type="heun")),
        (HEUN, {}, None),
        (KDPM2, {}, None),
    ],
)  # fmt: skip
def test_parity_can_fail(name: str, changes: dict[str, Any], wrong: Sampler | None) -> None:
    """Another option, or else a sigma that is wrong by 0.1 %, is seen."""
    theirs = reference(name, changes, 25)
    right = our_sampler(theirs)
    known, got = reference_run(theirs).latents, our_run(right, theirs).latents
    assert max(relative_error(*pair) for pair in zip(got, known, strict=True)) < FLOAT32

    def moved(denoise: Any, x: Tensor, sigmas: list[float]) -> Tensor:
        return right(denoise, x, [*sigmas[:3], sigmas[3] * 1.001, *sigmas[4:]])

    got = our_run(wrong or moved, theirs).latents
    assert max(relative_error(*pair) for pair in zip(got, known, strict=True)) > 10 * FLOAT32


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (SINGLESTEP, {"solver_order": 2}),
        (SINGLESTEP, {"solver_order": 3}),
        (MULTISTEP, {"solver_order": 3}),
        (DEIS, {"solver_order": 2}),
        (UNIPC, {"solver_order": 3}),
    ],
)
@pytest.mark.parametrize("first", [1, 2, 3, 4])
def test_a_run_from_the_middle(name: str, changes: dict[str, Any], first: int) -> None:
    """The orders of the steps that remain are those of the whole run, the first one's excepted."""
    theirs = reference(name, changes, 10)
    whole: Any = our_sampler(theirs)
    orders = whole.keywords["order"]
    ours = partial(whole, order=orders[first:])
    known, got = reference_run(theirs, first=first), our_run(ours, theirs, first=first)
    for mine, other in zip(got.latents, known.latents, strict=True):
        assert relative_error(mine, other) < FLOAT32


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.exact
def test_singlestep_orders(order: int, end: str, lower: bool) -> None:
    changes = {"solver_order": order, "final_sigmas_type": end, "lower_order_final": lower}
    for steps in range(1, 20):
        theirs = reference(SINGLESTEP, changes, steps)
        ours = singlestep_orders(order, steps, lower_order_final=lower)
        if end == "zero":
            ours[-1] = 1  # in `dpm_singlestep` every step to 0 is
        assert ours == theirs.order_list, steps


# What the reference gets wrong.


@pytest.mark.parametrize("name", [MULTISTEP, SINGLESTEP])
def test_third_order_sde_has_the_sign_of_the_papers_integral(name: str) -> None:
    """The reference subtracts 1/2 in the weight of the second difference, where the integral adds it.

    The integral, of its weight in the deterministic form: (1 - exp(z) + z) / z^2 + 1/2, 0 for small z.
    """
    changes = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"} | SIGMA_MIN
    theirs = reference(name, changes, 25)
    ours: Any = our_sampler(theirs)
    clean: list[tuple[float, Tensor]] = []

    def recording(denoise: Any, x: Tensor, sigmas: list[float], **given: Any) -> Tensor:
        def record(x: Tensor, sigma: float) -> Tensor:
            clean.append((math.log(sigma), denoise(x, sigma)))
            return clean[-1][1]

        return ours(record, x, sigmas, **given)

    known, got = reference_run(theirs).latents, our_run(recording, theirs, stochastic=True).latents
    for i in range(3):
        assert relative_error(got[i], known[i]) < FLOAT32
    sigma = reference_sigmas(theirs)[0][3]
    (log0, x0), (log1, x1), (log2, x2) = clean[:3]
    second = ((x2 - x1) / (log2 - log1) - (x1 - x0) / (log1 - log0)) / (log2 - log0)
    if name == SINGLESTEP:  # spans three sigmas, and gives the difference its full weight
        difference = 2 * second * (math.log(sigma) - log0) ** 2
    else:
        difference = second * (math.log(sigma) - log2) ** 2
    assert relative_error((got[3] - known[3]) * (sigma**2 + 1) ** 0.5, difference) < 1e-4


def test_third_order_sde_of_the_noise_is_there() -> None:
    changes = {"algorithm_type": "sde-dpmsolver", "solver_order": 3} | SIGMA_MIN
    theirs = reference(MULTISTEP, changes, 25)
    with pytest.raises(UnboundLocalError):
        reference_run(theirs)
    assert our_run(our_sampler(theirs), theirs, stochastic=True).latents[-1].isfinite().all()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (UNIPC, {"predict_x0": False}),  # 0 times infinity, in the step to 0
        (UNIPC, {"solver_type": "bh1"}),  # likewise
        (MULTISTEP, {"solver_order": 3} | KARRAS | SIGMA_MIN),  # 0 / 0, where the last two sigmas are equal
    ],
)
def test_where_the_reference_ends_in_nan(name: str, changes: dict[str, Any]) -> None:
    theirs = reference(name, changes, 25)
    known, got = reference_run(theirs).latents, our_run(our_sampler(theirs), theirs).latents
    assert known[-1].isnan().all() and got[-1].isfinite().all()
    for mine, other in zip(got[:-1], known[:-1], strict=True):
        assert relative_error(mine, other) < FLOAT32
    if "use_karras_sigmas" in changes:
        assert torch.equal(got[-1], got[-2])
    else:  # what a step to almost 0 gives
        ours = our_sampler(theirs)
        nearly = our_run(lambda denoise, x, sigmas: ours(denoise, x, [*sigmas[:-1], 1e-9]), theirs).latents
        assert relative_error(got[-1], nearly[-1]) < FLOAT32


def test_lms_from_the_middle_begins_as_euler() -> None:
    """The reference takes one of four weights there, of which only the sum is right."""

    def slope_of_one(x: Tensor, sigma: float) -> Tensor:
        return x - sigma

    theirs = reference(LMS, {}, 10)
    sigmas = reference_sigmas(theirs)[0]
    x = torch.zeros(SHAPE)
    theirs.set_begin_index(5)
    theirs.scale_model_input(x, theirs.timesteps[5])
    step = theirs.step(torch.ones(SHAPE), theirs.timesteps[5], x, return_dict=False)[0]
    right = torch.full(SHAPE, sigmas[6] - sigmas[5])
    assert relative_error(lms(slope_of_one, x, sigmas[5:7]), right) < 1e-6
    assert relative_error(step, right) > 0.5

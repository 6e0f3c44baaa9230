"""The page of samplers says what the code does: names, order, evaluations, noise, sources."""

import inspect
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kolors_core
from kolors_core import (
    sampling,
    sampling_deterministic,
    sampling_distilled,
    sampling_stochastic,
    schedulers,
    solvers,
    targets,
)
from kolors_core.cli.samplers import SAMPLERS
from kolors_core.schedulers import SCHEDULERS

PAGE = Path(__file__).parents[1] / "kolors_core" / "SAMPLERS.md"
ROWS = [
    [cell.strip(" `") for cell in line.split("|")[1:-1]]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| `\w+Scheduler` \|", line)
]
FILES = (sampling, sampling_deterministic, sampling_distilled, sampling_stochastic)
DATA = 0.6  # the standard deviation of the images


def run(name: str, steps: int, **options: Any) -> tuple[float, int, int, int]:
    """Denoise a normal distribution; returns the error, evaluations counted and said, and draws."""
    known = SCHEDULERS[name].__dataclass_fields__
    full = {"lower_order_final": False} if "lower_order_final" in known and "Single" not in name else {}
    scheduler = SCHEDULERS[name].from_config({}, **full)
    sigmas = torch.linspace(math.log(20.0), math.log(0.05), steps + 1, dtype=torch.float64).exp()
    schedule = replace(scheduler.schedule(sigmas=sigmas.tolist()), sigmas=sigmas)
    evaluations = draws = 0

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return x * DATA**2 / (DATA**2 + sigma**2)

    def noise() -> Tensor:
        nonlocal draws
        draws += 1
        return torch.zeros((), dtype=torch.float64)

    sampler: Any = scheduler.sampler
    x = sampler(schedule, noise, **options)(denoise, sigmas[0], sigmas)
    exact = sigmas[0] * ((DATA**2 + sigmas[-1] ** 2) / (DATA**2 + sigmas[0] ** 2)).sqrt()
    return abs(x / exact - 1).item(), evaluations, scheduler.evaluations(schedule), draws


def test_every_scheduler_has_a_row_and_is_exported() -> None:
    assert sorted(row[0] for row in ROWS) == sorted(SCHEDULERS)
    for name in SCHEDULERS:
        assert issubclass(getattr(kolors_core, name), SCHEDULERS[name]) and name in kolors_core.__all__


def test_the_command_lines_names_are_of_their_rows() -> None:
    shown = {flag: row[0] for row in ROWS for flag in row[1].split(", ") if flag != "own"}
    assert shown == {name: kind.__name__ for name, (kind, _) in SAMPLERS.items() if kind is not None}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_order_evaluations_and_noise(row: list[str]) -> None:
    name, _, order, evaluations, noise, *_ = row
    takes_eta = {"eta": 0.0} if noise == "eta" else {}
    (error, counted, said, draws), (half_error, *_) = (run(name, steps, **takes_eta) for steps in (64, 32))
    assert counted == said == (65 if evaluations == "1, the first 2" else 64 * int(evaluations))
    assert (draws > 0) == (noise == "yes"), "deterministic ones draw nothing"
    if takes_eta:
        assert run(name, 8, eta=0.5)[3] > 0
    if order != "–":
        assert round(math.log2(half_error / error)) == int(order)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_sources_are_those_of_the_code(row: list[str]) -> None:
    files = [inspect.getsource(module) for module in (*FILES, schedulers, solvers, targets)]
    assert row[5].startswith("https://arxiv.org/abs/") and row[5] in "".join(files)


def test_a_step_to_0_takes_one_evaluation() -> None:
    for name in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"):
        scheduler = SCHEDULERS[name]()
        assert scheduler.evaluations(scheduler.schedule(10)) == 19
    assert SCHEDULERS["PNDMScheduler"]().evaluations(SCHEDULERS["PNDMScheduler"]().schedule(1)) == 1


def test_the_start_of_the_last_steps() -> None:
    """All steps begin as the run does; fewer with noise that the model's input has at variance 1."""
    euler = SCHEDULERS["EulerDiscreteScheduler"](timestep_spacing="trailing")
    whole = euler.schedule(10)
    assert whole.last_steps(1.0).init_noise_sigma == whole.init_noise_sigma == whole.sigmas[0]
    part = whole.last_steps(0.5)
    assert part.init_noise_sigma == pytest.approx((part.sigmas[0].item() ** 2 + 1) ** 0.5)
    flow = SCHEDULERS["FlowMatchEulerDiscreteScheduler"]().schedule(10).last_steps(0.5)
    assert flow.init_noise_sigma == flow.sigmas[0].item() + 1

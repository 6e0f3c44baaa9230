"""Samplers and schedules of the command line: what each name is, and images drawn again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kolors_core.cli.generate import main
from kolors_core.cli.samplers import SAMPLERS, choose_scheduler
from kolors_core.pipelines.png_metadata import read_metadata
from kolors_core.schedulers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler


def draw(folder: Path, out: Path, *more: str) -> int:
    return main(["cat", "-w", str(folder), "-o", str(out), "--steps", "2", "--device", "cpu", "-q", *more])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws(sampler: str, reference_folder: Path, tmp_path: Path) -> None:
    assert draw(reference_folder, tmp_path / "x.png", "--sampler", sampler, "--seed", "1") == 0


def test_a_sampler_is_its_names_whatever_the_checkpoint_has() -> None:
    own = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True)
    for name, (kind, _) in SAMPLERS.items():
        made: Any = choose_scheduler(own, name, None)
        assert type(made) is kind or made is own
        if name != "own" and hasattr(made, "algorithm_type"):
            assert ("sde" in made.algorithm_type) == ("sde" in name)
            assert made.solver_order == (3 if "3m" in name else 2)
        if name != "own":
            assert getattr(made, "use_karras_sigmas", False) == name.endswith("-karras")


def test_a_schedule_stands_in_for_the_samplers() -> None:
    own = DPMSolverMultistepScheduler(use_beta_sigmas=True)
    made: Any = choose_scheduler(own, "unipc", "exponential")
    assert made.use_exponential_sigmas and not made.use_beta_sigmas
    trailing: Any = choose_scheduler(own, "euler-karras", "trailing")
    assert trailing.timestep_spacing == "trailing" and not trailing.use_karras_sigmas
    assert choose_scheduler(own, "own", "lu") == DPMSolverMultistepScheduler(use_lu_lambdas=True)
    with pytest.raises(ValueError, match="DDIMScheduler has no field 'use_karras_sigmas'"):
        choose_scheduler(own, "ddim", "karras")


def test_a_sampler_of_other_models_is_refused() -> None:
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(
        ValueError, match="a FlowMatchEulerDiscreteScheduler of flow_prediction: --sampler own"
    ):
        choose_scheduler(flow, "euler", None)
    assert choose_scheduler(flow, "own", None) is flow
    velocity = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    made: Any = choose_scheduler(velocity, "heun", None)
    assert made.prediction_type == "v_prediction"


def test_an_image_of_any_sampler_is_drawn_again(reference_folder: Path, tmp_path: Path) -> None:
    """With the noise of its eta, and its schedule, which another one may replace."""
    one = ["--sampler", "ddim", "--schedule", "trailing", "--eta", "0.7", "--seed", "2"]
    assert draw(reference_folder, tmp_path / "a.png", *one) == 0
    facts = read_metadata(tmp_path / "a.png")
    assert facts["eta"] == "0.7" and "DDIMScheduler(timestep_spacing=trailing)" in facts["sampler"]
    assert main(["--from", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "-q"]) == 0
    first, again = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "ab")
    assert np.array_equal(first, again)
    other = ["--schedule", "leading", "-o", str(tmp_path / "c.png"), "-q"]
    assert main(["--from", str(tmp_path / "a.png"), *other]) == 0
    facts = read_metadata(tmp_path / "c.png")
    assert json.loads(facts["scheduler"])["_class_name"] == "DDIMScheduler" and facts["eta"] == "0.7"
    assert not np.array_equal(first, np.asarray(Image.open(tmp_path / "c.png")))

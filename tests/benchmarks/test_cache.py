"""The benchmark of step caches: how prompts are counted, and how far images are off."""

from dataclasses import replace

import pytest
import torch

from benchmarks.speed.cache import RECOMMENDED, STEPS, Measured, compare, errors, name_of, psnr, row_of
from benchmarks.tiny.judge import Verdict
from kolors_core.performance.step_cache import StepCache

RIGHT = Verdict(
    present=True, exact=True, number=None, places=(), relations=(True,), ground=True, characters=(), text=None
)
WRONG = replace(RIGHT, relations=(False,))


def test_changes_are_counted_in_pairs() -> None:
    """Of four prompts one is lost and one gained: nothing changed, within a quarter's error of the pairs."""
    shares = compare([RIGHT, WRONG, RIGHT, WRONG], [RIGHT, RIGHT, WRONG, WRONG])
    assert (shares["lost"], shares["gained"], shares["change"], shares["all"]) == (0.25, 0.25, 0, 0.5)
    assert shares["within"] == pytest.approx(1.96 * (0.5 / 4) ** 0.5)
    alike = compare([RIGHT, WRONG], [RIGHT, WRONG])
    assert alike["within"] == alike["lost"] == alike["gained"] == 0


def test_errors_are_each_image_s() -> None:
    exact = torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert errors(exact * torch.tensor([1.1, 1.5]).view(2, 1, 1, 1), exact).tolist() == pytest.approx(
        [0.1, 0.5]
    )
    found = psnr(exact + torch.tensor([0.02, 0.2]).view(2, 1, 1, 1), exact)
    assert found.tolist() == pytest.approx([40.0, 20.0], abs=1e-3)


def test_a_row_says_what_was_set() -> None:
    one = Measured(
        curve="interval", settings=RECOMMENDED[0], prompts=4, saved=0.64, error=0.3, psnr=22.61,
        times_as_fast=2.031, times_as_fast_by_the_clock=2.2,
    )  # fmt: skip
    assert row_of(one) == f"| interval | {name_of(RECOMMENDED[0])} | 64% | 2.03 | 0.300 | 22.6 |"
    assert len(StepCache(**RECOMMENDED[-1]).full_steps(STEPS)) == 9

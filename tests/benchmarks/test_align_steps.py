"""The command that aligns steps: losses by hand, the path against all paths, and a smallest run."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.align_steps import losses, main, shortest


def test_a_model_that_moves_where_the_noise_is_little_gets_its_steps_there() -> None:
    """D = f(sigma) alone: the losses are integrals that can be written down."""
    grid = np.linspace(4.0, 1.0, 400).tolist()

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.full_like(x, sigma**2, dtype=torch.float64)

    found = losses(denoise, torch.zeros(2, 3), grid, torch.Generator().manual_seed(0))

    def loss(s: float, e: float) -> float:  # of the integral of (t^2 - s^2)^2 / t^3 from e to s
        return (s**2 - e**2) / 2 - 2 * s**2 * np.log(s / e) + s**4 / 2 * (e**-2 - s**-2)

    for i, j in ((0, 399), (100, 250), (3, 4)):
        assert found[i, j] == pytest.approx(loss(grid[i], grid[j]), rel=0.02, abs=1e-6)
    assert np.isinf(found[np.tril_indices(400)]).all(), "no step goes up or stays"


def test_the_path_is_the_cheapest_of_all() -> None:
    cost = np.triu(np.random.default_rng(0).random((9, 9)), 1)
    cost[np.tril_indices(9)] = np.inf
    for steps in (1, 2, 3, 5, 8):
        paths = [(0, *between, 8) for between in combinations(range(1, 8), steps - 1)]
        best = min(paths, key=lambda path: sum(cost[i, j] for i, j in zip(path, path[1:], strict=False)))
        assert shortest(cost, steps) == list(best)


def test_the_smallest_run_writes_a_table(tmp_path: Path) -> None:
    main([str(tmp_path), "--smallest"])
    text = (tmp_path / "align_steps.md").read_text("utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("    ("))
    table = [float(number) for number in line.strip(" ()").split(", ")]
    assert len(table) == 11 and sorted(table, reverse=True) == table
    assert len([row for row in text.splitlines() if "aligned for this model" in row]) == 2

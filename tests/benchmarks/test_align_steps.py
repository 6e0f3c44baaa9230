"""The command that aligns steps: losses by hand, the path against all paths, and a smallest run."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.align_steps import losses, main, shortest


def test_the_error_of_a_step_is_that_of_eulers_method() -> None:
    """D = x0 + c t^2 has the trajectory x0 + t n - c t^2, since d(x / t) = -D / t^2 dt."""
    grid, c = np.linspace(4.0, 1.0, 400).tolist(), 0.3
    x0, noise = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def exact(sigma: float) -> Tensor:
        return x0 + sigma * noise - c * sigma**2

    found = losses(torch.stack([x0 + c * sigma**2 for sigma in grid]), grid)
    for i, j in ((0, 399), (100, 250), (3, 4)):
        s, e = grid[i], grid[j]
        step = exact(s) + (e - s) * (exact(s) - (x0 + c * s**2)) / s
        wanted = (step - exact(e)).square().mean().sqrt().item() / (
            1 + e**2
        ) ** 0.5  # what is left at the end
        assert found[i, j] == pytest.approx(wanted, rel=1e-3, abs=1e-8)
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

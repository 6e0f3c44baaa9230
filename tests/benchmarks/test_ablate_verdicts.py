"""What an ablation concludes: intervals and their power, times beside A against A, lines through widths."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.ablate.board import HEAD, RUN, entries, long_board, replaced, short_board
from benchmarks.ablate.board import main as board
from benchmarks.ablate.change import read
from benchmarks.ablate.intervals import T80, T, fit_line, over_seeds, ratio_over_seeds
from benchmarks.ablate.lesson import Measure
from benchmarks.ablate.models import Cost, flops
from benchmarks.ablate.report import rows_of, scaling_of
from benchmarks.ablate.study import Run, steps_within
from benchmarks.ablate.timing import AGAIN, Timed, measure_times, ratios, take_turns


def test_flops_are_counted_with_attention() -> None:
    x = torch.randn(1, 1, 16, 4)
    assert flops(lambda: F.scaled_dot_product_attention(x, x, x)) == 2 * (2 * 16 * 16 * 4)


def test_intervals_and_what_they_could_have_shown() -> None:
    found = over_seeds([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.high - 3 == pytest.approx(4.303 * math.sqrt(7 / 3))
    assert found.visible == pytest.approx((4.303 + 1.061) * math.sqrt(7 / 3))
    assert found.holds(0.0) and not over_seeds([1.0, 1.1, 0.9]).holds(0.0)
    assert over_seeds([0.1, 0.1, 0.1], grain=0.1).holds(0.03), "equal counts are no proof"
    a, b = ratio_over_seeds([2.0, 2.2, 1.9]), ratio_over_seeds([1 / 2.0, 1 / 2.2, 1 / 1.9])
    assert a.low == pytest.approx(1 / b.high) and a.mean == pytest.approx(1 / b.mean)
    assert list(T) == sorted(T, reverse=True) and list(T80) == sorted(T80, reverse=True)


def test_a_visible_difference_is_shown_four_times_in_five() -> None:
    count, trials = 5, 2000
    draws = torch.randn(trials, count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    visible = (T[count - 2] + T80[count - 2]) / math.sqrt(count)  # at a spread of 1
    shown = sum(not over_seeds(row).holds(0.0) for row in (draws + visible).tolist()) / trials
    by_chance = sum(not over_seeds(row).holds(0.0) for row in draws.tolist()) / trials
    assert 0.75 < shown < 0.85 and 0.035 < by_chance < 0.065


def runs(scores: dict[str, list[float | None]], name: str = "held-out error") -> list[Run]:
    """Runs of labels whose one measure has these values by seed."""
    return [
        Run(label=label, width=1.0, seed=seed, steps=1, scores={name: value},
            diverged=None if value is not None else 1)
        for label, values in scores.items() for seed, value in enumerate(values)
    ]  # fmt: skip


class OneMeasure:
    """What `rows_of` reads of a lesson."""

    measures = (Measure(name="held-out error", more_is="worse"),)


def test_the_verdict_says_what_the_interval_does() -> None:
    values = {"A": [1.0, 1.1, 0.9], "B": [2.0, 2.1, 1.9], "C": [1.0, 1.2, 0.7], "D": [2.0, None, 1.0]}
    rows = rows_of(OneMeasure(), runs(values), [], list(values))  # type: ignore[arg-type]
    assert [row.verdict for row in rows] == ["B is worse", "no difference shown", "diverged, 1 of 3"]
    assert str(rows[0]).startswith("| held-out error | 1.0000 | 2.0000 | +1.0000 (+1.0000 to")
    assert "nan" in str(rows[2]) and rows[1].change.visible > 0.1


def timed(again: list[float], b: list[float], busy: str = "") -> Timed:
    parts = {"A": [1.0] * len(b), AGAIN: again, "B": b}
    return Timed(name="a step", ms=dict.fromkeys(parts, 1.0), parts=parts, busy=busy)


def test_no_time_is_told_below_a_against_a_nor_under_load() -> None:
    """As of two equal UNets, whose times came out 0.995 and 0.992 with intervals that leave out 1."""
    again, b = [0.992, 0.991, 0.993], [0.994, 0.995, 0.993]
    assert (
        not timed(again, b).change("B").holds(1.0) and timed(again, b).verdict("B") == "no difference shown"
    )
    assert timed([1.008, 1.009, 1.007], b).verdict("B") == "no difference shown", "nor in the other direction"
    faster, slower = [0.8, 0.81, 0.79], [1.2, 1.21, 1.19]
    assert timed(again, faster).verdict("B") == "B is faster"
    assert timed(again, slower).verdict("B") == "B is slower"
    assert timed(again, faster, "load 3.0").verdict("B") == "not measured: other work"
    row = rows_of(OneMeasure(), runs({"A": [1.0, 1.0], "B": [1.0, 1.0]}), [timed(again, faster, "load")],
                  ["A", "B"])[-1]  # type: ignore[arg-type]  # fmt: skip
    assert "0.8" not in str(row) and "not measured" in str(row)


def test_turns_begin_with_another_in_each_round_and_a_is_built_anew() -> None:
    order, built = list[str](), 0

    def make() -> dict[str, Callable[[], dict[str, float]]]:
        nonlocal built
        built += 1
        return {name: lambda name=name: order.append(name) or {"seconds": 1.0} for name in ("A", AGAIN, "B")}

    take_turns(make(), 3)
    counted = order[3:]  # after the warm-up
    assert [counted[i] for i in (0, 6, 12)] == ["A", AGAIN, "B"]
    assert counted[:6] == counted[:6][::-1], "forward and backward"
    found = measure_times("a step", make, load=999.0, parts=4, rounds=1)
    assert built == 5 and len(found.parts["B"]) == 4 and "999.0" in found.busy
    assert ratios([1, 2, 4, 4], [2, 4, 2, 2]) == [2.0, 0.5]


def test_lines_through_three_widths() -> None:
    line = fit_line([1e6, 2e6, 4e6], [3 * x**-0.5 for x in (1e6, 2e6, 4e6)])
    assert line.slope == pytest.approx(-0.5) and line.at(9e6) == pytest.approx(1e-3)
    costs, all_runs = dict[tuple[str, float], Cost](), list[Run]()
    for label, factor, work in (("A", 1.0, 1), ("B", 0.5, 2)):
        for width in (1.0, 0.5, 1.5):
            count = round(work * 1e6 * width**2)
            costs[label, width] = Cost(parameters=1, forward=count, step=count)
            for seed in range(3):
                value = factor * (1 + 0.01 * seed) * count**-0.3
                scores: dict[str, float | None] = {"held-out error": value}
                all_runs.append(Run(label=label, width=width, seed=seed, steps=1, scores=scores))
    a, b = scaling_of(OneMeasure.measures[0], all_runs, costs, ["A", "B"])
    assert a.slope.mean == pytest.approx(-0.3) == b.slope.mean and a.gap is None
    assert b.gap is not None and b.gap.mean == pytest.approx(0.5), (
        "at the same FLOPs, though B has twice as many"
    )
    narrow = read("dit", 8).scaled(0.5).config
    assert narrow.channels == (32, 64, 96) and narrow.heads == (1, 2, 3)


def test_budgets() -> None:
    cost = Cost(parameters=1, forward=100, step=1000)
    assert [steps_within(*each, cost, 0.5) for each in (("steps", 7), ("flops", 2e4), ("minutes", 1))] == [
        7, 20, 120
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--flops 1500 pays for 1 training steps"):
        steps_within("flops", 1500, cost, 0.5)


def test_the_readmes_board_is_what_the_results_say(tmp_path: Path) -> None:
    change = {"mean": -0.5, "low": -0.75, "high": -0.25, "visible": 0.3}
    first = {"label": "B", "form": ".2f", "unit": "", "is_ratio": False, "name": "held-out error",
             "verdict": "B is better", "change": change}  # fmt: skip
    nothing = dict.fromkeys(("mean", "low", "high", "visible"), math.nan)
    second = {**first, "name": "right", "unit": "%", "verdict": "diverged, 1 of 3", "change": nothing}
    content = {
        "lesson_name": "things", "about": {"B": "Change: it changes."}, "rows": [first, second],
        "variants": {"A": ["", "", ""], "B": ["change", "", ""]}, "commands": {"B": f"{RUN} --b change"},
        "costs": [{"label": "A", "width": 1, "step": 100}, {"label": "B", "width": 1, "step": 125}],
    }  # fmt: skip
    for name, told in (("one", content), ("older", {})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ablate.json").write_text(json.dumps(told))
    readme = tmp_path / "mine.md"
    readme.write_text(f"before\n\n{HEAD}\n|---|---|---|\n| old | 1 | 2 |\n\n| after | |\n")
    board(tmp_path, readme)
    line = "| Change | -0.50 (-0.75 to -0.25), **better** | `--b change` |"
    assert readme.read_text() == f"before\n\n{HEAD}\n|---|---|---|\n{line}\n\n| after | |\n"
    page = (tmp_path / "README.md").read_text()
    did = "held-out error -0.50 (-0.75 to -0.25), **better**; right diverged, 1 of 3"
    assert f"| Change: it changes. | [things](one/ablate.md) | {did} |" in page
    assert f"| 1.25 | `{RUN} --b change` |" in page
    with pytest.raises(ValueError, match="expected a line .* in the README, there is none"):
        replaced("no marks", "")
    with pytest.raises(ValueError, match="has no folder with the ablate.json"):
        board(tmp_path / "older", None)


def test_the_boards_of_the_repository_are_those_of_its_results() -> None:
    """Numbers are not written by hand: after new results run `python -m benchmarks.ablate.board`."""
    root = Path(__file__).parents[2]
    if found := list(entries(root / "benchmarks" / "results" / "ablate")):
        readme = (root / "README.md").read_text(encoding="utf-8")
        assert replaced(readme, short_board(found)) == readme
        page = root / "benchmarks" / "results" / "ablate" / "README.md"
        assert page.read_text(encoding="utf-8") == long_board(found)

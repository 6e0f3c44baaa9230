"""The benchmarks' arithmetic: who runs when, what is the middle, and when a goal is met."""

import json
from pathlib import Path

import pytest

from benchmarks.side_by_side import Row, below, faster, race, share, timed


def test_contestants_take_turns_forward_and_backward_after_a_warm_up() -> None:
    order = []

    def contestant(name: str):
        def measure() -> dict[str, float]:
            order.append(name)
            return {"seconds": float(len(order))}

        return measure

    result = race({"reference": contestant("A"), "ours": contestant("B")}, rounds=2)
    assert "".join(order) == "AB" + "ABBA" + "ABBA"
    reference = result.contestants["reference"]["seconds"]
    assert reference.all == [3, 6, 7, 10]
    assert (reference.median, reference.least, reference.most) == (6.5, 3, 10)
    assert result.ratio("reference", "ours") == 6.5 / 6.5
    assert result.median("ours") == 6.5


def test_the_clock_counts_the_call_and_what_the_device_still_has_to_do() -> None:
    now = [0.0]

    def spend(seconds: float):
        def run() -> None:
            now[0] += seconds

        return run

    assert timed(spend(2.0), wait=spend(0.5), clock=lambda: now[0])() == {"seconds": 2.5}


@pytest.mark.parametrize(
    ("goal", "met", "missed", "text"),
    [
        (faster(2.5), 2.5, 2.4, "at least 2.5 times as fast"),
        (share(0.6, "peak"), 0.6, 0.61, "at most 0.6 of the reference's peak"),
        (below(19, "GiB"), 18.9, float("nan"), "at most 19 GiB"),
    ],
)
def test_goals_say_and_check_both_directions(goal, met: float, missed: float, text: str) -> None:
    assert (goal.is_met(met), goal.is_met(missed), str(goal)) == (True, False, text)


def test_a_row_is_one_json_file_that_names_the_machine(tmp_path: Path) -> None:
    Row(name="work", work="some work", goal=faster(2), value=None).write(tmp_path / "new")
    row = json.loads((tmp_path / "new" / "work.json").read_text())
    assert row["value"] is None
    assert row["goal"]["limit"] == 2
    assert {"torch", "diffusers", "transformers", "cpu", "threads", "device", "date"} <= row[
        "environment"
    ].keys()

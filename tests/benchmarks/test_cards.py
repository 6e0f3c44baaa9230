"""The page's tables of cards and other machines are what the plan says."""

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cards import CARDS, MACHINES, OPTIONS, RESERVED, Option, planned, ways

PAGE = Path(__file__).parents[2] / "kolors_core" / "DRAWING.md"


def table(header: str) -> list[list[str]]:
    """Return the cells of the rows of the page's table with this first cell."""
    lines = PAGE.read_text().partition(f"| {header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_rows_of_exact_images() -> None:
    rows = table("card, such as")
    sizes = [f"{card} GB, {name}" for card, (name, _) in CARDS.items()]
    assert [row[0] for row in rows if row[0]] == sizes
    plan, by_model, by_block = planned(None, None, False, "cuda", torch.float16)
    locked = {"resident": "", "by_model": f"{by_model:.1f}", "by_block": f"{by_block:.1f}"}
    for row, (card, (name, rate)) in zip([row for row in rows if row[0]], CARDS.items(), strict=True):
        exact = next(one for one in OPTIONS if one.images == "the same" and one.peak <= card - RESERVED)
        assert row[1].strip("`") == (exact.flags or "none") and row[2] == "the same"
        seconds = f"{exact.seconds(name, rate):.0f}"
        assert row[3:] == [f"{getattr(plan, exact.placement):.1f}", locked[exact.placement], seconds]
        if exact.placement == "by_block":  # the UNet is copied while it runs, and not slower on these cards
            assert exact.seconds(name, rate) < OPTIONS[1].seconds(name, rate)


def test_the_rows_of_other_machines_have_their_options() -> None:
    shown = [(row[0], row[1].strip("`")) for row in table("machine")]
    assert shown == [(name, machine[-1]) for name, machine in MACHINES.items()]


@dataclass(frozen=True)
class Known(Option):
    """Option whose peak is known."""

    gib: float = 0.0

    @property
    def peak(self) -> float:
        return self.gib


def test_a_card_has_one_way_of_each_kind_until_one_copies_nothing() -> None:
    resident, by_model, by_block, near, small, smaller = options = [
        Known(None, None, placement, False, images, "", gib)
        for placement, images, gib in (
            ("resident", "the same", 19.0), ("by_model", "the same", 11.0), ("by_block", "the same", 3.0),
            ("by_model", "nearly", 6.0), ("resident", "nearly", 9.0), ("resident", "others", 6.5),
        )
    ]  # fmt: skip
    assert ways(24, options) == [resident]
    assert ways(16, options) == [by_model, near, small]
    assert ways(11, options) == [by_block, near, small]
    assert ways(8, options) == [by_block, near, smaller]
    assert ways(5, options) == [by_block] and ways(3, options) == []

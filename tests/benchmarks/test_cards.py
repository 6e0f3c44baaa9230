"""The page's table of cards is what the plan says."""

from pathlib import Path

from benchmarks.cards import CARDS, OPTIONS, RESERVED, planned

PAGE = Path(__file__).parents[2] / "kolors_core" / "performance" / "MEMORY.md"


def test_the_rows_of_exact_images() -> None:
    lines = PAGE.read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if " GB |" in line]
    assert [int(row[0].removesuffix(" GB")) for row in rows] == list(CARDS)
    plan = planned(None, None, 1)
    for row, card in zip(rows, CARDS, strict=True):
        exact = next(one for one in OPTIONS if one.is_exact and one.peak() <= card - RESERVED)
        assert row[1].strip("`") == (exact.flags or "all models resident")
        assert row[2] == f"{getattr(plan, exact.placement):.1f}"

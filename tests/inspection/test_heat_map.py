"""Heat maps: each cell in its value's color with its number, the table of all values; and the intervals."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from kolors_core.inspection.heat_map import CELL, ROW, HeatMap, format_value, render_csv, render_png
from kolors_core.inspection.intervals import mean_interval, share_interval, t_quantile

VALUES = torch.tensor([[0.0, 1.0, math.nan], [0.5, 0.25, 0.75]], dtype=torch.float64)


def heat_map(bounds: tuple[float, float] = (0.0, 1.0), title: str = "share") -> HeatMap:
    return HeatMap(
        title, "chance 0.5", "layer", ["mid", "up.0"], "timestep", ["999", "500", "1"], VALUES,
        VALUES - 0.1, VALUES + 0.1, bounds,
    )  # fmt: skip


def test_cells_have_their_colors_in_their_places() -> None:
    """Found by the color alone: the last row is the lower, the missing cell is white."""
    each = heat_map()
    pixels = np.asarray(render_png("a title", [each]))
    places = {}
    for i, j in [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]:
        color = each.color(float(VALUES[i, j]))
        y, x = np.nonzero((pixels == color).all(-1))
        counted = sum(color == each.color(float(value)) for value in VALUES.flatten() if not value.isnan())
        if counted == 1 and color != (0, 0, 4):
            assert 0.5 * CELL * ROW < len(x) < CELL * ROW
            places[i, j] = float(np.median(y)), float(np.median(x))
    assert places[1, 0][0] - places[0, 1][0] == pytest.approx(ROW, abs=2)
    assert places[1, 1][1] - places[1, 0][1] == pytest.approx(CELL, abs=2)
    assert places[0, 1][1] == pytest.approx(places[1, 1][1], abs=2)


def test_colors_run_between_the_bounds_and_0_is_white_between_opposite_ones() -> None:
    each, signed = heat_map(), heat_map((-1.0, 1.0))
    assert each.color(-5) == each.color(0) == (0, 0, 4) and each.color(9) == (0xFC, 0xFF, 0xA4)
    assert signed.color(0) == (0xF7, 0xF7, 0xF7)
    assert signed.color(-1)[2] > signed.color(-1)[0] and signed.color(1)[0] > signed.color(1)[2]


def test_maps_beside_each_other_share_labels_and_images_stand_below() -> None:
    one, two = render_png("t", [heat_map()]), render_png("t", [heat_map(), heat_map()], 2)
    labels = 2 * one.width - two.width
    assert 8 + 4 * 8 < labels < 90, "the second has no labels of its own"
    lower = render_png("t", [heat_map()], 1, [("red", Image.new("RGB", (8, 8), "red"))])
    assert lower.height > one.height + 96
    assert (np.asarray(lower) == (255, 0, 0)).all(-1).sum() == 96 * 96


def test_the_table_has_every_value_with_its_interval() -> None:
    rows = list(csv.reader(io.StringIO(render_csv([heat_map(title="a, b"), heat_map()]))))
    assert rows[0] == ["measure", "row", "column", "value", "low", "high"] and len(rows) == 1 + 2 * 5
    assert rows[5] == ["a, b", "up.0", "1", "0.75", "0.65", "0.85"]
    assert [format_value(value) for value in (0.123, -0.5, -1e-9, 12.34, 1234)] == [
        "0.12",
        "-0.50",
        "0.00",
        "12.3",
        "1.23e+03",
    ]


def test_quantiles_are_those_of_students_t() -> None:
    """Of tables: two-sided, 95%, and shared by 50 intervals (99.9%)."""
    for freedom, wanted in {3: 3.182, 7: 2.365, 11: 2.201, 60: 2.000}.items():
        assert t_quantile(freedom) == pytest.approx(wanted, rel=0.01)
    assert t_quantile(7, 50) == pytest.approx(5.408, rel=0.01)
    assert t_quantile(10**6) == pytest.approx(1.95996, rel=1e-4)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, half = mean_interval(2 + torch.randn(6, 20_000, generator=generator))
    assert ((mean - half < 2) & (mean + half > 2)).double().mean() == pytest.approx(0.95, abs=0.01)
    with pytest.raises(ValueError, match="at least 4 repeats, got 3"):
        mean_interval(torch.zeros(3, 2))
    low, high = share_interval(torch.tensor([0, 8, 40]), 40)  # Wilson 1927, by hand
    assert low.tolist() == pytest.approx([0, 0.10495, 0.91238], abs=1e-4)
    assert high.tolist() == pytest.approx([0.08762, 0.34760, 1], abs=1e-4)

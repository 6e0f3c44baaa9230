"""Tables and curves for notebooks: escaped, in the page's own colors, and of any values."""

import math
from dataclasses import replace

import pytest
import torch

from kolors_core.notebook import Markup, curve_svg, table_html
from kolors_core.schedulers import EulerDiscreteScheduler
from tests.support.notebooks import check_html

pytestmark = pytest.mark.exact
HOSTILE = '<script>alert("x")</script>&amp;'


def test_all_text_of_a_table_is_escaped() -> None:
    content = table_html(HOSTILE, (HOSTILE, "b"), [(HOSTILE, 3.5), (Markup("<br>"), None)], HOSTILE)
    pages = check_html(content)
    assert pages.texts.count(HOSTILE) == 4 and content.count("<br>") == 1
    assert {"3.5", "None"} <= {*pages.texts}
    assert "thead" not in check_html(table_html("a", (), [])).tags


def test_a_schedule_is_two_curves_with_a_point_a_step() -> None:
    schedule = EulerDiscreteScheduler().schedule(5)
    content = schedule._repr_html_()
    pages = check_html(content)
    assert "Schedule of 5 steps, from sigma" in content and content.count("<svg") == 2
    assert content.count("<circle") == 5 + 5, "the last sigma, 0, has no logarithm"
    assert {"sigma, logarithmic", "timestep"} <= {*pages.texts}
    assert "Schedule of 1 step, " in schedule.keep_last(1)._repr_html_()


def test_a_schedule_that_begins_at_infinity_is_drawn() -> None:
    schedule = EulerDiscreteScheduler().schedule(3)
    sigmas = schedule.sigmas.clone()
    sigmas[0] = math.inf
    content = replace(schedule, sigmas=sigmas)._repr_html_()
    check_html(content)
    assert "from sigma inf" in content and "nan" not in content and content.count("<circle") == 2 + 3


def test_a_curve_falls_where_its_values_do() -> None:
    points = curve_svg("x", [4.0, 1.0, 2.0]).split('points="')[1].split('"')[0].split(" ")
    heights = [float(point.split(",")[1]) for point in points]
    assert heights[0] < heights[2] < heights[1], "y grows downwards"
    equal = curve_svg("x", [3.0, 3.0])
    assert "nan" not in equal and equal.count("<circle") == 2
    assert curve_svg("x", [0.0, math.nan], is_logarithmic=True) == "" == curve_svg("x", [])
    for values in ([1e-5, 1.2345e-5], [1.0, 2.0]):  # a curve begins beside its labels
        content = curve_svg("x", values)
        labels = [text for text in check_html(content).texts if text[0].isdigit()]
        start = float(content.split('points="')[1].split(",")[0])
        assert len(labels) == 2 and 6 * max(map(len, labels)) < start < 100
    assert "<circle" not in curve_svg("x", torch.linspace(0, 1, 100).tolist())

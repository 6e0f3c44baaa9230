"""Utils: sheets of images as the reference's, and the names where scripts import them from."""

from typing import Any

import diffusers.utils
import pytest

import kolors_core.utils
from kolors_core import load_image
from kolors_core.compat.utils import make_image_grid
from tests.support.pipelines import picture

IMAGES = [picture(i, height=16 + 4 * i, width=24) for i in range(6)]


def test_the_names_are_those_of_the_references_utils() -> None:
    assert kolors_core.utils.load_image is load_image
    assert kolors_core.utils.make_image_grid is make_image_grid


@pytest.mark.parametrize(("rows", "cols", "resize"), [(2, 3, None), (3, 2, None), (1, 6, 20), (6, 1, 7)])
def test_a_grid_is_the_references(rows: int, cols: int, resize: int | None) -> None:
    expected = diffusers.utils.make_image_grid(IMAGES, rows, cols, resize)
    assert make_image_grid(IMAGES, rows=rows, cols=cols, resize=resize) == expected


@pytest.mark.parametrize(("given", "message"), [
    ({"rows": 2, "cols": 2}, "2 rows of 2 need 4 images, got 6"),
    ({"rows": 0, "cols": 2}, "rows must be a positive"),
    ({"rows": 2, "cols": 2.5}, "cols must be a positive"),
    ({"rows": 2, "cols": 3, "resize": 0}, "resize must be"),
])  # fmt: skip
def test_wrong_grids(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_image_grid(IMAGES, **given)

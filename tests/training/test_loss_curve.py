"""The curve of a run's losses: high losses are at the top, and odd ones are left out."""

import math
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from kolors_core.training.loss_curve import draw_curve
from kolors_core.training.run_record import Losses

BLUE = (0x1F, 0x5F, 0xBF)


def blue_rows(losses: list[float]) -> tuple[float, float]:
    """Mean row of the blue curve in the left and right half."""
    pixels = np.asarray(draw_curve(losses))
    rows, columns = np.nonzero((pixels == BLUE).all(-1))
    middle = (columns.min() + columns.max()) / 2
    return rows[columns < middle].mean(), rows[columns > middle].mean()


def test_a_falling_loss_falls() -> None:
    left, right = blue_rows([math.exp(-i / 50) for i in range(200)])
    assert right - left > 60
    left, right = blue_rows([math.exp(i / 50) for i in range(20)])
    assert left - right > 30


def test_losses_are_an_image_in_a_notebook_and_odd_ones_are_left_out() -> None:
    png = Losses([0.5, math.nan, math.inf, 0.0, 0.25], first=7)._repr_png_()
    assert png is not None and Image.open(BytesIO(png)).size == (480, 200)
    assert Losses([])._repr_png_() is None and Losses([math.nan])._repr_png_() is None
    alone = np.asarray(draw_curve([0.5]))
    assert (alone == BLUE).all(-1).any(), "one step is a dot"
    with pytest.raises(ValueError, match="no loss to draw"):
        draw_curve([0.0])

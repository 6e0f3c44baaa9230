"""Sheets of images before and after: each pair where its label is, large images within a tile."""

import numpy as np
from PIL import Image

from kolors_core.inspection.before_after import Pair, render_pairs


def colored(color: str, width: int = 32, height: int = 16) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def test_each_before_stands_above_its_after_under_one_title() -> None:
    pairs = [Pair(f"{i} 猫\x1b", colored("red"), colored("blue")) for i in range(5)]
    sheet = np.asarray(render_pairs("five", pairs))
    assert sheet.shape[1] == 64 + 4 * (32 + 16)
    red, blue = ((sheet == color).all(-1) for color in ((255, 0, 0), (0, 0, 255)))
    assert red.sum() == blue.sum() == 5 * 32 * 16
    assert np.array_equal(red[:-20], blue[20:]), "16 pixels of the image and 4 of gap lower"
    assert red[:, 64:96].any(0).all() and not red[:, :64].any(), "the margin has the words"
    assert (sheet[:, :64] < 200).any()


def test_large_images_are_scaled_to_a_tile_and_small_ones_are_not() -> None:
    large, small = (
        render_pairs("", [Pair("", colored("red", *size), colored("red", *size))])
        for size in ((768, 384), (192, 96))
    )
    assert large.size == small.size and large.width == 64 + 192 + 16

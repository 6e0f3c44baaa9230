"""Canny's edges of drawn shapes: where they are, that they close, thresholds, and what connects."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from kolors_core import canny


def drawn(size: int = 64) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (size, size), (20, 20, 20))
    return image, ImageDraw.Draw(image)


def edges(image: Image.Image, low: float = 100, high: float = 200) -> np.ndarray:
    """bool [H, W]."""
    found = canny(image, low, high)
    assert found.mode == "RGB" and found.size == image.size
    pixels = np.asarray(found)
    assert set(np.unique(pixels)) <= {0, 255} and (pixels == pixels[..., :1]).all()
    return pixels[..., 0] > 0


def test_a_step_has_one_edge_on_the_side_that_comes_first() -> None:
    for axis in (0, 1):
        pixels = np.zeros((40, 48, 3), dtype=np.uint8)
        pixels[(slice(None), slice(17, None)) if axis else (slice(23, None),)] = 200
        found = edges(Image.fromarray(pixels))
        wanted = np.zeros_like(found)
        wanted[(slice(None), 16) if axis else (22,)] = True
        assert np.array_equal(found, wanted)


def test_the_outline_of_a_disc_is_thin_closed_and_where_the_disc_ends() -> None:
    image, draw = drawn(96)
    draw.ellipse((20, 24, 75, 79), fill=(220, 180, 60))
    found = edges(image)
    y, x = np.nonzero(found)
    distance = np.hypot(x - 47.5, y - 51.5)
    assert abs(distance - 28).max() < 1.5
    assert len(x) < 2.2 * np.pi * 28, "thin: hardly more pixels than the circle is long"
    # Water poured in at a corner does not come to the middle: the outline has no gap.
    water = found.astype(np.uint8)
    picture = Image.fromarray(water)
    ImageDraw.floodfill(picture, (0, 0), 7)
    assert np.asarray(picture)[51, 47] == 0


def test_a_diagonal_is_found_as_one_line() -> None:
    image, draw = drawn()
    draw.polygon([(0, 63), (63, 0), (63, 63)], fill=(240, 240, 240))
    found = edges(image)[2:-2, 2:-2]
    y, x = np.nonzero(found)
    assert len(x) >= 58 and abs(x + y + 4 - 62).max() <= 1.5


def test_an_edge_is_where_the_gradient_exceeds_the_upper_threshold() -> None:
    pixels = np.full((16, 16, 3), 100, dtype=np.uint8)
    pixels[:, 8:] = 150  # |dx| = 4 * 50
    assert not edges(Image.fromarray(pixels), 100, 200).any(), "not more than 200"
    assert edges(Image.fromarray(pixels), 100, 199).sum() == 16
    assert not edges(Image.fromarray(pixels), 200, 200).any()


def test_a_weak_edge_counts_where_it_is_connected_to_a_strong_one() -> None:
    """A step that fades out: the weak half goes with the strong one, and alone it is none."""
    pixels = np.full((60, 24, 3), 100, dtype=np.uint8)
    pixels[:30, 12:] = 160  # 240
    pixels[30:, 12:] = 140  # 160
    found = edges(Image.fromarray(pixels))
    assert found[:29, 11].all() and found[31:, 11].all()
    alone = pixels.copy()
    alone[:30, 12:] = 140
    assert not edges(Image.fromarray(alone)).any()
    apart = np.concatenate([pixels, alone[:, ::-1]], axis=1)  # the weak one's step is 24 pixels away
    apart[:, 24:] = alone
    found = edges(Image.fromarray(apart))
    assert found[31:, 11].all() and not found[:, 30:].any()


def test_the_strongest_colour_counts() -> None:
    pixels = np.full((16, 16, 3), 100, dtype=np.uint8)
    pixels[:, 8:] = (120, 100, 170)  # grey would see 4 * 12
    assert edges(Image.fromarray(pixels)).sum() == 16
    assert not edges(Image.fromarray(pixels).convert("L")).any()


def test_it_is_deterministic_and_takes_any_mode_and_size() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert np.array_equal(edges(image), edges(image)) and edges(image).any()
    assert np.array_equal(edges(image.convert("RGBA")), edges(image))
    assert not edges(Image.new("RGB", (1, 1))).any()
    assert not edges(Image.new("1", (9, 8), 1)).any()


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a PIL image, got ndarray"):
        canny(np.zeros((4, 4, 3)))  # type: ignore[arg-type]
    for low, high in ((200, 100), (-1, 5)):
        with pytest.raises(ValueError, match=f"got low {low} and high {high}"):
            canny(Image.new("RGB", (4, 4)), low, high)

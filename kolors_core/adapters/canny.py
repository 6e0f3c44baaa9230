"""Canny edge detection, as the control image of a Canny ControlNet.

J. Canny, A Computational Approach to Edge Detection (IEEE PAMI 8, 1986), as by OpenCV's default: no blur,
Sobel 3x3, |dx| + |dy| as magnitude, the strongest of three colors. Shapes: H and W of the image in pixels.
"""

from typing import TYPE_CHECKING

import numpy as np

from kolors_core.image import to_8_bits

if TYPE_CHECKING:
    from PIL.Image import Image

TAN_22 = 13573  # tan(22.5 degrees) in units of 2^-15, as OpenCV rounds it


def canny(image: "Image", low: float = 100, high: float = 200) -> "Image":
    """Detect edges: an RGB image of the same size, with white edges, one pixel wide, on black.

    low, high: thresholds of the gradient's magnitude, up to 2,040: an edge is above `high`, or above `low`
    and connected to such a pixel. TypeError for no PIL image, ValueError for negative or swapped thresholds.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(image).__name__}")
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got low {low} and high {high}")
    magnitude, dx, dy = _gradient(np.asarray(to_8_bits(image).convert("RGB")))
    peaks = _suppress_non_maxima(magnitude, dx, dy, low)
    return Image.fromarray(_hysteresis(peaks, peaks & (magnitude > high))).convert("RGB")


def _gradient(pixels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Compute |dx| + |dy|, dx and dy [H, W] of the color with the largest sum; pixels: uint8 [H, W, 3]."""
    x = np.pad(pixels.astype(np.int16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = x[:-2] + 2 * x[1:-1] + x[2:]  # [H, W + 2, 3]
    columns = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]  # [H + 2, W, 3]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]  # [H, W, 3]
    magnitude = abs(dx) + abs(dy)
    largest = magnitude.argmax(-1, keepdims=True)  # the first of equal ones
    return tuple(np.take_along_axis(values, largest, -1)[..., 0] for values in (magnitude, dx, dy))


def _suppress_non_maxima(magnitude: np.ndarray, dx: np.ndarray, dy: np.ndarray, low: float) -> np.ndarray:
    """Find where the magnitude exceeds `low` and is largest along its direction, one of four: bool [H, W]."""
    padded = np.pad(magnitude, 1)  # zero outside the image
    y, x = np.nonzero(magnitude > low)
    center, dx, dy = magnitude[y, x], dx[y, x].astype(np.int64), dy[y, x].astype(np.int64)
    threshold = TAN_22 * abs(dx)
    is_horizontal = abs(dy) * 2**15 < threshold  # within 22.5 degrees
    is_vertical = abs(dy) * 2**15 > threshold + abs(dx) * 2**16  # tan(67.5) is tan(22.5) + 2
    slant = np.where((dx < 0) != (dy < 0), -1, 1)
    step_y, step_x = np.where(is_horizontal, 0, 1), np.select([is_horizontal, is_vertical], [1, 0], slant)
    before, after = padded[y + 1 - step_y, x + 1 - step_x], padded[y + 1 + step_y, x + 1 + step_x]
    # Of two equal neighbors the first counts; on a diagonal, neither.
    is_peak = (center > before) & np.where(is_horizontal | is_vertical, center >= after, center > after)
    peaks = np.zeros_like(magnitude, dtype=bool)
    peaks[y[is_peak], x[is_peak]] = True
    return peaks


def _hysteresis(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """Select the pixels of `weak` that are connected to `strong`, over sides and corners: bool [H, W]."""
    padded = np.pad(weak, 1)
    remaining = padded.ravel()
    found = np.zeros_like(remaining)
    neighbors = np.array([dy * padded.shape[1] + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    front = np.flatnonzero(np.pad(strong, 1))
    while len(front):
        found[front], remaining[front] = True, False
        near = (front[:, None] + neighbors).ravel()
        front = np.unique(near[remaining[near]])
    return found.reshape(padded.shape)[1:-1, 1:-1]

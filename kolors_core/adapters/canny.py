"""Canny's edges of an image, as the control image of a Canny ControlNet.

J. Canny, A Computational Approach to Edge Detection (IEEE PAMI 8, 1986), with the choices of OpenCV's
default: no blur, Sobel 3x3, |dx| + |dy| as the gradient's size, of three colors the strongest.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

TAN_22 = 13573  # tan(22.5 degrees) in units of 2^-15, as OpenCV rounds it


def canny(image: "Image", low: float = 100, high: float = 200) -> "Image":
    """White edges, one pixel wide, on black: an RGB image of the same size.

    low, high: of the gradient's size, up to 2,040: an edge is where it exceeds `high`, and what is connected
    to that and exceeds `low`. Raises TypeError for what is no PIL image, ValueError for thresholds that are
    negative or in the wrong order.
    """
    import numpy as np
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise TypeError(f"expected a PIL image, got {type(image).__name__}")
    if not 0 <= low <= high:
        raise ValueError(f"expected 0 <= low <= high, got low {low} and high {high}")
    size, dx, dy = _gradient(np.asarray(image.convert("RGB")))
    thin = _thinned(size, dx, dy, low)
    edges = _connected(thin, thin & (size > high))
    return Image.fromarray(edges).convert("RGB")


def _gradient(pixels: "np.ndarray") -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """|dx| + |dy|, dx and dy [H, W] of the color where that is largest; pixels: uint8 [H, W, 3]."""
    import numpy as np

    x = np.pad(pixels.astype(np.int16), ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = x[:-2] + 2 * x[1:-1] + x[2:]  # [H, W + 2, 3]
    columns = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:]  # [H + 2, W, 3]
    dx, dy = rows[:, 2:] - rows[:, :-2], columns[2:] - columns[:-2]  # [H, W, 3]
    size = abs(dx) + abs(dy)
    largest = size.argmax(-1, keepdims=True)  # of equal ones the first
    size, dx, dy = (np.take_along_axis(of, largest, -1)[..., 0] for of in (size, dx, dy))
    return size, dx, dy


def _thinned(size: "np.ndarray", dx: "np.ndarray", dy: "np.ndarray", low: float) -> "np.ndarray":
    """Where the gradient exceeds `low` and is largest along its direction, of four: bool [H, W]."""
    import numpy as np

    around = np.pad(size, 1)  # nothing beyond the image
    y, x = np.nonzero(size > low)
    own, dx, dy = size[y, x], dx[y, x].astype(np.int64), dy[y, x].astype(np.int64)
    flat = TAN_22 * abs(dx)
    is_across = abs(dy) * 2**15 < flat  # left to right, within 22.5 degrees
    is_along = abs(dy) * 2**15 > flat + abs(dx) * 2**16  # up and down: tan(67.5) is tan(22.5) + 2
    is_diagonal = ~(is_across | is_along)
    slant = np.where((dx < 0) != (dy < 0), -1, 1)
    step_y = np.where(is_across, 0, 1)
    step_x = np.where(is_across, 1, np.where(is_along, 0, slant))
    before, after = around[y + 1 - step_y, x + 1 - step_x], around[y + 1 + step_y, x + 1 + step_x]
    # Of two equal ones side by side the first counts; on a diagonal, neither.
    is_peak = (own > before) & np.where(is_diagonal, own > after, own >= after)
    thin = np.zeros_like(size, dtype=bool)
    thin[y[is_peak], x[is_peak]] = True
    return thin


def _connected(weak: "np.ndarray", strong: "np.ndarray") -> "np.ndarray":
    """What of `weak` is connected to `strong`, over sides and corners: bool [H, W]."""
    import numpy as np

    around = np.pad(weak, 1)
    stride = around.shape[1]
    left = around.ravel()  # what is not yet found
    found = np.zeros_like(left)
    neighbours = np.array([dy * stride + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    front = np.flatnonzero(np.pad(strong, 1))
    while len(front):
        found[front], left[front] = True, False
        near = (front[:, None] + neighbours).ravel()
        front = np.unique(near[left[near]])
    return found.reshape(around.shape)[1:-1, 1:-1]

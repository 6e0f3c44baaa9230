"""Loss curve of a run as a small image: each step in gray, the running mean in blue; a logarithmic axis."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 480, 200, 56, 20, 8  # pixels
POINTS = 50  # of the running mean


def draw_curve(losses: Sequence[float], first: int = 0) -> "Image":
    """Draw losses of consecutive steps, of which `first` is the first's number; ValueError for none."""
    from PIL import Image, ImageDraw

    known = [(step, math.log(loss)) for step, loss in enumerate(losses) if 0 < loss < math.inf]
    if not known:
        raise ValueError("no loss to draw: expected some positive, finite ones")
    low, high = min(y for _, y in known), max(y for _, y in known)
    low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
    last = max(1, len(losses) - 1)

    def place(step: float, y: float) -> tuple[float, float]:
        x = LEFT + step / last * (WIDTH - LEFT - EDGE)
        return x, EDGE + (high - y) / (high - low) * (HEIGHT - BOTTOM - 2 * EDGE)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for y in (low, (low + high) / 2, high):
        draw.line([place(0, y), place(last, y)], "#e0e0e0")
        draw.text((LEFT - 6, place(0, y)[1]), f"{math.exp(y):.3g}", "#444444", anchor="rm")
    for step in (0, len(losses) - 1):
        anchor = "la" if step == 0 else "ra"
        draw.text((place(step, low)[0], HEIGHT - BOTTOM), f"step {first + step}", "#444444", anchor=anchor)
    draw.line([place(*point) for point in known], "#b8b8b8")
    span = -(-len(known) // POINTS)
    parts = [known[i : i + span] for i in range(0, len(known), span)]
    means = [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]
    draw.line([place(step, y) for step, y in means], "#1f5fbf", 2)
    for x, y in (place(*point) for point in known if len(known) <= POINTS):
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), "#1f5fbf")
    return image

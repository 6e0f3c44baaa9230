"""Tables and curves as HTML, as which objects show themselves in notebooks.

They take the colors of the page around them, light or dark, and have no script. All text is escaped.
Shapes: n steps.
"""

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

WIDTH, HEIGHT, MARGIN, DIGIT = 300, 130, 24, 7  # of a curve and its labels, in pixels
CELL = ' style="text-align: left; vertical-align: top"'  # notebooks align cells to the right
DOTS = 60  # most points of a curve that are marked one by one


class Markup(str):
    """HTML that stands in a table as it is; other text is escaped."""


def escape(text: object) -> str:
    """Escape a text, unless it is `Markup`."""
    return text if isinstance(text, Markup) else html.escape(str(text))


def table_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Format a table with its title above and a note below; columns: their names, or none for no header."""
    lines = [f"<tr>{''.join(f'<td{CELL}>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th{CELL}>{escape(name)}</th>" for name in columns)
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    below = f"<div>{escape(note)}</div>" if note else ""
    return (
        f"<div><div><b>{escape(title)}</b></div><table>{head}<tbody>{''.join(lines)}</tbody></table>"
        f"{below}</div>"
    )


def curve_svg(title: str, values: Sequence[float], is_logarithmic: bool = False) -> str:
    """Draw values over their index; left out are those that cannot be drawn, such as 0 on a logarithmic axis.

    Labels are the values of the lower and the upper end.
    """
    points = [
        (i, math.log(value) if is_logarithmic else value)
        for i, value in enumerate(values)
        if math.isfinite(value) and (value > 0 or not is_logarithmic)
    ]
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    ends = [f"{math.exp(y) if is_logarithmic else y:.4g}" for y in (high, low)]
    left = max(MARGIN, DIGIT * max(map(len, ends)) + 6)  # beside the labels
    across, down = WIDTH - left - MARGIN, HEIGHT - 2 * MARGIN
    places = [
        f"{left + across * i / max(1, len(values) - 1):.1f},"
        f"{MARGIN + down * ((high - y) / (high - low) if high > low else 0.5):.1f}"
        for i, y in points
    ]
    dots = "".join(
        '<circle cx="{}" cy="{}" r="2" fill="currentColor"/>'.format(*place.split(","))
        for place in (places if len(places) <= DOTS else ())
    )
    text = 'font-size="11" fill="currentColor"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}"><title>{escape(title)}</title>'
        f'<text x="{WIDTH / 2}" y="12" text-anchor="middle" {text}>{escape(title)}</text>'
        f'<text x="0" y="{MARGIN + 4}" {text} opacity="0.7">{ends[0]}</text>'
        f'<text x="0" y="{HEIGHT - 6}" {text} opacity="0.7">{ends[1]}</text>'
        f'<polyline points="{" ".join(places)}" fill="none" stroke="currentColor" opacity="0.6"/>{dots}</svg>'
    )


def schedule_html(schedule: Any) -> str:
    """Draw the sigmas and timesteps of a `Schedule` over its n steps."""
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.tolist()
    steps = f"{len(timesteps)} step{'s' * (len(timesteps) != 1)}"
    title = f"{type(schedule).__name__} of {steps}, from sigma {sigmas[0]:.4g} to {sigmas[-1]:.4g}"
    curves = (
        curve_svg("sigma, logarithmic", sigmas, is_logarithmic=True), curve_svg("timestep", timesteps)
    )  # fmt: skip
    return f"<div><div><b>{escape(title)}</b></div>{''.join(curves)}</div>"

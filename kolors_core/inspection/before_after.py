"""Sheet of images before and after a change: pairs in rows of columns, each under its label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kolors_core.inspection.attention_report import (
    GAP,
    LINE,
    MUTED_COLOR,
    TEXT_COLOR,
    TILE,
    font,
    shortened,
    wrapped,
)  # fmt: skip

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS, MARGIN = 4, 64  # pairs in a row, and pixels at the left for the words before and after


@dataclass(frozen=True)
class Pair:
    """An image before and after a change, of the same size, and their label."""

    label: str
    before: "Image"
    after: "Image"


def render_pairs(title: str, pairs: Sequence[Pair]) -> "Image":
    """Draw pairs, each before above after, of at most `TILE` pixels a side, under a title."""
    from PIL import Image, ImageDraw

    scale = min(1, TILE / max(max(pair.before.size) for pair in pairs))
    w, h = (max(1, round(scale * max(sides))) for sides in zip(*(p.before.size for p in pairs), strict=True))
    columns = min(COLUMNS, len(pairs))
    width = MARGIN + columns * (w + GAP)
    lines = wrapped(title, width - 2 * GAP, 8)
    top, row = 2 * GAP + LINE * len(lines), LINE + 2 * h + GAP + 4
    sheet = Image.new("RGB", (width, top + row * -(-len(pairs) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((GAP, GAP + LINE * i), line, TEXT_COLOR, font())
    for i, pair in enumerate(pairs):
        x, y = MARGIN + i % columns * (w + GAP), top + i // columns * row
        draw.text((x, y), shortened(pair.label, w), TEXT_COLOR, font())
        for k, (name, image) in enumerate((("before", pair.before), ("after", pair.after))):
            place = y + LINE + k * (h + 4)
            sheet.paste(image.convert("RGB").resize((w, h), Image.Resampling.LANCZOS), (x, place))
            if i % columns == 0:
                draw.text((8, place + h // 2 - 8), name, MUTED_COLOR, font())
    return sheet

"""Heat maps of measured values with their numbers, as an image (PNG) and as a table (CSV).

Shapes: R rows, C columns.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from kolors_core.image import png_bytes
from kolors_core.inspection.attention_report import GAP, HEAT, MUTED_COLOR, TEXT_COLOR, font, shown, wrapped

if TYPE_CHECKING:
    from PIL.Image import Image

# Of ColorBrewer's RdBu, from negative over 0 to positive.
SIGNED = ["2166ac", "92c5de", "f7f7f7", "f4a582", "b2182b"]
CELL, ROW, LINE, SIDE = 52, 24, 18, 96  # pixels: a cell's width and height, a line of text, an image


@dataclass(frozen=True)
class HeatMap:
    """Values [R, C] over two axes with their 95% intervals; NaN where there is none.

    note: of what the values are to be compared with. bounds: values of the first and last color; if they are
    opposite, 0 is white.
    """

    title: str
    note: str
    row_axis: str
    rows: Sequence[str]
    column_axis: str
    columns: Sequence[str]
    values: Tensor
    low: Tensor
    high: Tensor
    bounds: tuple[float, float] = (0.0, 1.0)

    def color(self, value: float) -> tuple[int, int, int]:
        """Interpolate a value's color, red, green and blue."""
        low, high = self.bounds
        colors = [bytes.fromhex(color) for color in (SIGNED if low == -high else HEAT)]
        place = min(max((value - low) / (high - low), 0), 1) * (len(colors) - 1)
        i = min(int(place), len(colors) - 2)
        red, green, blue = (round(a + (b - a) * (place - i)) for a, b in zip(*colors[i : i + 2], strict=True))
        return red, green, blue

    def _repr_png_(self) -> bytes:  # in notebooks
        return png_bytes(_draw(self, has_labels=True))


def format_value(value: float) -> str:
    """Format a value in four characters where possible: two decimals, and fewer from 10 on."""
    places = 2 if abs(value) < 9.995 else 1
    return f"{value:.{places}f}".replace("-0.00", "0.00") if abs(value) < 99.95 else f"{value:.3g}"


def render_csv(maps: Sequence[HeatMap]) -> str:
    """Format the values as CSV: a line a cell, with the low and high end of its interval."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["measure", "row", "column", "value", "low", "high"])
    for each in maps:
        for i, row in enumerate(each.rows):
            for j, column in enumerate(each.columns):
                cell = [float(part[i, j]) for part in (each.values, each.low, each.high)]
                if not math.isnan(cell[0]):
                    table.writerow([each.title, row, column, *(f"{value:.6g}" for value in cell)])
    return text.getvalue()


def render_png(
    title: str, maps: Sequence[HeatMap], across: int = 1, images: Sequence[tuple[str, "Image"]] = ()
) -> "Image":
    """Draw heat maps, `across` beside each other, under a title; below them images, each with its label."""
    from PIL import Image

    axes = [(each.row_axis, each.rows) for each in maps]
    are_new = [i % across == 0 or axis != axes[i - 1] for i, axis in enumerate(axes)]
    tiles = [_draw(each, has_labels=is_new) for each, is_new in zip(maps, are_new, strict=True)]
    lines = [tiles[i : i + across] for i in range(0, len(tiles), across)]
    width = GAP + max(sum(tile.width + GAP for tile in line) for line in lines)
    fit, texts = max(1, (width - GAP) // (SIDE + GAP)), wrapped(title, width - 2 * GAP, 8)
    lines += [[_labelled(*pair) for pair in images[i : i + fit]] for i in range(0, len(images), fit)]
    y = 2 * GAP + LINE * len(texts)
    height = y + sum(max(tile.height for tile in line) + GAP for line in lines)
    sheet = Image.new("RGB", (width, height), "white")
    _write(sheet, GAP, GAP, texts, TEXT_COLOR)
    for line in lines:
        x, bottom = GAP, y + max(tile.height for tile in line)
        for tile in line:
            sheet.paste(tile, (x, bottom - tile.height))
            x += tile.width + GAP
        y = bottom + GAP
    return sheet


def _labelled(label: str, image: "Image") -> "Image":
    from PIL import Image

    tile = Image.new("RGB", (SIDE, SIDE + LINE * 3), "white")
    tile.paste(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    _write(tile, 0, SIDE, wrapped(label, SIDE, 3), TEXT_COLOR)
    return tile


def _write(sheet: "Image", x: int, y: int, lines: Sequence[str], color: str) -> int:
    from PIL import ImageDraw

    for line in lines:
        ImageDraw.Draw(sheet).text((x, y), line, color, font())
        y += LINE
    return y


def _draw(each: HeatMap, has_labels: bool) -> "Image":
    from PIL import Image, ImageDraw

    if not has_labels:
        each = replace(each, rows=[""] * len(each.rows), row_axis="")
    left = max(round(font().getlength(shown(row))) for row in [*each.rows, each.row_axis]) + 8 * has_labels
    cell = max(CELL, *(8 + round(font().getlength(shown(column))) for column in each.columns))
    width = left + cell * len(each.columns)
    title, note = wrapped(each.title, width, 4), wrapped(each.note, width, 6)
    top = LINE * (len(title) + len(note) + 1) + 4
    tile = Image.new("RGB", (width, top + ROW * len(each.rows) + 2 * LINE), "white")
    y = _write(tile, 0, 0, title, TEXT_COLOR)
    _write(tile, 0, y, note, MUTED_COLOR)
    draw = ImageDraw.Draw(tile)
    draw.text((left - 8, top - LINE), each.row_axis, TEXT_COLOR, font(), anchor="ra")
    for i, row in enumerate(each.rows):
        y = top + ROW * i
        draw.text((left - 8, y + ROW // 2), shown(row), TEXT_COLOR, font(), anchor="rm")
        for j, value in enumerate(each.values[i].tolist()):
            if not math.isnan(value):
                color = each.color(value)
                is_dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), color, strict=True)) < 128
                x = left + cell * j
                draw.rectangle((x, y, x + cell - 2, y + ROW - 2), color)
                ink = "white" if is_dark else "black"
                draw.text((x + cell / 2 - 1, y + ROW / 2 - 1), format_value(value), ink, font(), anchor="mm")
    bottom = top + ROW * len(each.rows)
    for j, column in enumerate(each.columns):
        draw.text((left + cell * (j + 0.5) - 1, bottom), shown(column), TEXT_COLOR, font(), anchor="ma")
    draw.text((left + cell * len(each.columns) / 2, bottom + LINE), each.column_axis, TEXT_COLOR, font(),
              anchor="ma")  # fmt: skip
    return tile

"""Comparison sheets: the images of a grid of settings, labeled, in one image that says how it was made."""

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from kolors_core.cli.options import parse_source_scale
from kolors_core.inspection.attention_report import font, shortened, wrapped
from kolors_core.ui.requests import Request

if TYPE_CHECKING:
    from PIL.Image import Image

AXES = ("prompt", "seed", "steps", "sampler", "schedule", "guidance", "lora_weight")
MOST_CELLS = 64
GAP, LINE, INK, SOFT = 12, 20, "#1a1a1a", "#6a6a6a"

Axis = tuple[str, Sequence[Any]]


def axes_of(given: Any) -> list[Axis]:
    """Check the axes of a sheet: columns, rows and, as several tables, a third; ValueError for others."""
    if not isinstance(given, list) or not 1 <= len(given) <= 3:
        raise ValueError("a sheet has one, two or three axes")
    axes: list[Axis] = []
    for one in given:
        name, values = (one.get("name"), one.get("values")) if isinstance(one, dict) else (None, None)
        if name not in AXES:
            raise ValueError(f"an axis is one of {', '.join(AXES)}, got {str(name)[:100]!r}")
        if not isinstance(values, list) or not values:
            raise ValueError(f"the axis {name} has no values")
        if name in (other for other, _ in axes):
            raise ValueError(f"two axes are {name}")
        axes.append((name, values))
    count = len(list(product(*(values for _, values in axes))))
    if count > MOST_CELLS:
        raise ValueError(f"a sheet may have {MOST_CELLS} images, got {count}")
    return axes


def cells(request: Request, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """Return the request of each image, the first axis running fastest."""
    found = []
    for values in product(*(values for _, values in reversed(axes))):
        cell = dict(request)
        for (name, _), value in zip(reversed(axes), values, strict=True):
            if name == "lora_weight":
                given = cell.get("lora") or ()
                loras = [given] if isinstance(given, str) else [str(one) for one in given]
                if not loras:
                    raise ValueError("the axis lora_weight needs a LoRA")
                cell["lora"] = [f"{parse_source_scale(loras[0])[0]}:{value}", *loras[1:]]
            else:
                cell[name] = value
        found.append(cell)
    return found


def _named(name: str, value: Any) -> str:
    return f"{name.replace('_', ' ')} {value}"


def label(name: str, value: Any, width: int) -> str:
    """Say a value of an axis in `width` pixels: without its name if it is too long for both."""
    full = _named(name, value)
    return full if font().getlength(full) <= width else shortened(str(value), width)


def render(images: Sequence["Image"], axes: Sequence[Axis], title: str) -> "Image":
    """Draw the sheet: columns are the first axis, rows the second, tables under each other the third."""
    from PIL import Image, ImageDraw

    (across, columns), (down, rows), (deep, tables) = (*axes, *[("", [""])] * (3 - len(axes)))
    w, h = images[0].size
    margin = max([0, *(int(font().getlength(_named(down, value))) for value in rows if down)])
    margin = min(margin, 2 * w) + (GAP if down else 0)
    width = GAP + margin + len(columns) * (w + GAP)
    head = wrapped(title, max(width - 2 * GAP, 8 * LINE), 4)
    table = (LINE if deep else 0) + LINE + len(rows) * (h + GAP)
    height = 2 * GAP + LINE * len(head) + len(tables) * table
    sheet = Image.new("RGB", (max(width, 10 * LINE), height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(head):
        pen.text((GAP, GAP + i * LINE), line, INK, font())
    for place, image in enumerate(images):
        row, column = divmod(place, len(columns))
        depth, row = divmod(row, len(rows))
        x, top = GAP + margin + column * (w + GAP), 2 * GAP + LINE * len(head) + depth * table
        y = top + (LINE if deep else 0) + LINE + row * (h + GAP)
        if deep and not row and not column:
            pen.text((GAP, top), label(deep, tables[depth], width), INK, font())
        if not row:
            pen.text((x, y - LINE), label(across, columns[column], w), SOFT, font())
        if down and not column:
            pen.text((GAP, y + h // 2 - LINE // 2), label(down, rows[row], margin), SOFT, font())
        sheet.paste(image.convert("RGB").resize((w, h)), (x, y))
    return sheet

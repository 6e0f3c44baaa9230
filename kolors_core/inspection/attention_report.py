"""Attention reports: each token's attention over the image, as a sheet (PNG) and an offline page (HTML).

Shapes: T displayed tokens, h and w of a map.
"""

import html
import json
import lzma
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

import torch
import torch.nn.functional as F
from torch import Tensor

from kolors_core.image import png_bytes

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

HERE = Path(__file__).parent
# Nine colors of matplotlib's inferno (CC0), from least to most, of evenly increasing brightness.
HEAT = ["000004", "1f0c48", "550f6d", "88226a", "ba3655", "e35933", "f98c0a", "f9c932", "fcffa4"]
STRENGTH = 0.6  # of a map over the image
HTML_MAP_SIZE, MAPS_PER_ROW = 32, 16  # pixels of a map's longer side in the page, and maps a row
TILE, GAP, LINE, COLUMNS = 192, 16, 20, 6  # of the sheet; the first three in pixels
TEXT_COLOR, MUTED_COLOR = "#1a1a1a", "#6a6a6a"
PARTS = {"all": "all layers", "down": "down path", "mid": "mid block", "up": "up path"}


@dataclass(frozen=True)
class Token:
    """Displayed token: its label, the tokenizer's pieces, and its columns among all tokens."""

    label: str
    pieces: str
    columns: slice


@dataclass(frozen=True)
class Explanation:
    """Attention of a generated image to each token of its prompt.

    views: by layers (one of `PARTS`) and steps ("all", "1 to 8", ...), the first ("all", "all"): each token's
    share of the attention at each pixel, [T, h, w]. facts: further text for the report, by name.
    """

    prompt: str
    image: "Image"
    tokens: list[Token]
    views: dict[tuple[str, str], Tensor]
    facts: dict[str, str]

    def __repr__(self) -> str:
        """Return the prompt, its displayed tokens, and which layers and steps there are views of."""
        parts, spans = (", ".join(dict.fromkeys(names)) for names in zip(*self.views, strict=True))
        labels = " ".join(token.label for token in self.tokens)
        title = f"{type(self).__name__} of {self.prompt!r}"
        return f"{title}\n  tokens: {labels}\n  layers: {parts}\n  steps: {spans}"

    def _repr_png_(self) -> bytes:  # in notebooks: the map of each token, under its name
        return png_bytes(render_png(self))


def normalize(maps: Tensor) -> Tensor:
    """Scale maps [..., h, w] each from its minimum, 0, to its maximum, 1; a constant one becomes 0."""
    least, most = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - least) / (most - least).clamp(min=1e-12)


def colorize(levels: Tensor) -> "Image":
    """Convert levels [h, w] from 0 to 1 to an image of w by h pixels in the colors of `HEAT`."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray((levels * 255).round().to(torch.uint8).numpy())
    positions, channels = np.linspace(0, len(HEAT) - 1, 256), zip(*map(bytes.fromhex, HEAT), strict=True)
    palette = [np.interp(positions, range(len(HEAT)), channel) for channel in channels]
    image.putpalette(np.stack(palette, axis=1).round().astype("uint8").tobytes())
    return image


def shown(text: str, is_hidden: Callable[[str], bool] = lambda _: False) -> str:
    """Replace characters without a glyph (controls, direction marks) and hidden ones by their code points."""
    return "".join(f"U+{ord(c):04X}" if category(c)[0] == "C" or is_hidden(c) else c for c in text)


@cache
def font() -> "FreeTypeFont":
    """Load the embedded font, 16 pixels high: the same on every machine."""
    from PIL import ImageFont

    content = lzma.decompress((HERE / "font" / "unifont.otf.xz").read_bytes())
    return ImageFont.truetype(BytesIO(content), 16, layout_engine=ImageFont.Layout.BASIC)


def has_no_glyph(char: str) -> bool:
    """Return whether the font has only a blank for a character that is no space."""
    return not char.isspace() and font().getmask(char).getbbox() is None


def wrapped(text: str, width: int, most: int) -> list[str]:
    """Break a text between words or Chinese characters, into at most `most` lines of `width` pixels."""
    lines = [""]
    for word in re.findall(r"[!-~]{1,20} ?|.", shown(text, has_no_glyph)):
        if font().getlength(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]}…"]


def shortened(text: str, width: int) -> str:
    """Cut a text to `width` pixels."""
    text = shown(text, has_no_glyph)
    if font().getlength(text) <= width:
        return text
    return next(cut for n in range(len(text), -1, -1) if font().getlength(cut := f"{text[:n]}…") <= width)


def displayed_facts(explanation: Explanation) -> dict[str, str]:
    """Return the facts for people: by names of words, without JSON, which is for programs."""
    facts = explanation.facts.items()
    return {name.replace("_", " "): value for name, value in facts if not _is_json(value)}


def _is_json(text: str) -> bool:
    try:
        return text.startswith(("{", "[")) and isinstance(json.loads(text), dict | list)
    except (ValueError, RecursionError):
        return False


def render_png(explanation: Explanation) -> "Image":
    """Draw the image, and for each token its map of all layers and steps over the gray image, labeled."""
    from PIL import Image, ImageDraw

    sides = explanation.image.size
    w, h = (max(1, round(side * TILE / max(sides))) for side in sides)
    image = explanation.image.convert("RGB").resize((w, h), Image.Resampling.LANCZOS)
    gray, tiles = image.convert("L").convert("RGB"), [(image, "the image", "")]
    for token, share in zip(explanation.tokens, explanation.views["all", "all"], strict=True):
        overlay = colorize(normalize(share)).convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
        tiles.append((Image.blend(gray, overlay, STRENGTH), token.label, f"{share.mean():.1%}"))
    columns = min(COLUMNS, len(tiles))
    width = GAP + columns * (TILE + GAP)
    facts = "; ".join(f"{name}: {value}" for name, value in displayed_facts(explanation).items())
    lines = [(line, TEXT_COLOR) for line in wrapped(explanation.prompt, width - 2 * GAP, 8)]
    lines += [(line, MUTED_COLOR) for line in wrapped(facts, width - 2 * GAP, 12)]
    top, row = 2 * GAP + LINE * len(lines), h + LINE + GAP
    sheet = Image.new("RGB", (width, top + row * -(-len(tiles) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (line, color) in enumerate(lines):
        draw.text((GAP, GAP + LINE * i), line, color, font())
    for i, (tile, label, share) in enumerate(tiles):
        x, y = GAP + i % columns * (TILE + GAP), top + i // columns * row
        sheet.paste(tile, (x, y))
        label = shortened(label, int(TILE - font().getlength(share) - LINE))
        draw.text((x, y + h + 2), label, TEXT_COLOR, font())
        draw.text((x + TILE, y + h + 2), share, MUTED_COLOR, font(), anchor="ra")
    return sheet


def render_html(explanation: Explanation) -> str:
    """Fill in the page `attention_report.html`, which needs no other file and no network."""
    from einops import rearrange

    def escape(text: str) -> str:
        return html.escape(shown(text))

    views = []
    for (part, span), maps in explanation.views.items():
        shares, (h, w) = " ".join(f"{share:.4f}" for share in maps.mean((1, 2)).tolist()), maps.shape[-2:]
        scale = max(1, HTML_MAP_SIZE // max(h, w))  # browsers enlarge linearly, which shows in coarse maps
        levels = F.interpolate(normalize(maps)[None], scale_factor=scale, mode="bicubic")[0].clamp(0, 1)
        levels = F.pad(levels, (0, 0, 0, 0, 0, -len(levels) % MAPS_PER_ROW))  # [rows * MAPS_PER_ROW, h, w]
        grid = rearrange(levels, "(rows across) h w -> (rows h) (across w)", across=MAPS_PER_ROW)
        views.append(
            f'<img class="view" alt="" data-part="{part}" data-span="{span}" data-shares="{shares}" '
            f'data-size="{w} by {h}" src="{data_uri(colorize(grid))}">'
        )
    tokens = [
        f'<button type="button" title="{escape(token.pieces)}"><bdi>{escape(token.label)}</bdi></button>'
        for token in explanation.tokens
    ]
    facts = [
        f"<dt>{escape(name)}</dt><dd><bdi>{escape(value)}</bdi></dd>"
        for name, value in displayed_facts(explanation).items()
    ]
    spans = {span: "all steps" if span == "all" else f"steps {span}" for _, span in explanation.views}
    fields = {
        "prompt": escape(explanation.prompt), "picture": data_uri(explanation.image),
        "width": str(explanation.image.width), "height": str(explanation.image.height),
        "heat": ", ".join(f"#{color}" for color in HEAT), "strength": str(round(100 * STRENGTH)),
        "across": str(MAPS_PER_ROW), "tokens": "".join(tokens), "facts": "".join(facts),
        "parts": radio_buttons("part", {part: PARTS[part] for part, _ in explanation.views}),
        "spans": radio_buttons("span", spans), "views": "".join(views),
    }  # fmt: skip
    template = (HERE / "attention_report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: fields[match[1]], template)


def data_uri(image: "Image") -> str:
    """Encode an image as a PNG inside of a page."""
    return f"data:image/png;base64,{b64encode(png_bytes(image)).decode()}"


def radio_buttons(name: str, labels: Mapping[str, str]) -> str:
    """Format radio buttons, the first of them checked."""
    return "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (i == 0)}> {label}</label>'
        for i, (value, label) in enumerate(labels.items())
    )

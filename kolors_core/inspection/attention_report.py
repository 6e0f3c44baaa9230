"""Where each token of a prompt acted, drawn: as a sheet (PNG) and as a page (HTML, alone and offline).

Shapes: T tokens as shown, h and w of a map.
"""

import html
import lzma
import re
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

HERE = Path(__file__).parent
# Nine colors of matplotlib's inferno (CC0), from least to most: they grow brighter evenly.
HEAT = ["000004", "1f0c48", "550f6d", "88226a", "ba3655", "e35933", "f98c0a", "f9c932", "fcffa4"]
STRENGTH = 0.6  # of a map over the image
FINE, ACROSS = 32, 16  # pixels of a map's longer side in the page, and how many maps stand side by side
TILE, GAP, LINE, COLUMNS = 192, 16, 20, 6  # of the sheet; the first three in pixels
INK, SOFT = "#1a1a1a", "#6a6a6a"
PARTS = {"all": "all layers", "down": "on the way down", "mid": "in the middle", "up": "on the way up"}


@dataclass(frozen=True)
class Token:
    """label: how it is shown. pieces: what the tokenizer calls it. columns: where it is among all tokens."""

    label: str
    pieces: str
    columns: slice


@dataclass(frozen=True)
class Explanation:
    """views: by layers (one of `PARTS`) and steps ("all", "1 to 8", ...), the first ("all", "all"): each
    token's share of the attention at each place, [T, h, w]. facts: what else is to be said, by name.
    """

    prompt: str
    picture: "Image"
    tokens: list[Token]
    views: dict[tuple[str, str], Tensor]
    facts: dict[str, str]


def unit(maps: Tensor) -> Tensor:
    """Maps [..., h, w], each from its own least, 0, to its own most, 1; an even one is 0."""
    least, most = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - least) / (most - least).clamp(min=1e-12)


def heat(levels: Tensor) -> "Image":
    """Levels [h, w] from 0 to 1 as an image of w by h pixels in the colors of `HEAT`."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray((levels * 255).round().to(torch.uint8).numpy())
    anchors = np.array([list(bytes.fromhex(color)) for color in HEAT])  # [9, 3]
    places = np.linspace(0, len(HEAT) - 1, 256)
    palette = [np.interp(places, range(len(HEAT)), channel) for channel in anchors.T]
    image.putpalette(np.stack(palette, axis=1).round().astype("uint8").tobytes())
    return image


def shown(text: str, lacks: Callable[[str], bool] = lambda _: False) -> str:
    """A text with what has no shape (controls, marks of direction), or is lacking, as its code point."""
    return "".join(f"U+{ord(c):04X}" if unicodedata.category(c)[0] == "C" or lacks(c) else c for c in text)


@cache
def font() -> "FreeTypeFont":
    """The font that lies beside this file, 16 pixels high: the same on every machine."""
    from PIL import ImageFont

    content = lzma.decompress((HERE / "font" / "unifont.otf.xz").read_bytes())
    return ImageFont.truetype(BytesIO(content), 16, layout_engine=ImageFont.Layout.BASIC)


def is_lacking(char: str) -> bool:
    """Whether the font has only a blank for it."""
    return not char.isspace() and font().getmask(char).getbbox() is None


def wrapped(text: str, width: int, most: int) -> list[str]:
    """A text in at most so many lines of so many pixels, broken between words or Chinese characters."""
    lines = [""]
    for word in re.findall(r"[!-~]{1,20} ?|.", shown(text, is_lacking)):
        if font().getlength(lines[-1] + word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]}…"]


def shortened(text: str, width: int) -> str:
    """A text cut to so many pixels."""
    text = shown(text, is_lacking)
    if font().getlength(text) <= width:
        return text
    return next(cut for n in range(len(text), -1, -1) if font().getlength(cut := f"{text[:n]}…") <= width)


def sheet(made: Explanation) -> "Image":
    """The image, and for each token the image in gray under its map of all layers and steps, labelled."""
    from PIL import Image, ImageDraw

    sides = made.picture.size
    w, h = (max(1, round(side * TILE / max(sides))) for side in sides)
    picture = made.picture.convert("RGB").resize((w, h), Image.Resampling.LANCZOS)
    grey, tiles = picture.convert("L").convert("RGB"), [(picture, "the image", "")]
    for token, share in zip(made.tokens, made.views["all", "all"], strict=True):
        over = heat(unit(share)).convert("RGB").resize((w, h), Image.Resampling.BICUBIC)
        tiles.append((Image.blend(grey, over, STRENGTH), token.label, f"{share.mean():.1%}"))
    columns = min(COLUMNS, len(tiles))
    width = GAP + columns * (TILE + GAP)
    facts = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in made.facts.items())
    lines = [(line, INK) for line in wrapped(made.prompt, width - 2 * GAP, 8)]
    lines += [(line, SOFT) for line in wrapped(facts, width - 2 * GAP, 12)]
    top, row = 2 * GAP + LINE * len(lines), h + LINE + GAP
    whole = Image.new("RGB", (width, top + row * -(-len(tiles) // columns)), "white")
    pen = ImageDraw.Draw(whole)
    for i, (line, color) in enumerate(lines):
        pen.text((GAP, GAP + LINE * i), line, color, font())
    for i, (tile, label, share) in enumerate(tiles):
        x, y = GAP + i % columns * (TILE + GAP), top + i // columns * row
        whole.paste(tile, (x, y))
        room = TILE - font().getlength(share) - LINE
        pen.text((x, y + h + 2), shortened(label, int(room)), INK, font())
        pen.text((x + TILE, y + h + 2), share, SOFT, font(), anchor="ra")
    return whole


def page(made: Explanation) -> str:
    """The page `attention_report.html`, filled in: it needs no other file and no network."""

    def said(text: str) -> str:
        return html.escape(shown(text))

    views = []
    for (part, span), maps in made.views.items():
        shares = " ".join(f"{share:.4f}" for share in maps.mean((1, 2)).tolist())
        h, w = maps.shape[-2:]
        finer = max(1, FINE // max(h, w))  # browsers enlarge by straight lines, which shows in coarse maps
        levels = F.interpolate(unit(maps)[None], scale_factor=finer, mode="bicubic")[0].clamp(0, 1)
        tiles = heat(tiled(levels))
        views.append(
            f'<img class="view" alt="" data-part="{part}" data-span="{span}" data-shares="{shares}" '
            f'data-size="{w} by {h}" src="{data_uri(tiles)}">'
        )
    tokens = [
        f'<button type="button" title="{said(token.pieces)}"><bdi>{said(token.label)}</bdi></button>'
        for token in made.tokens
    ]
    facts = [
        f"<dt>{said(name.replace('_', ' '))}</dt><dd><bdi>{said(value)}</bdi></dd>"
        for name, value in made.facts.items()
    ]
    spans = {span: "all steps" if span == "all" else f"steps {span}" for _, span in made.views}
    filled = {
        "prompt": said(made.prompt),
        "picture": data_uri(made.picture),
        "width": str(made.picture.width),
        "height": str(made.picture.height),
        "heat": ", ".join(f"#{color}" for color in HEAT),
        "strength": str(round(100 * STRENGTH)),
        "across": str(ACROSS),
        "tokens": "".join(tokens),
        "parts": choices("part", {part: PARTS[part] for part, _ in made.views}),
        "spans": choices("span", spans),
        "facts": "".join(facts),
        "views": "".join(views),
    }
    template = (HERE / "attention_report.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda match: filled[match[1]], template)


def tiled(maps: Tensor) -> Tensor:
    """Maps [T, h, w] in rows of `ACROSS`, the last filled up with zeros: [rows * h, ACROSS * w]."""
    from einops import rearrange

    filled = F.pad(maps, (0, 0, 0, 0, 0, -len(maps) % ACROSS))
    return rearrange(filled, "(rows across) h w -> (rows h) (across w)", across=ACROSS)


def data_uri(image: "Image") -> str:
    """An image as a PNG inside of a page."""
    content = BytesIO()
    image.save(content, "PNG")
    return f"data:image/png;base64,{b64encode(content.getvalue()).decode()}"


def choices(name: str, labels: Mapping[str, str]) -> str:
    """Radio buttons, of which the first is chosen."""
    return "".join(
        f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (i == 0)}> {label}</label>'
        for i, (value, label) in enumerate(labels.items())
    )

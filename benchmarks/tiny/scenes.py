"""Scenes of one to three kinds of things before a ground: what the embedded model learns to draw.

A scene is a function of its seed. What stands where is drawn first; a caption (captions.py) then says some of
what is true of it, so whatever a caption is silent about varies with the seed.
Things: the Noto Color Emoji font. Characters on signs: Noto Sans CJK. Grounds are drawn here.
Shapes: pixels of a page of `SIZE` a side; boxes are (left, top, right, bottom).
"""

import math
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from benchmarks.tiny.emoji import CONCEPTS, SIZE, draw
from kolors_core.image import pil_to_tensor

SIGN = "sign"  # the kind of an item that is no emoji
KINDS = (*CONCEPTS, SIGN)
LETTERS, DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "0123456789"
CHINESE = "可图大小上下人口山水火木土日月天中田心手目云雨花出入门开王工国电车东西北好你我爱"
CHARACTERS = LETTERS + DIGITS + CHINESE  # that a sign may carry
SIGN_FONT = Path("/usr/share/fonts/opentype/noto/NotoSansCJK-Bold.ttc")  # Debian's fonts-noto-cjk
COLOURS = {
    "white": (255, 255, 255), "red": (240, 122, 116), "orange": (250, 170, 90), "yellow": (250, 224, 110),
    "green": (120, 200, 120), "blue": (110, 160, 240), "purple": (180, 130, 220), "pink": (250, 180, 205),
    "gray": (160, 160, 160), "black": (30, 30, 34),
}  # fmt: skip
DRAWN = ("grass", "sky", "night")
GROUNDS = (*COLOURS, *DRAWN)

# (of how many items in all, their smallest and largest size): the longer side of a thing before it is tilted
SIZES = {1: (42, 106), 2: (40, 68), 3: (38, 56), 4: (36, 48)}
SMALL, LARGE = 46, 62  # sizes up to which a thing is small, and from which it is large
TILT = 12  # degrees at most
CHARACTER_STEP = 0.74  # from one character of a sign to the next, in its heights
GAP = 2  # pixels between boxes, and to the page's edge
TRIES = 60  # of placing all items at random, before their sizes are drawn again
HELD_OUT = 10  # one pair of things in so many is never together in training
MIXTURE = (((1,), 26), ((2,), 10), ((3,), 8), ((1, 1), 28), ((2, 1), 8), ((1, 2), 8), ((1, 1, 1), 12))
SIGNS = 0.5  # how many scenes have a sign among their items
LENGTHS = (1, 1, 2, 2, 3)  # of what signs say, each as often as it stands here
WHITE = 0.35  # how many have the white ground


@dataclass(frozen=True)
class Item:
    """One thing or sign on the page. kind: an emoji, or SIGN; x, y: its middle; width, height: of its box."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    size: float
    tilt: float = 0.0
    is_mirrored: bool = False
    text: str = ""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom."""
        return (
            self.x - self.width / 2, self.y - self.height / 2,
            self.x + self.width / 2, self.y + self.height / 2,
        )  # fmt: skip

    @property
    def characters(self) -> tuple["Item", ...]:
        """Each character of a sign, as an item of its own whose kind it is."""
        step = self.height * CHARACTER_STEP
        first = self.x - (len(self.text) - 1) / 2 * step
        return tuple(
            Item(character, first + i * step, self.y, step, step, step)
            for i, character in enumerate(self.text)
        )

    def overlaps(self, other: "Item") -> bool:
        """Whether the boxes, with the gap between them, share a pixel."""
        return (
            abs(self.x - other.x) < (self.width + other.width) / 2 + GAP
            and abs(self.y - other.y) < (self.height + other.height) / 2 + GAP
        )


@dataclass(frozen=True)
class Scene:
    """Groups of items of one kind each, before a ground of `GROUNDS`. seed: of the ground's details."""

    ground: str
    groups: tuple[tuple[Item, ...], ...]
    seed: int = 0

    @property
    def items(self) -> tuple[Item, ...]:
        """All items."""
        return tuple(item for group in self.groups for item in group)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each group."""
        return tuple(group[0].kind for group in self.groups)


def is_held_out(kinds: tuple[str, ...]) -> bool:
    """Whether a pair of these things is one that is never together in training."""
    numbers = sorted(CONCEPTS.index(kind) for kind in kinds if kind != SIGN)
    return any(
        (a * 7919 + b * 104_729) % 1009 % HELD_OUT == 0
        for i, a in enumerate(numbers)
        for b in numbers[i + 1 :]
    )


def is_held_out_text(text: str) -> bool:
    """Whether a sign's text of two or three characters is one that is never trained on."""
    number = sum(CHARACTERS.index(character) * 89**i for i, character in enumerate(text))
    return len(text) > 1 and number % 1013 % HELD_OUT == 0


def draw_kinds(order: random.Random, counts: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """The kinds of groups of so many items, and the text of the sign among them, "" if there is none."""
    kinds = order.sample(CONCEPTS, len(counts))
    text = ""
    if 1 in counts and order.random() < SIGNS:
        kinds[counts.index(1)] = SIGN
        script = order.choice((LETTERS + DIGITS, LETTERS + DIGITS, CHINESE, CHINESE, CHARACTERS))
        text = "".join(order.choice(script) for _ in range(order.choice(LENGTHS)))
    return tuple(kinds), text


def compose(seed: int, is_trained: bool = True) -> Scene:
    """The scene of a seed. is_trained: whether it has none of what is held out, or else, if it has several
    things or a sign of several characters, some of it.
    """
    order = random.Random(seed)
    counts = order.choices([c for c, _ in MIXTURE], [w for _, w in MIXTURE])[0]
    while True:
        kinds, text = draw_kinds(order, counts)
        may_be = len(kinds) - (SIGN in kinds) > 1 or len(text) > 1
        if may_be and (is_held_out(kinds) or is_held_out_text(text)) == is_trained:
            continue
        ground = "white" if order.random() < WHITE else order.choice(GROUNDS[1:])
        return Scene(ground, place(order, kinds, counts, text), order.getrandbits(32))


def place(
    order: random.Random, kinds: tuple[str, ...], counts: tuple[int, ...], text: str = ""
) -> tuple[tuple[Item, ...], ...]:
    """Groups of items at random places, that do not overlap."""
    while True:
        smallest, largest = SIZES[sum(counts)]
        unplaced = [
            [_unplaced(order, kind, order.uniform(smallest, largest), text) for _ in range(count)]
            for kind, count in zip(kinds, counts, strict=True)
        ]
        for _ in range(TRIES):
            groups, placed = [], list[Item]()
            for group in unplaced:
                moved = [_moved(order, item) for item in group]
                groups.append(tuple(moved))
                placed += moved
            if not any(a.overlaps(b) for i, a in enumerate(placed) for b in placed[i + 1 :]):
                return tuple(groups)


def crowd(order: random.Random, kinds: tuple[str, ...], text: str = "") -> tuple[tuple[Item, ...], ...]:
    """One item of each kind, each where those before it left room: fuller pages than those of `place`.

    What finds no place in `TRIES` tries is left out.
    """
    placed = list[Item]()
    for kind in kinds:
        unplaced = _unplaced(order, kind, order.uniform(SIZES[4][0], SIZES[3][1]), text)
        for _ in range(TRIES):
            item = _moved(order, unplaced)
            if not any(item.overlaps(other) for other in placed):
                placed.append(item)
                break
    return tuple((item,) for item in placed)


def _unplaced(order: random.Random, kind: str, size: float, text: str) -> Item:
    if kind == SIGN:
        height = min(max(size, 36), 60) if len(text) == 1 else min(max(size * 0.9, 34), 46)
        return Item(kind, 0, 0, height * (0.34 + 0.72 * len(text)), height, height, text=text)
    tilt, is_mirrored = order.uniform(-TILT, TILT), order.random() < 0.5
    glyph = _glyph(kind)
    scale, angle = size / max(glyph.size), abs(math.radians(tilt))
    width, height = (side * scale for side in glyph.size)
    return Item(
        kind, 0, 0, width * math.cos(angle) + height * math.sin(angle),
        width * math.sin(angle) + height * math.cos(angle), size, tilt, is_mirrored,
    )  # fmt: skip


def _moved(order: random.Random, item: Item) -> Item:
    x, y = (
        order.uniform(GAP + side / 2, SIZE - GAP - side / 2) if side < SIZE - 2 * GAP else SIZE / 2
        for side in (item.width, item.height)
    )
    return replace(item, x=x, y=y)


def render(scene: Scene) -> Image.Image:
    """The picture, RGB."""
    page = ground(scene.ground, random.Random(scene.seed)).convert("RGBA")
    for item in scene.items:
        sprite = _sign(item) if item.kind == SIGN else _tilted(item)
        page.alpha_composite(sprite, (
            min(max(round(item.x - sprite.width / 2), 0), SIZE - sprite.width),
            min(max(round(item.y - sprite.height / 2), 0), SIZE - sprite.height),
        ))  # fmt: skip
    return page.convert("RGB")


def pixels(scene: Scene) -> Tensor:
    """The picture as a tensor [3, SIZE, SIZE] in [-1, 1]."""
    return pil_to_tensor(render(scene)) / 127.5 - 1


@cache
def _glyph(kind: str) -> Image.Image:
    """The emoji in the font's own size, cut to what is drawn."""
    picture = draw(kind, 136)
    return picture.crop(picture.getbbox())


def _tilted(item: Item) -> Image.Image:
    glyph = _glyph(item.kind)
    if item.is_mirrored:
        glyph = ImageOps.mirror(glyph)
    # Reduced by premultiplied opacity, or the colour under what is transparent would show at the edge.
    scale = item.size / max(glyph.size)
    size = tuple(max(1, round(side * scale)) for side in glyph.size)
    turned = glyph.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    turned = turned.rotate(item.tilt, Image.Resampling.BICUBIC, expand=True)
    box = turned.getbbox()
    assert box is not None
    turned = turned.crop(box)
    turned.thumbnail((SIZE, SIZE))
    return turned


def _sign(item: Item) -> Image.Image:
    """A wooden board with dark characters on a light field."""
    width, height = round(item.width), round(item.height)
    board = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(board)
    pen.rounded_rectangle((0, 0, width - 1, height - 1), height // 8, (150, 96, 48))
    rim = max(2, height // 14)
    pen.rounded_rectangle((rim, rim, width - 1 - rim, height - 1 - rim), height // 10, (255, 250, 232))
    font = _sign_font(round(height * 0.72))
    for character in item.characters:
        left, top, right, bottom = font.getbbox(character.kind, anchor="mm")
        corner = character.x - item.x + (width - left - right) / 2, (height - top - bottom) / 2
        pen.text(corner, character.kind, (20, 20, 30), font, "mm")
    return board


@cache
def _sign_font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(SIGN_FONT), size, index=2)  # simplified Chinese


def ground(name: str, order: random.Random) -> Image.Image:
    """The ground alone: a colour, a meadow, a sky with clouds, or a night with stars."""
    if name in COLOURS:
        return Image.new("RGB", (SIZE, SIZE), COLOURS[name])
    if name == "grass":
        page = _gradient((205, 232, 250), (228, 244, 252))
        pen, horizon = ImageDraw.Draw(page), order.randint(28, 52)
        pen.rectangle((0, horizon, SIZE, SIZE), (126, 196, 92))
        for _ in range(46):
            x, y = order.randint(0, SIZE), order.randint(horizon + 4, SIZE)
            for lean in (-2, 0, 2):
                pen.line((x, y, x + lean, y - 6), (84, 156, 62))
        return page
    if name == "sky":
        page, veil = _gradient((88, 168, 240), (190, 226, 252)), Image.new("L", (SIZE, SIZE))
        pen = ImageDraw.Draw(veil)
        for _ in range(3):
            x, y, width = order.randint(0, SIZE), order.randint(8, SIZE - 8), order.randint(14, 22)
            for shift, radius in ((-width, 6), (-width // 3, 10), (width // 2, 8), (width, 5)):
                pen.ellipse((x + shift - radius, y - radius, x + shift + radius, y + radius), 235)
        page.paste((255, 255, 255), mask=veil.filter(ImageFilter.GaussianBlur(1.5)))
        return page
    if name == "night":
        page = _gradient((14, 18, 52), (44, 48, 104))
        pen = ImageDraw.Draw(page)
        for _ in range(26):
            x, y, bright = order.randint(1, SIZE - 2), order.randint(1, SIZE - 2), order.randint(170, 255)
            pen.ellipse((x - 1, y - 1, x + order.randint(0, 1), y + 1), (bright, bright, 200))
        return page
    raise ValueError(f"no ground is called {name!r}: expected one of {', '.join(GROUNDS)}")


@cache
def _ramp() -> Image.Image:
    return Image.linear_gradient("L").resize((SIZE, SIZE))


def _gradient(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    return ImageOps.colorize(_ramp(), top, bottom)

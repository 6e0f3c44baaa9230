"""Pictures of emoji with English and Chinese names, from two packages: the things of the embedded model.

Pictures: the Noto Color Emoji font (SIL Open Font License 1.1; Debian's fonts-noto-color-emoji).
Names: CLDR's annotations (npm's emojibase-data, MIT; CLDR under the Unicode License).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
BITMAP = 109  # the font's one size, in pixels
SIZE = 128  # of our pictures

# What the model learns to draw: things that a person tells apart at a glance, one picture each.
CONCEPTS = (
    "🐵🐶🐩🦊🐱🦁🐯🐴🦓🦌🐷🐑🐐🐪🦒🐘🦏🐭🐰🐻🐼🐓🐧🦅🦢🦉🦩🦚🦜🐸🐢🐍🦕🦖🐳🐬🦈🐙🦀🦑🐌🦋🐝🐞🌹"
    "🌻🌲🌴🌵🍀🍁🍄🍇🍉🍊🍋🍌🍍🍎🍒🍓🥑🍆🥕🌽🥦🍞🥐🍔🍟🍕🍙🍦🍩🎂🍫🍷☕🫖🌋🏠🏰⛺🎡🚂🚌🚒🚓🚗🚜"
    "🚲🛹⛵🚢🚁🚀🛸🌙⭐🌈⛄🔥🎃🎄🎈🎁🏆⚽🏀🎱🧸👓👕👑🎩💎🔔🎸🎻🥁💻📷💡📚🔑🔬🪑"
)

# Everyday names where CLDR's label is a description; the label stays as another name.
ENGLISH_NAMES = {
    "🐞": ("ladybug", "ladybird"), "🐤": ("chick",), "🐳": ("whale",), "🐚": ("shell", "seashell"),
    "🐝": ("bee",), "🐑": ("sheep",), "🐪": ("camel",), "🦕": ("dinosaur",), "🐠": ("tropical fish",),
    "🐡": ("pufferfish",),
    "🌸": ("cherry blossom",), "🌲": ("pine tree",), "🍀": ("clover",), "🌽": ("corn",), "🧀": ("cheese",),
    "🍳": ("fried egg",), "🍜": ("noodles",), "🍺": ("beer",), "☕": ("coffee",), "🍷": ("wine",),
    "🚂": ("steam train",), "🚒": ("fire truck",), "🚗": ("car",), "🌙": ("moon",), "⛄": ("snowman",),
    "🎃": ("pumpkin lantern",), "🎁": ("gift", "present"), "🏆": ("trophy",), "⚽": ("football",),
    "🎾": ("tennis ball",), "🎱": ("billiard ball",), "🎲": ("dice",), "🎨": ("paint palette",),
    "🎩": ("top hat",), "💎": ("diamond",), "📱": ("smartphone",), "📚": ("pile of books",),
    "🍦": ("ice cream",), "🍎": ("apple",), "🎂": ("cake",),
    "🗼": ("red tower",), "🛸": ("UFO",), "👓": ("spectacles",), "👕": ("shirt",), "🍙": ("onigiri",),
}  # fmt: skip
CHINESE_NAMES = {
    "🐤": ("小鸡",), "🐑": ("绵羊",), "🐳": ("鲸鱼",), "🐚": ("贝壳",), "🐪": ("骆驼",), "🦕": ("恐龙",),
    "🌲": ("松树",),
    "🧀": ("奶酪",), "🍦": ("冰淇淋",), "🦀": ("螃蟹",), "🍎": ("苹果",), "🎂": ("蛋糕",),
    "🍺": ("啤酒",), "☕": ("咖啡",), "🚗": ("小汽车",), "🚂": ("火车",),
    "🌙": ("月亮",), "🎾": ("网球",), "🎃": ("南瓜灯",), "🛸": ("飞碟",), "💎": ("钻石",), "📚": ("一摞书",),
    "🏠": ("房屋",), "🏰": ("城堡",), "🌋": ("火山",), "🐍": ("蛇",), "🦙": ("羊驼",), "🗼": ("红塔",),
}  # fmt: skip


@dataclass(frozen=True)
class Concept:
    """One emoji: its character, and its names in both languages, the everyday one first."""

    character: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]


def read_names(package: Path, language: str) -> dict[str, str]:
    """Character -> CLDR's label in "en" or "zh", of every emoji of one code point that stands alone."""
    entries = json.loads((package / language / "data.json").read_text(encoding="utf-8"))
    alone = [e for e in entries if e["type"] == 1 and "-" not in e["hexcode"] and e["version"] <= 14]
    return {e["emoji"].rstrip("\ufe0f"): e["label"] for e in alone if "group" in e}


def read_concepts(package: Path) -> list[Concept]:
    """`CONCEPTS` with their names. package: the unpacked emojibase-data."""
    english, chinese = read_names(package, "en"), read_names(package, "zh")
    concepts = []
    for character in CONCEPTS:
        label = english[character].removesuffix(" face").lower()
        names = (*ENGLISH_NAMES.get(character, ()), label)
        label = chinese[character]
        if label[-1] in "头脸":  # an animal's head or face, such as 狗脸
            label = "猴子" if label == "猴头" else label[:-1]
        concepts.append(Concept(character, _once(names), _once((*CHINESE_NAMES.get(character, ()), label))))
    return concepts


def _once(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def draw(character: str, size: int = SIZE) -> Image.Image:
    """The emoji in the middle of a transparent square of `size` pixels; ValueError if the font has none."""
    font = ImageFont.truetype(str(FONT), BITMAP)
    glyph = Image.new("RGBA", (BITMAP * 2, BITMAP * 2), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((20, 20), character, font=font, embedded_color=True)
    box = glyph.getbbox()
    if box is None:
        raise ValueError(f"{FONT.name} has no image of {character!r}")
    glyph = glyph.crop(box)
    scale = 0.88 * size / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    picture.alpha_composite(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """A transparent picture on a white ground."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")

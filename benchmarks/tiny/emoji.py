"""Pictures of emoji with English and Chinese captions, from two packages: the data of the embedded model.

Pictures: the Noto Color Emoji font (SIL Open Font License 1.1; Debian's fonts-noto-color-emoji).
Names: CLDR's annotations (npm's emojibase-data, MIT; CLDR under the Unicode License). Phrasings are ours.
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
    "🐵🦍🦧🐶🐩🐺🦊🦝🐱🦁🐯🐴🦄🦓🦌🐮🐷🐑🐐🐪🦙🦒🐘🦏🦛🐭🐹🐰🦔🦇🐻🐨🐼🦥🦘🐔🐓🐤🐧🦅🦆🦢🦉🦩🦚🦜"
    "🐸🐊🐢🦎🐍🐉🦕🦖🐳🐬🐠🐡🦈🐙🐚🦀🦞🦐🦑🐌🦋🐛🐜🐝🐞🦂🌹🌻🌷🌸🌲🌴🌵🍀🍁🍄"
    "🍇🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🥝🍅🥥🥑🍆🥕🌽🥦🍞🥐🥨🧀🍔🍟🍕🌭🌮🍳🍿🍙🍜🍣🥟🍦🍩🍪🎂🧁🍫🍭🍺🍷☕🫖"
    "🌋🏠🏰🗼⛺🎡🚂🚌🚑🚒🚓🚕🚗🚜🚲🛹⚓⛵🚢🚁🚀🛸🌙⭐🌈⛄🔥"
    "🎃🎄🎈🎁🏆⚽🏀🎾🎱🎲🧸🎨👓👕👖🧦👗👑🎩💍💎🔔🎸🎻🎺🥁📱💻📷💡📚🔑🔨🧲🔬🔭🚪🪑🧹"
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
    "🍦": ("ice cream",),
    "🗼": ("red tower",), "🛸": ("UFO",), "👓": ("spectacles",), "👕": ("shirt",), "🍙": ("onigiri",),
}  # fmt: skip
CHINESE_NAMES = {
    "🐤": ("小鸡",), "🐑": ("绵羊",), "🐳": ("鲸鱼",), "🐚": ("贝壳",), "🐪": ("骆驼",), "🦕": ("恐龙",),
    "🌲": ("松树",),
    "🧀": ("奶酪",), "🍦": ("冰淇淋",), "🍺": ("啤酒",), "☕": ("咖啡",), "🚗": ("小汽车",), "🚂": ("火车",),
    "🌙": ("月亮",), "🎾": ("网球",), "🎃": ("南瓜灯",), "🛸": ("飞碟",), "💎": ("钻石",), "📚": ("一摞书",),
    "🏠": ("房屋",), "🏰": ("城堡",), "🌋": ("火山",), "🐍": ("蛇",), "🦙": ("羊驼",), "🗼": ("红塔",),
}  # fmt: skip

ENGLISH = (
    "{x}", "a {x}", "the {x}", "one {x}", "my {x}", "this {x}", "a photo of a {x}", "a photo of the {x}",
    "a picture of a {x}", "an emoji of a {x}", "a drawing of one {x}", "an image of a {x}",
    "a nice {x} on white", "draw a {x}", "show me a {x}", "please make a picture of a {x}",
    "here is a {x} for you", "I want a {x}", "I like this {x}", "can you draw the {x}?", "{x}, high quality",
    "a small icon of a {x}", "a {x} in the middle", "there is a {x} in this picture", "look, a {x}!",
    "a close-up photo of a {x}, macro, zoom", "let me see your {x}", "we would love to have a {x}",
)  # fmt: skip
CHINESE = (
    "{x}", "一个{x}", "一张{x}的照片", "{x}的照片", "一幅{x}的图片", "{x}的表情符号", "画一个{x}", "这是{x}",
    "我的{x}", "我要一个{x}", "我喜欢{x}", "请画一张{x}的图", "给你看{x}", "白色背景上的{x}", "{x}，高质量",
    "这里有一个{x}", "图片里有{x}", "来一张{x}", "可爱的{x}", "能不能画{x}？", "一张{x}的照片，微距，变焦",
    "看，{x}！", "想要{x}的图像", "为我们做一个{x}的图标",
)  # fmt: skip

# Never trained on: the quality is measured with these.
ENGLISH_UNSEEN = ("please draw a {x} for me", "I would like to see a {x}", "your photo of one small {x}")
CHINESE_UNSEEN = ("请给我画{x}", "我想看{x}的样子", "有没有{x}的图片？")


@dataclass(frozen=True)
class Concept:
    """One emoji: its character, and its names in both languages, the everyday one first."""

    character: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]

    def captions(self) -> list[str]:
        """Every phrasing of every name, of both languages."""
        found = [phrase.format(x=name) for name in self.english for phrase in ENGLISH]
        return found + [phrase.format(x=name) for name in self.chinese for phrase in CHINESE]


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
        label = (
            label[:-1] if label[-1] in "头脸" and label not in ("猴头",) else label.replace("猴头", "猴子")
        )
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
        raise ValueError(f"{FONT.name} has no picture of {character!r}")
    glyph = glyph.crop(box)
    scale = 0.88 * size / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * scale), round(glyph.height * scale)), Image.Resampling.LANCZOS)
    picture = Image.new("RGBA", (size, size), (255, 255, 255, 0))
    picture.alpha_composite(glyph, ((size - glyph.width) // 2, (size - glyph.height) // 2))
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """A transparent picture on a white ground."""
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def write(concepts: list[Concept], folder: Path) -> None:
    """A folder that `kolors_core.dataset.read_folder` reads: pictures and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, concept in enumerate(concepts):
        on_white(draw(concept.character)).save(folder / f"{i:04}.png")
        rows.append(json.dumps({"file_name": f"{i:04}.png", "text": concept.captions()}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

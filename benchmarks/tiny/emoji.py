"""Pictures of emoji with English and Chinese captions, from two packages: the data of the embedded model.

Pictures: the Noto Color Emoji font (SIL Open Font License 1.1; Debian's fonts-noto-color-emoji).
Names: CLDR's annotations (npm's emojibase-data, MIT; CLDR under the Unicode License). Phrasings are ours.
"""

import json
import random
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

# A caption is a beginning, a name and an end, with now and then a word that means nothing beside them: so the
# model learns what to look for, and to pass over what it does not know.
ENGLISH_BEFORE = (
    "", "", "a", "the", "one", "my", "your", "this", "some", "a photo of a", "the photo of one",
    "a photo of the", "a picture of a", "an image of one", "a drawing of a", "an emoji of a",
    "an icon of the", "draw a", "draw the", "show me a", "show us the", "please make a", "please, the",
    "here is a", "there is one", "this is a", "I want a", "I like this", "I need the", "can you draw a",
    "could you paint one", "let me see the", "we would love a", "they have a", "look at my", "a small",
    "a big", "a nice", "a cute", "the best", "a close-up photo of a", "a painting with one",
    "a sticker of the", "a very good", "what about a", "imagine a", "give me one",
)  # fmt: skip
ENGLISH_AFTER = (
    "", "", "", "", "on white", "in the middle", "for you", "to us", ", high quality", ", please",
    "in this picture", ", macro, zoom", "and nothing else", "from the side", "as an icon", "with no text",
    "of good quality", "!", "?", ".", "today", "on my desk", ", so nice", ", drawn by hand", "that I like",
    "to look at",
)  # fmt: skip
CHINESE_BEFORE = (
    "", "", "一个", "一只", "一张", "一幅", "一张有", "我的", "你的", "这个", "那个", "画一个", "画",
    "请画一张", "请画", "给我看", "给你", "这是", "那是", "我要一个", "我们要", "我喜欢", "她喜欢", "他有",
    "来一张", "来个", "可爱的", "小小的", "大大的", "漂亮的", "能不能画", "可以画一下", "图片里有",
    "这里有", "白色背景上的", "想要", "想一想", "看看", "看，", "生成", "帮我做一个", "为我们画", "最好的",
    "今天的", "特写：", "也许是",
)  # fmt: skip
CHINESE_AFTER = (
    "", "", "", "", "的照片", "的图片", "的图", "的图像", "的画", "的表情符号", "的图标", "的贴纸",
    "的特写", "，高质量", "，微距，变焦", "，谢谢", "吧", "吗？", "！", "。", "在中间", "在这里",
    "，白色背景", "，没有文字", "就好", "，很好看", "的正面", "给大家看", "，电影",
)  # fmt: skip
CAPTIONS = 80  # of each name
NONSENSE = 0.3  # how many captions have a meaningless word

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
        """Phrasings of every name, of both languages; the same at every call."""
        found = []
        for name in self.english:
            found += [name, f"a photo of a {name}"]
            found += [_phrase(name, ENGLISH_BEFORE, ENGLISH_AFTER, " ", i) for i in range(CAPTIONS)]
        for name in self.chinese:
            found += [name, f"一张{name}的照片"]
            found += [_phrase(name, CHINESE_BEFORE, CHINESE_AFTER, "", i) for i in range(CAPTIONS)]
        return list(dict.fromkeys(found))


def _phrase(name: str, before: Sequence[str], after: Sequence[str], space: str, number: int) -> str:
    """A caption: some beginning, the name, some end, and perhaps a word that means nothing at either side."""
    order = random.Random(f"{name} {number}")
    parts = [order.choice(before), name, order.choice(after)]
    if order.random() < NONSENSE:
        parts.insert(order.choice((0, 3)), _nonsense(order, is_chinese=not space))
    text = space.join(part for part in parts if part)
    return text.replace(" ,", ",").replace(" !", "!").replace(" ?", "?").replace(" .", ".")


def _nonsense(order: random.Random, is_chinese: bool) -> str:
    """Some Chinese characters of any kind, or syllables that look like English."""
    if is_chinese:
        return "".join(chr(order.randrange(0x4E00, 0x9FA6)) for _ in range(order.randint(1, 3)))
    syllables = [
        order.choice("bcdfghjklmnprstvwz") + order.choice("aeiou") for _ in range(order.randint(1, 3))
    ]
    return "".join(syllables) + order.choice(("", "n", "r", "s", "t", "ng"))


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


def write(concepts: list[Concept], folder: Path) -> None:
    """A folder that `kolors_core.training.data.read_folder` reads: pictures and metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, concept in enumerate(concepts):
        on_white(draw(concept.character)).save(folder / f"{i:04}.png")
        rows.append(json.dumps({"file_name": f"{i:04}.png", "text": concept.captions()}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")

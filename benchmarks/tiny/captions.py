"""Captions of scenes, in English and Chinese: a grammar that says some of what is true of a scene.

Every kind of thing, its number if there are several, what a sign says and a ground other than white are
always said; places, relations and sizes now and then. The phrasings are ours.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.tiny.emoji import Concept
from benchmarks.tiny.scenes import COLOURS, LARGE, SIGN, SIZE, SMALL, Item, Scene

Group = Sequence[Item]
LOW, HIGH = 0.4 * SIZE, 0.6 * SIZE  # a middle before and after which a thing is at one side
SLOPE = 1.2  # how many times further along than across one stands from another, for a relation

# Names that have no article in English; and the plurals that no rule gives.
UNCOUNTED = {
    "grapes", "cherries", "bread", "corn", "broccoli", "french fries", "coffee", "wine", "spectacles",
    "glasses", "books", "hot beverage",
}  # fmt: skip
PLURALS = {
    "sheep": "sheep", "deer": "deer", "squid": "squid", "mouse": "mice", "grapes": "bunches of grapes",
    "cherries": "pairs of cherries", "bread": "loaves of bread", "corn": "ears of corn",
    "broccoli": "heads of broccoli", "french fries": "boxes of french fries", "coffee": "cups of coffee",
    "wine": "glasses of wine", "wine glass": "wine glasses", "spectacles": "pairs of spectacles",
    "glasses": "pairs of glasses", "pile of books": "piles of books", "books": "piles of books",
    "ear of corn": "ears of corn", "hot beverage": "hot beverages", "onigiri": "onigiri",
    "four leaf clover": "four leaf clovers", "octopus": "octopuses", "maple leaf": "maple leaves",
    "snowman": "snowmen", "snowman without snow": "snowmen",
}  # fmt: skip
NUMBERS = {1: ("one", "一"), 2: ("two", "两"), 3: ("three", "三")}
ANIMALS = "🐵🐶🐩🦊🐱🦁🐯🐴🦓🦌🐷🐑🐐🐪🦒🐘🦏🐭🐰🐻🐼🐓🐧🦅🦢🦉🦩🦚🦜🐸🐢🐍🦕🦖🐳🐬🦈🐙🦀🦑🐌🦋🐝🐞"

# What is said of a place: (English, at the end of a phrase; Chinese, before 有 or 是, or after 在).
PLACES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left": (("on the left", "at the left", "on the left side"), ("左边", "左侧", "左面")),
    "right": (("on the right", "at the right", "on the right side"), ("右边", "右侧", "右面")),
    "top": (("at the top", "on top of the picture"), ("上边", "顶部", "最上面")),
    "bottom": (("at the bottom", "at the very bottom"), ("下边", "底部", "最下面")),
    "middle": (("in the middle", "in the center", "in the centre"), ("中间", "中央", "正中间")),
    "top left": (("in the top left corner", "at the top left", "in a corner"),
                 ("左上角", "左上方", "角落里")),
    "top right": (("in the top right corner", "at the top right", "in a corner"),
                  ("右上角", "右上方", "角落里")),
    "bottom left": (("in the bottom left corner", "at the bottom left", "in a corner"),
                    ("左下角", "左下方", "角落里")),
    "bottom right": (("in the bottom right corner", "at the bottom right", "in a corner"),
                     ("右下角", "右下方", "角落里")),
}  # fmt: skip
# Of the first to the second: English {a} and {b}, Chinese likewise; the opposite relation in its own words.
RELATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "left of": (
        ("{a} to the left of {b}", "{a} left of {b}", "{a} on the left of {b}", "{b} with {a} on its left",
         "on the left {a}, on the right {b}"),
        ("{a}在{b}的左边", "{b}左边有{a}", "{b}的左边是{a}", "左边是{a}，右边是{b}", "{a}在{b}左侧"),
    ),
    "right of": (
        ("{a} to the right of {b}", "{a} right of {b}", "{a} on the right of {b}",
         "{b} with {a} on its right", "on the right {a}, on the left {b}"),
        ("{a}在{b}的右边", "{b}右边有{a}", "{b}的右边是{a}", "右边是{a}，左边是{b}", "{a}在{b}右侧"),
    ),
    "above": (
        ("{a} above {b}", "{a} over {b}", "{b} with {a} above it", "above {a}, below {b}"),
        ("{a}在{b}的上面", "{b}上面有{a}", "{b}的上方是{a}", "上面是{a}，下面是{b}", "{a}在{b}上方"),
    ),
    "below": (
        ("{a} below {b}", "{a} under {b}", "{b} with {a} below it", "{a} beneath {b}"),
        ("{a}在{b}的下面", "{b}下面有{a}", "{b}的下方是{a}", "下面是{a}，上面是{b}", "{a}在{b}下方"),
    ),
}  # fmt: skip
PAIRS = (
    ("{a} and {b}", "{a} with {b}", "{a} next to {b}", "{a} beside {b}", "{a} together with {b}"),
    ("{a}和{b}", "{a}与{b}", "{a}旁边有{b}", "{a}，还有{b}", "{a}跟{b}"),
)
HOLDING = (("{a} holding {b}", "{a} with {b}"), ("{a}拿着{b}", "{a}，拿着{b}"))  # a sign
SIGNS = (
    ('a sign that says "{x}"', 'a sign saying "{x}"', 'a sign with "{x}"', 'a board that reads "{x}"',
     'a sign reading "{x}"', 'the sign "{x}"'),
    ("一个牌子，写着“{x}”", "写着“{x}”的牌子", "一个写着“{x}”的牌子", "一块写着“{x}”的牌子",
     "牌子上写着“{x}”"),
)  # fmt: skip
SIZES = (
    {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")},
    {"small": ("小", "小小的", "很小的"), "large": ("大", "大大的", "很大的")},
)
CHINESE_COLOURS = {
    "white": "白色", "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色",
    "purple": "紫色", "pink": "粉色", "gray": "灰色", "black": "黑色",
}  # fmt: skip
# (before, after) the rest; {c} is a colour.
ENGLISH_GROUNDS = {
    "colour": (("on {c}: ", "on a {c} background, "), (" on {c}", " on a {c} background", ", {c} background",
                                                      " in front of a {c} wall")),
    "grass": (("on the grass, ", "on grass: "), (" on the grass", " on grass", " in a meadow",
                                                   " on a green lawn")),
    "sky": (("in the sky, ",), (" in the sky", " in the blue sky", " among the clouds", " against the sky")),
    "night": (("at night, ",), (" at night", " under the stars", " in the night sky", " on a starry night")),
}  # fmt: skip
CHINESE_GROUNDS = {
    "colour": (("{c}背景上，", "{c}背景，", "在{c}背景上，"), ("，{c}背景", "，{c}的背景")),
    "grass": (("草地上，", "在草地上，"), ("，在草地上", "，草地背景")),
    "sky": (("天空中，", "在天上，", "蓝天白云里，"), ("，在天空中", "，天空背景")),
    "night": (("夜空下，", "夜里，", "晚上，"), ("，在夜空下", "，夜晚背景")),
}
ENGLISH_BEFORE = (
    "draw", "please draw", "a photo of", "a picture of", "an image of", "a drawing of", "show me", "I want",
    "there is", "this is", "make", "imagine", "an icon of", "paint", "can you draw",
)  # fmt: skip
ENGLISH_AFTER = (", please", ", high quality", " for you", " with no text", "!", ".", ", drawn by hand",
                 ", nice", ", macro, zoom")  # fmt: skip
CHINESE_BEFORE = (
    "画", "请画", "画一张图：", "一张图：", "给我看", "这是", "我要", "图片里有", "来一张", "请画一幅：",
    "想要", "生成", "照片：",
)  # fmt: skip
CHINESE_AFTER = (
    "的照片", "的图片", "的画", "，高质量", "，谢谢", "。", "！", "，很好看", "，微距，变焦", "，电影",
)  # fmt: skip
NONSENSE = 0.06  # how many captions have a meaningless word
TELLING = 0.5  # how often, in training, a caption that tells nothing of places is made again

# Never trained on: the quality is measured with these.
ENGLISH_UNSEEN = ("I would like to see {x}", "could we have {x} here", "your poster: {x}")
CHINESE_UNSEEN = ("我想看{x}", "有没有{x}？", "请给大家画{x}")


@dataclass(frozen=True)
class Caption:
    """A caption, and which places (place, kind) and relations (relation, kind, other kind) it tells.

    The kinds, their numbers, the sign's text and the ground are the scene's, and always told.
    """

    text: str
    claims: tuple[tuple[str, ...], ...] = ()


def place_of(items: Group) -> str:
    """Where all of these clearly are on the page, one of `PLACES`, or ""."""
    x, y = ({_third(value) for value in values} for values in ([i.x for i in items], [i.y for i in items]))
    if len(x) > 1 or len(y) > 1:
        for thirds, names in ((x, {0: "left", 2: "right"}), (y, {0: "top", 2: "bottom"})):
            if len(thirds) == 1 and (third := min(thirds)) in names:
                return names[third]
        return ""
    return (
        ("top left", "top", "top right"), ("left", "middle", "right"),
        ("bottom left", "bottom", "bottom right"),
    )[y.pop()][x.pop()]  # fmt: skip


def _third(value: float) -> int:
    return 0 if value < LOW else 2 if value > HIGH else 1


def relation_of(first: Group, second: Group) -> str:
    """How all of the first clearly stand to all of the second, one of `RELATIONS`, or ""."""
    found = {_relation(a, b) for a in first for b in second}
    return found.pop() if len(found) == 1 else ""


def _relation(a: Item, b: Item) -> str:
    right, down = a.x - b.x, a.y - b.y
    if abs(right) > SLOPE * abs(down):
        return "right of" if right > 0 else "left of"
    if abs(down) > SLOPE * abs(right):
        return "below" if down > 0 else "above"
    return ""


def size_of(items: Group) -> str:
    """Whether all are "small" or "large", or ""."""
    if all(item.size <= SMALL for item in items):
        return "small"
    return "large" if all(item.size >= LARGE for item in items) else ""


class Grammar:
    """Captions with the names of these concepts."""

    def __init__(self, concepts: Sequence[Concept]) -> None:
        self.names: Mapping[str, Concept] = {concept.character: concept for concept in concepts}

    def say(
        self, scene: Scene, order: random.Random, language: int, is_wrapped: bool = True
    ) -> Caption:  # fmt: skip
        """A caption in English, 0, or Chinese, 1. is_wrapped: with a request or praise about it, perhaps."""
        groups = list(scene.groups)
        order.shuffle(groups)
        text, claims = self._groups(groups, order, language)
        text = self._with_ground(scene, text, order, language)
        if is_wrapped and order.random() < 0.5:
            text = _wrapped(text, order, language)
        if language == 0 and order.random() < 0.2:
            text = text[:1].upper() + text[1:]
        return Caption(text, claims)

    def teach(self, scene: Scene, order: random.Random, language: int) -> Caption:
        """A caption to train with: as `say` makes it, but more often it tells something of places."""
        caption = self.say(scene, order, language)
        while not caption.claims and order.random() < TELLING:
            caption = self.say(scene, order, language)
        return caption

    def _groups(
        self, groups: Sequence[Group], order: random.Random, language: int
    ) -> tuple[str, tuple[tuple[str, ...], ...]]:  # fmt: skip
        """What there is, without the ground, and what it tells of places and relations."""
        phrases = [self.phrase(group, order, language) for group in groups]
        kinds, places = [group[0].kind for group in groups], [place_of(group) for group in groups]
        related = relation_of(groups[0], groups[1]) if len(groups) > 1 else ""
        told, kind = ((related, *kinds[:2]),), order.random()
        if related and len(groups) == 2 and kind < 0.5:
            return order.choice(RELATIONS[related][language]).format(a=phrases[0], b=phrases[1]), told
        if related and len(groups) == 3 and kind < 0.4:
            pair = order.choice(RELATIONS[related][language][:3]).format(a=phrases[0], b=phrases[1])
            return (f"{pair}, and {phrases[2]}", f"{pair}，还有{phrases[2]}")[language], told
        if any(places) and kind < 0.7:
            phrases = [_placed(phrase, where, order, language) if where else phrase
                       for phrase, where in zip(phrases, places, strict=True)]  # fmt: skip
            return _listed(phrases, language), tuple((w, k) for w, k in zip(places, kinds, strict=True) if w)
        if len(groups) != 2:
            return _listed(phrases, language), ()
        is_held = groups[1][0].kind == SIGN and len(groups[0]) == 1 and order.random() < 0.5
        words = (HOLDING if is_held else PAIRS)[language]
        return order.choice(words).format(a=phrases[0], b=phrases[1]), ()

    def phrase(self, group: Group, order: random.Random, language: int) -> str:
        """A group with its number, perhaps its size, and a name."""
        if group[0].kind == SIGN:
            return order.choice(SIGNS[language]).format(x=group[0].text)
        size = size_of(group) if order.random() < 0.5 else ""
        word = order.choice(SIZES[language][size]) if size else ""
        concept = self.names[group[0].kind]
        names = (concept.english, concept.chinese)[language]
        name = names[0] if order.random() < 0.75 else order.choice(names)
        if language == 0:
            return english(name, len(group), word, order)
        if len(group) == 1 and order.random() < 0.4:
            return word + name
        measure = "只" if concept.character in ANIMALS and order.random() < 0.7 else "个"
        return f"{NUMBERS[len(group)][1]}{measure}{word}{name}"

    def _with_ground(self, scene: Scene, text: str, order: random.Random, language: int) -> str:
        """The ground said, always but for white, before or after the rest."""
        if scene.ground == "white" and order.random() < 0.75:
            return text
        words = (ENGLISH_GROUNDS, CHINESE_GROUNDS)[language]
        before, after = words["colour" if scene.ground in COLOURS else scene.ground]
        colour = (scene.ground, CHINESE_COLOURS.get(scene.ground, ""))[language]
        if order.random() < (0.25, 0.6)[language]:
            return order.choice(before).format(c=colour) + text
        return text + order.choice(after).format(c=colour)


def english(name: str, count: int, size: str = "", order: random.Random | None = None) -> str:
    """A name with its article or number, "two small foxes"."""
    if count > 1:
        return " ".join(part for part in (NUMBERS[count][0], size, plural(name)) if part)
    words = " ".join(part for part in (size, name) if part)
    if name in UNCOUNTED:
        return words
    article = "an" if words[0] in "aeioAEIO" else "a"
    chosen = order.choices((article, "the", "one", ""), (70, 8, 8, 14))[0] if order else article
    return f"{chosen} {words}".strip()


def plural(name: str) -> str:
    """The plural of an English name."""
    if name in PLURALS:
        return PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    return f"{name}s"


def _placed(phrase: str, place: str, order: random.Random, language: int) -> str:
    where = order.choice(PLACES[place][language])
    if language == 0:
        return f"{phrase} {where}" if order.random() < 0.8 else f"{where} {phrase}"
    if phrase.startswith(("牌子上", "一个牌子，")):
        return f"{where}{order.choice(('有', '是'))}{phrase}"
    return order.choice((f"{where}有{phrase}", f"{where}是{phrase}", f"{phrase}在{where}"))


def _listed(phrases: Sequence[str], language: int) -> str:
    if len(phrases) == 1:
        return phrases[0]
    comma, last = ((", ", " and "), ("，", "和"))[language]
    if any("在" in p or "有" in p or "是" in p or "写着" in p for p in phrases):
        last = "，"
    return comma.join(phrases[:-1]) + last + phrases[-1]


def _wrapped(text: str, order: random.Random, language: int) -> str:
    """A request before it, or praise after it, or both, and perhaps a word that means nothing."""
    before = order.choice((ENGLISH_BEFORE, CHINESE_BEFORE)[language]) if order.random() < 0.7 else ""
    after = order.choice((ENGLISH_AFTER, CHINESE_AFTER)[language]) if order.random() < 0.5 else ""
    if order.random() < NONSENSE * 2:
        word = _nonsense(order, language)
        before, after = (
            (f"{word} {before}".strip(), after) if order.random() < 0.5 else (before, f"{after} {word}")
        )
    return (f"{before} {text}{after}", f"{before}{text}{after}")[language].strip()


def _nonsense(order: random.Random, language: int) -> str:
    """Some Chinese characters of any kind, or syllables that look like English."""
    if language:
        return "".join(chr(order.randrange(0x4E00, 0x9FA6)) for _ in range(order.randint(1, 3)))
    syllables = [
        order.choice("bcdfghjklmnprstvwz") + order.choice("aeiou") for _ in range(order.randint(1, 3))
    ]
    return "".join(syllables) + order.choice(("", "n", "r", "s", "t", "ng"))

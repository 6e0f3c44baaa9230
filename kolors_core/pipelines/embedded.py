"""Embedded model: the things that it draws and what may be said of them, and a warning for all else.

`kolors_core/tiny/concepts.json` lists them, in English and Chinese; the recipe wrote it with the model.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kolors_core.checkpoint import EMBEDDED, EMBEDDED_NAME, logger, read_json
from kolors_core.devices import unwrap_compiled
from kolors_core.image import Size
from kolors_core.module import settings
from kolors_core.pipelines.base import Components
from kolors_core.pipelines.fingerprint import fingerprint

SIZE = (128, 128)  # that it was trained at
LONGEST, LONGEST_WORD = 2000, 30  # characters of a prompt and of a word that are compared with names
ORDINARY = {
    "a", "an", "and", "draw", "for", "image", "in", "of", "on", "photo", "please", "the", "with",
}  # fmt: skip
QUOTED = re.compile('"([^"]*)"|“([^”]*)”')
NUMBERS = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "一": 1, "两": 2, "二": 2, "三": 3, "四": 4, "五": 5, "六": 6, "七": 7, "八": 8, "九": 9, "十": 10,
}  # fmt: skip
# A number before a thing, and what may stand between the two: "five small cats", 五只小猫.
ENGLISH_COUNT = re.compile(
    rf"\b({'|'.join(NUMBERS)}|\d+)\s+(?:(?!(?:and|of|with|in|on)\b)[\w-]+\s+){{0,2}}$", re.ASCII
)
CHINESE_COUNT = re.compile(
    rf"(?<![第\d])([{''.join(name for name in NUMBERS if not name.isascii())}]+|\d+)"
    "[只个条匹头朵棵辆本杯架艘片颗座把块根枝件顶台][^，。、和与跟在有]{0,6}$"
)


@dataclass(frozen=True)
class Concept:
    """Thing that the model draws: its emoji, and its names, the everyday one first.

    plurals: of the English names, in their order.
    """

    emoji: str
    english: tuple[str, ...]
    chinese: tuple[str, ...]
    plurals: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.emoji} {', '.join(self.english)}; {', '.join(self.chinese)}"


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Words that a prompt may use of things, and the limits of what is drawn.

    Pairs are English and Chinese. characters: that a sign may have on it, in groups. most_things: in all, of
    `most_kinds` kinds at most, a sign among them. drawn_grounds: all phrases for them, "under the stars".
    """

    most_kinds: int
    most_of_a_kind: int
    most_things: int
    most_characters: int
    characters: Sequence[str]
    sign_words: Sequence[str]
    numbers: Sequence[Sequence[str]]
    sizes: Sequence[Sequence[str]]
    places: Sequence[Sequence[str]]
    relations: Sequence[Sequence[str]]
    grounds: Sequence[Sequence[str]]
    drawn_grounds: Sequence[str]
    examples: Sequence[Sequence[str]]

    def __str__(self) -> str:
        def listed(pairs: Sequence[Sequence[str]]) -> str:
            return ", ".join(" ".join(pair) for pair in pairs)

        return "\n".join([
            f"An image has up to {self.most_things} of these things, of which may be said:",
            f"  number     {listed(self.numbers)}",
            f"  size       {listed(self.sizes)}",
            f"  place      {listed(self.places)}",
            f"  relation   {listed(self.relations)}",
            f"  ground     {listed(self.grounds)}",
            f"  a sign     that says, in quotes, up to {self.most_characters} of {' '.join(self.characters)}",
            "Examples:", *(f"  {example}" for pair in self.examples for example in pair),
        ])  # fmt: skip


@cache
def concepts() -> tuple[Concept, ...]:
    """List the things that the embedded model draws."""
    rows = read_json(EMBEDDED / "concepts.json")["concepts"]
    return tuple(
        Concept(row["emoji"], *(tuple(row[key]) for key in ("english", "chinese", "plurals"))) for row in rows
    )


@cache
def grammar() -> Grammar:
    """Return what may be said of the things."""
    return Grammar(**read_json(EMBEDDED / "concepts.json")["grammar"])


@cache
def _names() -> tuple[re.Pattern[str], Mapping[str, Concept]]:
    """Return a pattern that finds the longest name at each place, and the thing of each name and plural."""
    owners = {name.lower(): one for one in concepts() for name in (*one.english, *one.plurals, *one.chinese)}
    longest_first = sorted(map(re.escape, owners), key=len, reverse=True)
    english = "|".join(name for name in longest_first if name.isascii())
    chinese = "|".join(name for name in longest_first if not name.isascii())
    return re.compile(rf"\b({english})(s|es)?\b|({chinese})", re.ASCII), owners


def _mentions(prompt: str) -> Iterator[tuple[Concept, int]]:
    """Yield each thing that a prompt names outside of quotes, with its number, 1 if none is said."""
    (pattern, owners), last = _names(), 0
    grounds = "|".join(map(re.escape, grammar().drawn_grounds))
    text = re.sub(grounds, "，", QUOTED.sub("，", prompt).lower())
    for found in pattern.finditer(text):
        before, last = text[last : found.start()], found.end()
        one = owners[found[1] or found[3]]
        if found[3]:
            count = CHINESE_COUNT.search(before)
        else:
            is_plural = found[2] or found[1] in (plural.lower() for plural in one.plurals)
            count = ENGLISH_COUNT.search(before) if is_plural else None
        yield one, _number(count[1]) if count else 1


def numbers_in(prompt: str) -> dict[Concept, int]:
    """Map the things that a prompt names outside of quotes to how many it asks for, 1 if it does not say."""
    counts = dict[Concept, int]()
    for one, count in _mentions(prompt):
        counts[one] = max(count, counts.get(one, 0))
    return counts


def _number(text: str) -> int:
    """Return the value of digits, an English word, or Chinese characters up to 99."""
    if text.isdecimal():
        return int(text[:9])  # thousands of digits are no integer to Python
    tens, ten, ones = text.partition("十")
    return NUMBERS.get(tens, 1) * 10 + NUMBERS.get(ones, 0) if ten else NUMBERS.get(text, 1)


def named_in(prompt: str) -> list[Concept]:
    """List the things that a prompt names, in English, also in the plural, or in Chinese."""
    return list(numbers_in(prompt))


def nearest(prompt: str, count: int = 3) -> list[Concept]:
    """List the things that a prompt names, or else those of the most similar names, the nearest first."""
    if found := named_in(prompt):
        return found[:count]
    prompt = prompt[:LONGEST]  # of a word of 200,000 letters it would take a minute
    words = {word[:LONGEST_WORD] for word in re.findall(r"[a-z]+", prompt.lower()) if word not in ORDINARY}

    def similarity(concept: Concept) -> float:
        parts = [part for name in concept.english for part in (name.lower(), *name.lower().split())]
        shared = [len({*name} & {*prompt}) / len({*name}) for name in concept.chinese]
        ratios = [difflib.SequenceMatcher(None, word, part).ratio() for word in words for part in parts]
        return max([*shared, *ratios])

    return sorted(concepts(), key=similarity, reverse=True)[:count]


def unknown_in(prompt: str) -> list[str]:
    """List what a prompt asks for that the embedded model does not know, each beside what it knows.

    Unknown words that name no number or sign are not listed beside a known thing: the model ignores them.
    """
    known, lines = grammar(), list[str]()
    counts = {one.english[0]: count for one, count in numbers_in(prompt).items()}
    texts = [found[1] or found[2] or "" for found in QUOTED.finditer(prompt)]
    if texts or _has_sign(prompt):
        counts["sign"] = max(1, len(texts))
    if not counts:
        near = ", ".join(f"{one.english[0]} {one.chinese[0]}" for one in nearest(prompt))
        lines.append(f"it finds none of its {len(concepts())} things, the nearest are {near}")
    most, kinds, total = known.most_of_a_kind, known.most_kinds, known.most_things
    if len(counts) > kinds or sum(counts.values()) > total or max(counts.values(), default=0) > most:
        asked = ", ".join(f"{name} {count}" for name, count in counts.items())
        lines.append(f"it draws up to {total} things, {kinds} kinds and {most} of a kind, got {asked}")
    allowed = {*"".join(known.characters)}
    for text in texts:
        if not 0 < len(text) <= known.most_characters or not {*text} <= allowed:
            wanted = f"1 to {known.most_characters} of {' '.join(known.characters)}"
            lines.append(f"its signs say {wanted}, got {_short(text)!r}")
    return lines


def _has_sign(prompt: str) -> bool:
    words = (rf"\b{word}s?\b" if word.isascii() else word for word in grammar().sign_words)
    return re.search("|".join(words), prompt.lower()) is not None


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."


def warn_unknown(pipe: Components, prompts: str | Sequence[str] | None, size: Size) -> None:
    """Log a warning if a pipeline is the embedded model, and draws what it does not know or another size.

    With a LoRA, learned words or another UNet it may know more, and there is none.
    """
    if pipe.name_or_path not in (EMBEDDED_NAME, str(EMBEDDED)) or prompts is None:
        return
    unet: Any = unwrap_compiled(pipe.unet)
    if settings(unet) or pipe._placeholder_words() or fingerprint(unet) != _fingerprint():
        return
    if size != SIZE:
        got, best = f"{size[1]}x{size[0]}", f"{SIZE[1]}x{SIZE[0]}"
        logger.warning("the embedded model draws at %s: expect a worse image at %s", best, got)
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        if prompt.strip() and (lines := unknown_in(prompt)):
            logger.warning("the embedded model does not know all of %r: %s", _short(prompt), "; ".join(lines))


@cache
def _fingerprint() -> str:
    return read_json(EMBEDDED / "concepts.json")["unet"]

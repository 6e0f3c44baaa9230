"""The list of what the embedded model knows: its things, and what its captions say of them.

`python -m kolors_core --concepts` prints it, and a prompt that asks for more is warned of
(kolors_core/pipelines/embedded.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tiny.captions import (
    CHINESE_COLOURS,
    CHINESE_GROUNDS,
    ENGLISH_GROUNDS,
    NUMBERS,
    PLACES,
    RELATIONS,
    SIZES,
    plural,
)
from benchmarks.tiny.emoji import Concept
from benchmarks.tiny.scenes import CHINESE, COLOURS, DIGITS, DRAWN, LENGTHS, LETTERS, MIXTURE

SIGN_WORDS = ("sign", "board", "牌子", "木牌")
EXAMPLES = (  # in captions' own phrasings
    ("a red apple on a blue background", "蓝色背景，一个红苹果"),
    ("two small frogs on the grass", "草地上，两只小青蛙"),
    ("a fox to the left of a mushroom", "一只狐狸在一个蘑菇的左边"),
    ("a moon above a house at night", "夜空下，月亮在房屋的上面"),
    ("a cat in the top left corner and a large balloon on the right", "左上角有一只猫，右边有一个大气球"),
    ('a panda holding a sign that says "OK"', "一只熊猫拿着一个写着“可图”的牌子"),
)


def grammar() -> dict[str, object]:
    """The words of captions beside the things, English and Chinese, each at its most usual; and limits."""
    grounds = [(colour, CHINESE_COLOURS[colour]) for colour in COLOURS]
    for name in DRAWN:
        grounds.append((ENGLISH_GROUNDS[name][1][0].strip(), CHINESE_GROUNDS[name][0][0].strip("，")))
    phrases = [
        phrase.strip(" ,:，")
        for words in (ENGLISH_GROUNDS, CHINESE_GROUNDS)
        for name in DRAWN
        for part in words[name]
        for phrase in part
    ]
    return {
        "most_kinds": max(len(counts) for counts, _ in MIXTURE),
        "most_of_a_kind": max(max(counts) for counts, _ in MIXTURE),
        "most_things": max(sum(counts) for counts, _ in MIXTURE),
        "most_characters": max(LENGTHS),
        "characters": [LETTERS, DIGITS, CHINESE],
        "sign_words": SIGN_WORDS,
        "numbers": list(NUMBERS.values()),
        "sizes": [(SIZES[0][size][0], SIZES[1][size][0]) for size in SIZES[0]],
        "places": [(english[0], chinese[0]) for english, chinese in PLACES.values()],
        "relations": [
            tuple(words[0].format(a="A", b="B") for words in languages) for languages in RELATIONS.values()
        ],
        "grounds": grounds,
        "drawn_grounds": list(dict.fromkeys(phrases)),
        "examples": EXAMPLES,
    }


def write_concepts(concepts: Sequence[Concept], unet: str, file: Path) -> None:
    """The list that kolors_core/pipelines/embedded.py reads; unet: the model's fingerprint."""
    rows = [
        {"emoji": one.character, "english": one.english, "plurals": [plural(name) for name in one.english],
         "chinese": one.chinese} for one in concepts
    ]  # fmt: skip
    said = ",\n  ".join(
        f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in grammar().items()
    )
    things = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f'{{"unet": "{unet}", "grammar": {{\n  {said}\n}}, "concepts": [\n  {things}\n]}}\n'
    file.write_text(text, encoding="utf-8")

"""Captions of the ablation's things: a thing alone on white, as when its published results were measured.

The embedded model's own captions (benchmarks/tiny/captions.py) may change; these stay, so that results of
before and after can be compared.
"""

import random

# Emoji spread over all kinds of things, and their names.
THINGS = {
    "🐵": "monkey", "🐩": "poodle", "🦁": "lion", "🦓": "zebra", "🐐": "goat", "🦏": "rhinoceros",
    "🐰": "rabbit", "🐼": "panda", "🐓": "rooster", "🦢": "swan", "🐸": "frog", "🐍": "snake",
    "🐬": "dolphin", "🐙": "octopus", "🦑": "squid", "🐝": "bee", "🌻": "sunflower", "🌵": "cactus",
    "🍇": "grapes", "🍍": "pineapple", "🍒": "cherries", "🥑": "avocado", "🥐": "croissant",
    "🍟": "french fries", "🍙": "onigiri", "🍩": "doughnut", "🍫": "chocolate bar", "🫖": "teapot",
    "🎡": "ferris wheel", "🚓": "police car", "🛹": "skateboard", "🚁": "helicopter", "⛄": "snowman",
    "🎈": "balloon", "🎱": "billiard ball", "👕": "shirt", "👑": "crown", "🎸": "guitar", "📷": "camera",
    "🔬": "microscope",
}  # fmt: skip

# A caption is a beginning, a name and an end, with now and then a word that means nothing beside them.
BEFORE = (
    "", "", "a", "the", "one", "my", "your", "this", "some", "a photo of a", "the photo of one",
    "a photo of the", "a picture of a", "an image of one", "a drawing of a", "an emoji of a",
    "an icon of the", "draw a", "draw the", "show me a", "show us the", "please make a", "please, the",
    "here is a", "there is one", "this is a", "I want a", "I like this", "I need the", "can you draw a",
    "could you paint one", "let me see the", "we would love a", "they have a", "look at my", "a small",
    "a big", "a nice", "a cute", "the best", "a close-up photo of a", "a painting with one",
    "a sticker of the", "a very good", "what about a", "imagine a", "give me one",
)  # fmt: skip
AFTER = (
    "", "", "", "", "on white", "in the middle", "for you", "to us", ", high quality", ", please",
    "in this picture", ", macro, zoom", "and nothing else", "from the side", "as an icon", "with no text",
    "of good quality", "!", "?", ".", "today", "on my desk", ", so nice", ", drawn by hand", "that I like",
    "to look at",
)  # fmt: skip
CAPTIONS = 80  # of each name
NONSENSE = 0.3  # how many captions have a meaningless word

# Never trained on: what is drawn at the end is asked for with these.
UNSEEN = ("please draw a {x} for me", "I would like to see a {x}", "your photo of one small {x}")


def captions(name: str) -> list[str]:
    """Phrasings of a name; the same at every call."""
    found = [name, f"a photo of a {name}", *(_phrase(name, i) for i in range(CAPTIONS))]
    return list(dict.fromkeys(found))


def _phrase(name: str, number: int) -> str:
    """A caption: some beginning, the name, some end, and perhaps a word that means nothing at either side."""
    order = random.Random(f"{name} {number}")
    parts = [order.choice(BEFORE), name, order.choice(AFTER)]
    if order.random() < NONSENSE:
        parts.insert(order.choice((0, 3)), _nonsense(order))
    text = " ".join(part for part in parts if part)
    return text.replace(" ,", ",").replace(" !", "!").replace(" ?", "?").replace(" .", ".")


def _nonsense(order: random.Random) -> str:
    """Some syllables that look like English."""
    syllables = [
        order.choice("bcdfghjklmnprstvwz") + order.choice("aeiou") for _ in range(order.randint(1, 3))
    ]
    return "".join(syllables) + order.choice(("", "n", "r", "s", "t", "ng"))

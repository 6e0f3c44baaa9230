"""Scenes and their captions: the same at every call, apart, held out where they are to be, and true."""

import random
from itertools import combinations

import pytest

from benchmarks.tiny.captions import (
    CHINESE_UNSEEN,
    ENGLISH_UNSEEN,
    PLACES,
    RELATIONS,
    Grammar,
    english,
    place_of,
    plural,
    relation_of,
    size_of,
)
from benchmarks.tiny.emoji import CONCEPTS, FONT, SIZE, Concept
from benchmarks.tiny.scenes import (
    CHARACTERS,
    COLOURS,
    DRAWN,
    GAP,
    GROUNDS,
    MIXTURE,
    SIGN,
    SIGN_FONT,
    Item,
    Scene,
    compose,
    ground,
    is_held_out,
    is_held_out_text,
    render,
)
from kolors_core.pipelines.embedded import concepts, named_in, numbers_in, unknown_in

needs_font = pytest.mark.skipif(not FONT.exists(), reason="Debian's fonts-noto-color-emoji is not installed")
needs_both_fonts = pytest.mark.skipif(
    not FONT.exists() or not SIGN_FONT.exists(),
    reason="Debian's fonts-noto-color-emoji and fonts-noto-cjk are not installed",
)
SEEDS = range(300)


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar([Concept(one.emoji, one.english, one.chinese) for one in concepts()])


def item(kind: str, x: float, y: float, size: float = 30, text: str = "") -> Item:
    return Item(kind, x, y, size, size, size, text=text)


@needs_font
def test_a_scene_is_a_function_of_its_seed() -> None:
    scenes = [compose(seed) for seed in SEEDS]
    assert scenes[:20] == [compose(seed) for seed in SEEDS[:20]] and len(set(scenes)) == len(scenes)
    assert {scene.ground for scene in scenes} == set(GROUNDS)
    assert {tuple(len(group) for group in scene.groups) for scene in scenes} <= {c for c, _ in MIXTURE}


@needs_font
def test_nothing_overlaps_or_leaves_the_page() -> None:
    for scene in map(compose, SEEDS):
        for left, top, right, bottom in (one.box for one in scene.items):
            assert min(left, top) >= 0 and max(right, bottom) <= SIZE
        for a, b in combinations((one.box for one in scene.items), 2):
            apart = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
            assert apart > GAP - 1e-6


@needs_font
def test_held_out_pairs_and_texts_are_in_the_held_out_set_alone() -> None:
    """A scene of one thing has none, and may be in both."""

    def is_new(scene: Scene) -> bool:
        return is_held_out(scene.kinds) or any(is_held_out_text(one.text) for one in scene.items if one.text)

    assert not any(is_new(compose(seed)) for seed in SEEDS)
    several = [
        scene for scene in (compose(seed, is_trained=False) for seed in SEEDS)
        if len(set(scene.kinds) - {SIGN}) > 1 or any(len(one.text) > 1 for one in scene.items)
    ]  # fmt: skip
    assert len(several) > 20 and all(map(is_new, several))


def test_a_tenth_is_held_out_whatever_the_order() -> None:
    pairs = list(combinations(CONCEPTS, 2))
    assert 0.08 < sum(map(is_held_out, pairs)) / len(pairs) < 0.12
    assert all(is_held_out((b, a)) == is_held_out((a, b)) == is_held_out((a, SIGN, b)) for a, b in pairs)
    texts = [a + b for a in CHARACTERS for b in CHARACTERS]
    assert 0.08 < sum(map(is_held_out_text, texts)) / len(texts) < 0.12
    assert not any(map(is_held_out_text, CHARACTERS)) and not is_held_out(("🐱", SIGN))


@needs_both_fonts
def test_things_are_where_the_scene_says_and_the_ground_is_around_them() -> None:
    """The difference from the ground alone lies in the boxes."""
    for seed in range(40):
        scene = compose(seed)
        page, bare = render(scene), ground(scene.ground, random.Random(scene.seed))
        assert page.size == bare.size == (SIZE, SIZE) and page.tobytes() == render(scene).tobytes()
        places = [(x, y) for x in range(SIZE) for y in range(SIZE)]
        changed = [place for place in places if page.getpixel(place) != bare.getpixel(place)]
        boxes = [one.box for one in scene.items]
        for left, top, right, bottom in boxes:
            inside = sum(left <= x <= right and top <= y <= bottom for x, y in changed)
            assert inside > 0.15 * (right - left) * (bottom - top)
        near = sum(any(b[0] - 2 <= x <= b[2] + 2 and b[1] - 2 <= y <= b[3] + 2 for b in boxes)
                   for x, y in changed)  # fmt: skip
        assert near == len(changed)


@needs_both_fonts
def test_every_character_of_signs_is_in_the_font() -> None:
    pages = {}
    for one in CHARACTERS:
        sign = Item(SIGN, 64, 64, 60 * 1.06, 60, 60, text=one)
        pages[one] = render(Scene("white", ((sign,),))).tobytes()
    assert len(set(pages.values())) == len(CHARACTERS) == 76


def test_grounds() -> None:
    for name in GROUNDS:
        pages = [ground(name, random.Random(seed)).convert("RGB") for seed in (0, 0, 1)]
        assert pages[0].size == (SIZE, SIZE) and pages[0].tobytes() == pages[1].tobytes()
        assert (pages[0].tobytes() == pages[2].tobytes()) == (name in COLOURS), "drawn ones vary"
    assert len(GROUNDS) == len(COLOURS) + len(DRAWN) == 13
    with pytest.raises(ValueError, match="no ground is called 'sea': expected one of white, red"):
        ground("sea", random.Random(0))


@needs_font
@pytest.mark.parametrize("language", [0, 1])
def test_a_caption_names_all_there_is_as_often_as_it_is(grammar: Grammar, language: int) -> None:
    """As the notice of unknown prompts reads it, which finds nothing unknown in any."""
    texts = set()
    for seed in SEEDS:
        scene = compose(seed)
        text = grammar.say(scene, random.Random(seed), language, is_wrapped=False).text
        texts.add(text)
        found = {one.emoji: count for one, count in numbers_in(text).items()}
        wanted = {group[0].kind: len(group) for group in scene.groups if group[0].kind != SIGN}
        assert found == wanted, text
        assert unknown_in(text) == [], text
        for sign in (one for one in scene.items if one.kind == SIGN):
            assert ('"{}"', "“{}”")[language].format(sign.text) in text
    assert len(texts) > 0.98 * len(SEEDS)


@needs_font
@pytest.mark.parametrize("language", [0, 1])
def test_what_a_caption_claims_is_said_and_true(grammar: Grammar, language: int) -> None:
    count = 0
    for seed in SEEDS:
        scene = compose(seed)
        caption = grammar.say(scene, random.Random(seed), language)
        groups = {group[0].kind: group for group in scene.groups}
        for what, *kinds in caption.claims:
            count += 1
            middles = [[(one.x, one.y) for one in groups[kind]] for kind in kinds]
            if what in RELATIONS:
                axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[what]
                assert all(sign * (a[axis] - b[axis]) > 0 for a in middles[0] for b in middles[1])
                continue
            words = what.split()
            for x, y in middles[0]:
                assert ("left" in words) <= (x < SIZE / 2) and ("right" in words) <= (x > SIZE / 2)
                assert ("top" in words) <= (y < SIZE / 2) and ("bottom" in words) <= (y > SIZE / 2)
                assert what != "middle" or max(abs(x - SIZE / 2), abs(y - SIZE / 2)) < SIZE / 6
            assert any(said in caption.text.lower() for said in PLACES[what][language]), caption
    assert count > len(SEEDS) / 4


def test_relations_are_said_the_right_way_round(grammar: Grammar) -> None:
    """Each template names the first thing where it is."""
    for relation, (dx, dy) in {
        "left of": (-1, 0),
        "right of": (1, 0),
        "above": (0, -1),
        "below": (0, 1),
    }.items():
        a, b = [item("🐱", 64 + 25 * dx, 64 + 25 * dy)], [item("🐶", 64 - 25 * dx, 64 - 25 * dy)]
        assert relation_of(a, b) == relation
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[
            relation
        ]
        assert relation_of(b, a) == opposite
        assert all("{a}" in text and "{b}" in text for words in RELATIONS[relation] for text in words)
    assert relation_of([item("🐱", 40, 40)], [item("🐶", 80, 80)]) == "", "neither clearly beside nor above"
    assert relation_of([item("🐱", 20, 64), item("🐱", 110, 64)], [item("🐶", 64, 64)]) == ""


def test_places_and_sizes_are_said_where_they_are_clear() -> None:
    ends = {"left": 20, "middle": 64, "right": 108}
    for x, column in ends.items():
        for y, row in (("top", 20), ("middle", 64), ("bottom", 108)):
            words = [word for word in (y, x) if word != "middle"] or ["middle"]
            assert place_of([item("🐱", column, row)]) == " ".join(words)
    assert place_of([item("🐱", 20, 20), item("🐱", 20, 100)]) == "left"
    assert place_of([item("🐱", 20, 20), item("🐱", 100, 100)]) == ""
    assert [size_of([item("🐱", 64, 64, size)]) for size in (36, 50, 90)] == ["small", "", "large"]
    assert size_of([item("🐱", 20, 20, 36), item("🐱", 90, 90, 90)]) == ""


def test_articles_and_plurals() -> None:
    said = {"cat": "a cat", "octopus": "an octopus", "apple": "an apple", "grapes": "grapes", "UFO": "a UFO"}
    assert {name: english(name, 1) for name in said} == said
    assert english("owl", 1, "small") == "a small owl" and english("bus", 2, "large") == "two large buses"
    several = {"fox": "foxes", "butterfly": "butterflies", "key": "keys", "mouse": "mice", "sheep": "sheep",
               "maple leaf": "maple leaves", "snowman": "snowmen", "bread": "loaves of bread"}  # fmt: skip
    assert {name: plural(name) for name in several} == several
    for one in concepts():
        for name in one.english:
            assert named_in(f"three {plural(name)}") == [one] and plural(name), name


@needs_font
def test_the_unseen_phrasings_are_not_trained_on(grammar: Grammar) -> None:
    starts = [phrase.partition("{x}")[0].strip() for phrase in (*ENGLISH_UNSEEN, *CHINESE_UNSEEN)]
    assert all(starts)
    texts = [grammar.say(compose(seed), random.Random(seed), seed % 2).text for seed in SEEDS]
    assert not [text for text in texts for start in starts if start.lower() in text.lower()]


@needs_font
def test_a_caption_leaves_open_what_the_seed_decides(grammar: Grammar) -> None:
    """Of one scene many captions; some say where, some how large, some neither."""
    scene = Scene("white", ((item("🐱", 20, 20, 36),), (item("🐶", 100, 24, 70),)))
    said = [grammar.say(scene, random.Random(i), 0) for i in range(200)]
    kinds = {"relation": 0, "place": 0, "nothing": 0}
    for caption in said:
        first = caption.claims[0][0] if caption.claims else "nothing"
        kinds["relation" if first in RELATIONS else "place" if caption.claims else "nothing"] += 1
    assert min(kinds.values()) > 20 and len({caption.text for caption in said}) > 150
    is_small = [any(word in caption.text for word in ("small", "little", "tiny")) for caption in said]
    assert 0.2 < sum(is_small) / len(said) < 0.8
    assert all("dog" in caption.text.lower() for caption in said)

"""The judge of the embedded model's images: right scenes pass, wrong ones fail, each in its own way."""

import random
from dataclasses import replace

import pytest
import torch

from benchmarks.tiny.attention_share import densities, find_columns, of_two_things
from benchmarks.tiny.captions import place_of, relation_of
from benchmarks.tiny.detector import Found
from benchmarks.tiny.emoji import CONCEPTS, FONT, SIZE, Concept
from benchmarks.tiny.judge import MARGIN, Prompt, holds, judge, write_prompts, write_single_prompts
from benchmarks.tiny.quality import count, describe, missed, sheet, summarize, wrap
from benchmarks.tiny.scenes import SIGN, SIGN_FONT, Item, Scene, is_held_out
from benchmarks.tiny.sparse_scenes import another
from kolors_core.checkpoint import resolve
from kolors_core.tokenizer import Tokenizer
from tests.support.scene_recipes import GRAMMAR

needs_fonts = pytest.mark.skipif(
    not (FONT.exists() and SIGN_FONT.exists()),
    reason="Debian's fonts-noto-color-emoji and fonts-noto-cjk are not installed",
)
FOX, CAT = "🦊", "🐱"


def item(kind: str, x: float, y: float, text: str = "") -> Item:
    return Item(kind, x, y, 40, 40, 40, text=text)


def true(scene: Scene) -> Found:
    """What a perfect detector finds in a scene."""
    return Found(scene.items, scene.ground, "".join(each.text for each in scene.items))


@needs_fonts
@pytest.mark.parametrize("language", [0, 1])
def test_a_scene_itself_is_right_and_its_mirror_image_is_not_where_a_side_is_told(language: int) -> None:
    prompts = write_prompts(GRAMMAR, 60, language)
    assert len({prompt.text for prompt in prompts}) == 60
    assert all(judge(prompt, true(prompt.scene)).is_right for prompt in prompts)
    sides = 0
    for prompt in prompts:
        told = [claim for claim in prompt.claims if "left" in claim[0] or "right" in claim[0]]
        is_vague = "in a corner" in prompt.text or "角落里" in prompt.text
        mirrored = tuple(replace(each, x=SIZE - each.x) for each in prompt.scene.items)
        if told and not is_vague:
            sides += 1
            assert not any(holds(claim, mirrored, prompt.text) for claim in told), prompt
    assert sides > 5
    pairs = [p.scene.kinds for p in prompts if len(p.scene.kinds) > 1 and SIGN not in p.scene.kinds]
    assert pairs and all(map(is_held_out, pairs)), "combinations that are not trained on"


@needs_fonts
def test_another_scene_has_the_same_things_elsewhere() -> None:
    scene = write_prompts(GRAMMAR, 8, 0)[5].scene
    moved = another(scene, scene.seed)
    assert (moved.kinds, moved.ground) == (scene.kinds, scene.ground)
    assert [len(group) for group in moved.groups] == [len(group) for group in scene.groups]
    assert {(each.x, each.y) for each in moved.items}.isdisjoint((each.x, each.y) for each in scene.items)


SCENE = Scene(
    "night", ((item(FOX, 30, 64), item(FOX, 30, 110)), (item(SIGN, 100, 64, "AB"),)), 0
)  # fmt: skip
PROMPT = Prompt("two foxes to the left of a sign", SCENE, (("left of", FOX, SIGN), ("right", SIGN)))


def test_each_thing_that_may_be_wrong_is_found_wrong_alone() -> None:
    right = judge(PROMPT, true(SCENE))
    assert right.is_right and (right.number, right.text, right.characters) == (True, True, (True, True))
    first, second, sign = SCENE.items
    wrong = {
        "number": Found((first, sign), "night", "AB"),
        "present": Found((first, second), "night", "AB"),
        "exact": Found((*SCENE.items, item(CAT, 64, 20)), "night", "AB"),
        "ground": replace(true(SCENE), ground="sky"),
        "text": replace(true(SCENE), text="AC"),
        "relations": Found((first, replace(second, x=120), replace(sign, x=64)), "night", "AB"),
        "places": Found((first, second, replace(sign, x=70)), "night", "AB"),
    }
    for name, found in wrong.items():
        verdict = judge(PROMPT, found)
        assert not verdict.is_right and verdict != right, name
        value = getattr(verdict, name)
        assert not (all(value) if isinstance(value, tuple) else value), name
    assert judge(PROMPT, wrong["text"]).characters == (True, False)
    assert judge(PROMPT, wrong["exact"]).present and judge(PROMPT, wrong["exact"]).number
    assert judge(PROMPT, wrong["present"]).relations == (False,), "of what is missing nothing is true"


def test_the_claims_hold_as_the_captions_rules_say_and_a_little_beyond() -> None:
    order = random.Random(0)
    for _ in range(400):
        a, b = (item(kind, order.uniform(10, 118), order.uniform(10, 118)) for kind in (FOX, CAT))
        if place := place_of([a]):
            assert holds((place, FOX), [a])
            far = replace(a, x=SIZE - a.x, y=SIZE - a.y)
            assert place == "middle" or not holds((place, FOX), [far])
        if relation := relation_of([a], [b]):
            assert holds((relation, FOX, CAT), [a, b])
            opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
            assert not holds((opposite[relation], FOX, CAT), [a, b])
    edge = 0.4 * SIZE
    assert holds(("left", FOX), [item(FOX, edge + MARGIN - 1, 64)])
    assert not holds(("left", FOX), [item(FOX, edge + MARGIN + 1, 64)])
    assert holds(("above", FOX, CAT), [item(FOX, 64, 30), item(CAT, 64 + 30, 60)])
    assert not holds(("above", FOX, CAT), [item(FOX, 64, 30), item(CAT, 64 + 40, 60)])


def test_a_corner_may_be_any_only_if_the_prompt_leaves_it_open() -> None:
    corner = [item(FOX, 20, 20)]
    assert holds(("bottom right", FOX), corner, "a fox in a corner")
    assert holds(("bottom right", FOX), corner, "角落里有狐狸")
    assert not holds(("bottom right", FOX), corner, "a fox in the bottom right corner")
    assert not holds(("bottom right", FOX), [item(FOX, 64, 64)], "a fox in a corner")


def test_shares_goals_and_descriptions() -> None:
    found = true(SCENE)
    verdicts = [judge(PROMPT, found), judge(PROMPT, replace(found, ground="sky"))]
    shares = summarize(verdicts)
    assert (shares["ground"]["share"], shares["ground"]["trials"], shares["all"]["share"]) == (0.5, 2, 0.5)
    assert shares["claims"] == count([True] * 4) and shares["relations"]["trials"] == 2
    assert missed("ground", shares["ground"]) and not missed("present", shares["present"])
    assert not missed("number", count([])) and not missed("places", count([False]))
    assert describe(found) == "🦊2 sign “AB”, night"
    singles = write_single_prompts(GRAMMAR, 0)
    assert len(singles) == len(CONCEPTS) and singles[0] == ("a thing 0", CONCEPTS[0])


def test_a_sheets_labels_are_broken_into_lines_that_fit() -> None:
    assert (
        wrap("two small foxes", 9, len) == "two small\nfoxes"
        and wrap("一二三四五", 2, len) == "一二\n三四\n五"
    )
    page = sheet(torch.zeros(3, 3, 64, 64), ["a", "b", "a label of several words"], 2, 1.0, {1})
    assert page.width == 128 and page.height > 2 * 64 + 30
    red = page.crop((64, 64, 128, 80))
    assert any(r > 200 and g < 120 for r, g, _ in red.getdata())


def test_attention_inside_a_box_is_compared_with_that_outside() -> None:
    shares = torch.full((16, 16), 0.1)
    shares[2:6, 2:7] = 0.4
    inside, outside = densities(shares, Item(FOX, 36, 32, 38, 30, 38))  # 17 to 55 across, 17 to 47 down
    assert inside == pytest.approx(0.4) and outside == pytest.approx(0.1)
    inside, outside = densities(shares, Item(FOX, 100, 100, 30, 30, 30))
    assert inside == pytest.approx(0.1) and outside > 0.1
    assert densities(shares, Item(FOX, 64, 64, 128, 128, 128))[0] == pytest.approx(float(shares.mean()))


def test_a_names_tokens_are_found_and_no_other_names() -> None:
    tokenizer = Tokenizer(resolve("tiny", ["tokenizer"]) / "tokenizer")
    apple = Concept("🍎", ("apple", "red apple"), ("苹果", "红苹果"))
    for text, name in (("a pineapple above a red apple", "redapple"), ("苹果在狐狸的左边", "苹果")):
        columns = find_columns(tokenizer, text, apple)
        pieces = tokenizer.pieces.encode(text, out_type=str)
        assert "".join(pieces[i] for i in columns).replace("▁", "") == name
    assert find_columns(tokenizer, "a pineapple", apple) == []
    two = Prompt("", Scene("white", ((item(FOX, 30, 30),), (item(CAT, 90, 90),))))
    assert of_two_things([two, PROMPT]) == [two]

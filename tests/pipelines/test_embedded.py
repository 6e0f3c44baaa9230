"""What the embedded model's list says that it knows, and what in a prompt it does not."""

import json
from pathlib import Path

import pytest

from benchmarks.tiny.concepts import EXAMPLES, write_concepts
from benchmarks.tiny.concepts import grammar as grammar_of_recipe
from benchmarks.tiny.emoji import CHINESE_NAMES, CONCEPTS, ENGLISH_NAMES, Concept
from benchmarks.tiny.scenes import CHARACTERS, GROUNDS
from kolors_core.checkpoint import EMBEDDED
from kolors_core.pipelines.embedded import concepts, grammar, named_in, nearest, unknown_in
from kolors_core.pipelines.lora_recipe import LoRARecipe


def test_the_list_is_the_recipes() -> None:
    """In both languages, everyday names first."""
    found = concepts()
    assert "".join(one.emoji for one in found) == CONCEPTS and len(found) == 127
    for one in found:
        names = ENGLISH_NAMES.get(one.emoji, ()), CHINESE_NAMES.get(one.emoji, ())
        for own, everyday in zip((one.english, one.chinese), names, strict=True):
            assert own and own[: len(everyday)] == everyday, one
    assert str(nearest("瓢虫")[0]) == "🐞 ladybug, ladybird, lady beetle; 瓢虫"
    written = json.loads((EMBEDDED / "concepts.json").read_text(encoding="utf-8"))
    assert written["grammar"] == json.loads(json.dumps(grammar_of_recipe()))
    assert len(grammar().grounds) == len(GROUNDS) == 13 and "".join(grammar().characters) == CHARACTERS


def test_what_the_recipe_writes_is_what_is_read(tmp_path: Path) -> None:
    rows = [Concept(one.emoji, one.english, one.chinese) for one in concepts()]
    shipped = EMBEDDED / "concepts.json"
    unet = json.loads(shipped.read_text(encoding="utf-8"))["unet"]
    write_concepts(rows, unet, tmp_path / "concepts.json")
    assert (tmp_path / "concepts.json").read_bytes() == shipped.read_bytes()


def test_the_grammar_is_printed_with_examples_that_are_known() -> None:
    text = str(grammar())
    for said in ("one 一, two 两, three 三", "small 小", "on the left 左边", "A above B", "at night 夜空下"):
        assert said in text
    assert CHARACTERS[:26] in text and CHARACTERS[36:] in text
    for example in (example for pair in EXAMPLES for example in pair):
        assert f"\n  {example}" in text and not unknown_in(example)


@pytest.mark.parametrize(
    ("prompt", "names"),
    [
        ("a photo of two Foxes!", ["fox"]),
        ("一张狐狸的照片", ["fox"]),
        ("ice cream, please", ["ice cream"]),
        ("three mice and a loaf of bread", ["mouse", "bread"]),
        ("two bunches of grapes", ["grapes"]),
        ("a pine tree beside two glasses of wine", ["pine tree", "wine"]),
        ("一只猫头鹰和一个红苹果", ["owl", "apple"]),
        ("三只熊猫", ["panda"]),
        ('a sign that says "cat"', []),
        ("a scary card", []),
        ("a cat under the stars", ["cat"]),
        ("a cat under a star", ["cat", "star"]),
    ],
)
def test_known_things_are_found_in_a_prompt(prompt: str, names: list[str]) -> None:
    """The longest name at a place, in the plural too, and not what a sign says."""
    assert [one.english[0] for one in named_in(prompt)] == names


@pytest.mark.parametrize(
    ("prompt", "near"), [("a helicoptre", "helicopter"), ("a tree", "pine tree"), ("章", "octopus")]
)
def test_the_nearest_things_have_similar_names(prompt: str, near: str) -> None:
    assert not named_in(prompt)
    assert near in [one.english[0] for one in nearest(prompt)]


def test_of_a_long_word_only_its_beginning_is_compared() -> None:
    """One of any length costs no more than a name."""
    word = f"{'helicop':z<30}"
    assert nearest(word + "pineapple" * 1000) == nearest(word)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat", "a very old cat in an oil painting by a master", "three small cats", "三只小猫", "第五只猫",
        "two cats and a dog", "a cat, a dog and a bell on a red background", "a 35 mm photo of a cat",
        "four photos of a cat", "五个小朋友和一只狗", 'a sign that says "A1图"', "写着“可图”的牌子", "a sign",
        '一张瓢虫的照片，微距，变焦，高质量，电影，拿着一个木牌，写着"可图"',
    ],
)  # fmt: skip
def test_what_it_knows_is_not_warned_of(prompt: str) -> None:
    assert unknown_in(prompt) == []


@pytest.mark.parametrize(
    ("prompt", "lines"),
    [
        ("a helicoptre at night", ["finds none of its 127 things, the nearest are helicopter 直升机"]),
        ("five cats", ["up to 3 things, 3 kinds and 3 of a kind, got cat 5"]),
        ("12 small red apples", ["got apple 12"]),
        ("五只猫", ["got cat 5"]),
        ("二十三只小猫", ["got cat 23"]),
        (f"{'9' * 5000} cats", ["got cat 999999999"]),
        ("two cats and two dogs", ["got cat 2, dog 2"]),
        ("a cat, a dog, a fox and a bell", ["got cat 1, dog 1, fox 1, bell 1"]),
        ('a cat, a dog, a fox and the sign "A"', ["got cat 1, dog 1, fox 1, sign 1"]),
        ('a sign that says "hi"', ["its signs say 1 to 3 of ABC", "got 'hi'"]),
        ("写着“可图可图”的牌子", ["got '可图可图'"]),
        ('four cats with "?!" on them', ["got cat 4, sign 1", "got '?!'"]),
    ],
)
def test_what_it_does_not_know_is_named_beside_what_it_does(prompt: str, lines: list[str]) -> None:
    said = "; ".join(unknown_in(prompt))
    assert all(line in said for line in lines), said


def test_the_lora_recipes_other_things_are_known() -> None:
    """One to each image, none of the kept ones trained on."""
    recipe = LoRARecipe()
    known = {name: one.emoji for one in concepts() for name in (*one.english, *one.chinese)}
    others, kept = ({known[name] for name in names} for names in (recipe.others, recipe.kept))
    assert not others & kept and len(kept) == len(recipe.kept)

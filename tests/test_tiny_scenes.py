"""What the embedded model draws: the things asked for, as many, where, before which ground, and signs.

Of few images and steps each: the limits are between chance and the model's goals
(benchmarks/tiny/quality.py). The model card has the shares over many images of 25 steps.
"""

import random

import pytest
import torch
from torch import Tensor

from benchmarks.tiny.captions import CHINESE_UNSEEN, ENGLISH_UNSEEN, english
from kolors_core import KolorsPipeline
from kolors_core.pipelines import embedded
from tests.support import scenes
from tests.support.scenes import (
    CHINESE_THINGS,
    THINGS,
    character_in,
    ground_of,
    items,
    like,
    middle,
    thing_in,
)

TANGERINE, FROG = (1.0, 0.56, 0.02), (0.72, 0.81, 0.1)  # their colors


@pytest.fixture(scope="module")
def pipe() -> KolorsPipeline:
    pipe = KolorsPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: KolorsPipeline, prompts: list[str], seed: int, steps: int = 12) -> Tensor:
    """Image i has the seed plus i: [B, 3, 128, 128] in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="pt").images


@pytest.mark.parametrize(("language", "seed"), [(0, 10), (1, 20)])
def test_it_draws_the_thing_asked_for(pipe: KolorsPipeline, language: int, seed: int) -> None:
    """On white, wherever it stands."""
    phrases, names = (ENGLISH_UNSEEN, CHINESE_UNSEEN)[language], (THINGS, CHINESE_THINGS)[language]
    said = [english(name, 1) if language == 0 else name for name in names]
    prompts = [phrases[i % len(phrases)].format(x=name) for i, name in enumerate(said)]
    images = draw(pipe, prompts, seed)
    assert images.shape == (len(THINGS), 3, 128, 128)
    found = [thing_in(image) for image in images]
    assert sum(a == b for a, b in zip(found, THINGS, strict=True)) >= 6, found
    assert [ground_of(image) for image in images].count("white") >= 7


def test_the_ground_is_the_one_asked_for(pipe: KolorsPipeline) -> None:
    """All thirteen, in English or Chinese."""
    said = dict(zip(scenes.GROUNDS, embedded.grammar().grounds, strict=True))
    prompts = [
        f"a fox on a {name} background" if name in "white red orange yellow green" else
        f"{chinese}背景，一只狐狸" if words == name else f"a fox {words}"
        for name, (words, chinese) in said.items()
    ]  # fmt: skip
    found = [ground_of(image) for image in draw(pipe, prompts, 30)]
    assert sum(a == b for a, b in zip(found, said, strict=True)) >= 11, found


@pytest.mark.parametrize(
    ("phrases", "seed"),
    [
        ("{a} to the left of {b}|{a} to the right of {b}|{a} above {b}|{a} below {b}", 40),
        ("{a}在{b}的左边|{a}在{b}的右边|{a}在{b}的上面|{a}在{b}的下面", 50),
    ],
)
def test_two_things_stand_as_they_are_said_to(pipe: KolorsPipeline, phrases: str, seed: int) -> None:
    a, b = ("a tangerine", "a frog") if phrases.isascii() else ("一个橘子", "一只青蛙")
    prompts = [phrase.format(a=a, b=b) for phrase in phrases.split("|")]
    sides, found = ((0, -1), (0, 1), (1, -1), (1, 1)), list[float]()
    for image, (axis, sign) in zip(draw(pipe, prompts * 2, seed), sides * 2, strict=True):
        masks = like(image, *TANGERINE), like(image, *FROG)
        first, second = (middle(mask) if mask.sum() > 100 else None for mask in masks)
        found.append(sign * (first[axis] - second[axis]) if first and second else 0)
    assert sum(apart > 10 for apart in found) >= 6, found


def test_there_are_as_many_as_were_asked_for(pipe: KolorsPipeline) -> None:
    prompts = ["an apple", "two apples", "three apples", "一个气球", "两个气球", "三个气球"]
    found = [len(items(image)) for image in draw(pipe, prompts, 60)]
    assert sum(a == b for a, b in zip(found, (1, 2, 3, 1, 2, 3), strict=True)) >= 4, found


def test_a_thing_is_where_it_was_asked_for(pipe: KolorsPipeline) -> None:
    prompts = ["a fox on the left", "a fox on the right", "右上角有一只狐狸", "左下角有一只狐狸"]
    wanted = [lambda x, y: x < 58, lambda x, y: x > 70, lambda x, y: x > 64 > y, lambda x, y: x < 64 < y]
    places = [middle(scenes.ink(image)) for image in draw(pipe, prompts * 2, 70)]
    assert sum(is_there(*place) for is_there, place in zip(wanted * 2, places, strict=True)) >= 6, places


def test_a_sign_says_what_was_asked_for(pipe: KolorsPipeline) -> None:
    prompts = [f'a sign that says "{x}"' if x.isascii() else f"写着“{x}”的牌子" for x in scenes.CHARACTERS]
    found = [character_in(image) for image in draw(pipe, prompts, 80, steps=25)]
    assert sum(a == b for a, b in zip(found, scenes.CHARACTERS, strict=True)) >= 4, found


def test_a_seed_places_what_the_prompt_leaves_open(pipe: KolorsPipeline) -> None:
    images = draw(pipe, ["a fox"] * 4, 90)
    places = [middle(scenes.ink(image)) for image in images]
    assert [thing_in(image) for image in images].count("fox") >= 3
    assert max(abs(a[axis] - b[axis]) for a in places for b in places for axis in (0, 1)) > 16
    assert min((a - b).abs().mean() for a, b in zip(images[:-1], images[1:], strict=True)) > 0.02


def test_without_the_words_it_draws_something_else(pipe: KolorsPipeline) -> None:
    images = draw(pipe, [""] * len(THINGS), 10, steps=10)
    assert sum(thing_in(image) == name for image, name in zip(images, THINGS, strict=True)) < 5


def test_the_judges_of_these_tests() -> None:
    """Of pasted parts, and of the grounds alone."""
    order = random.Random(0)
    known = [*scenes.parts()[0], *scenes.parts()[1]]
    for i, part in enumerate(known):
        image = torch.ones(3, 128, 128)
        x, y = order.randint(2, 80), order.randint(2, 80)
        image[:, y : y + scenes.SIDE, x : x + scenes.SIDE] = part
        assert ground_of(image) == "white" and 1 <= len(items(image)) <= 2, "a whale's fountain is apart"
        column, row = middle(scenes.ink(image))
        assert abs(column - x - 20) < 6 and abs(row - y - 20) < 6
        if i < len(THINGS):
            assert thing_in(image) == thing_in(image.flip(2)) == THINGS[i]
        else:
            assert character_in(image) == scenes.CHARACTERS[i - len(THINGS)]
    for name in scenes.GROUNDS:
        assert ground_of(scenes.as_tensor(scenes.ground(name, random.Random(5)))) == name

"""Prompts with known answers: every combination, each example of its own noise, and what is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from kolors_core.inspection.prompt_template import PromptTemplate, check_calls, in_batches


def test_a_template_gives_every_combination_and_each_image_its_own_seed() -> None:
    template = PromptTemplate.parse("{number: one|two} red {thing:fox| cat |owl}!")
    assert template.questions == {"number": ("one", "two"), "thing": ("fox", "cat", "owl")}
    prompts = template.prompts()
    assert prompts[0] == ("one red fox!", (0, 0)) and prompts[-1] == ("two red owl!", (1, 2))
    assert len({prompt for prompt, _ in prompts}) == len({answers for _, answers in prompts}) == 6
    examples = template.examples(2, seed=5)
    assert [example.seed for example in examples] == list(range(5, 17))
    assert [example.prompt for example in examples[:3]] == ["one red fox!", "one red fox!", "one red cat!"]


@pytest.mark.parametrize(
    ("side", "copies", "sizes"),
    [
        (16, 1, [24, 24, 2]),
        (16, 2, [12] * 4 + [2]),
        (128, 1, [4] * 12 + [2]),
        (128, 2, [2] * 25),
        (512, 2, [1] * 50),
    ],
)
def test_larger_models_draw_fewer_at_once(side: int, copies: int, sizes: list[int]) -> None:
    pipe: Any = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=side)))
    batches = in_batches(pipe, range(50), copies)
    assert [len(batch) for batch in batches] == sizes and [i for batch in batches for i in batch] == [
        *range(50)
    ]


def test_a_prompt_without_questions_is_itself() -> None:
    assert PromptTemplate.parse("a fox").prompts() == [("a fox", ())]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a {thing: fox}", "'thing': expected two or more answers, all different, got ' fox'"),
        ("a {thing: fox|fox}", "all different, got ' fox|fox'"),
        ("{a: x|y} {a: x|z}", "'a' is asked twice"),
        ("a {fox|cat}", "got a single '{'"),
        ("a fox}", "got a single '}'"),
    ],
)
def test_what_is_no_template_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        PromptTemplate.parse(text)
    assert message in str(error.value)


def test_layers_that_are_not_called_once_a_step_are_refused() -> None:
    check_calls({"mid": [0, 0]}, [999, 500])
    with pytest.raises(ValueError, match="mid was called 1 times in 2 steps"):
        check_calls({"mid": [0]}, [999, 500])

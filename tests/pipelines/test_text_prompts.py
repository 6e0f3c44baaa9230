"""Prompts on an accelerator have few lengths, and make the same images as on the CPU."""

from typing import Any

import pytest
import torch

from kolors_core import KolorsPipeline
from kolors_core.guidance import guided
from kolors_core.pipelines import text_prompts
from tests.support.pipelines import Pair, steps_of
from tests.support.small import EXACT, relative_error


@pytest.mark.numerical
def test_prompts_are_filled_up_on_an_accelerator(pipes: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a multiple of 32 tokens, of which those added have the count 0."""
    ours, lengths = KolorsPipeline.from_pipe(pipes[0]), list[int]()

    def rule(unet: Any, schedule: Any, positive: Any, negative: Any, *given: Any, **named: Any) -> Any:
        lengths.extend(half.text_tokens.shape[1] for half in (positive, negative))
        return guided(unet, schedule, positive, negative, *given, **named)

    ours.guided = rule
    given = {"prompt": ["cat", "the red cat " * 25], "num_inference_steps": 2}
    plain = steps_of(ours, **given)
    with monkeypatch.context() as patch:
        patch.setattr(text_prompts, "fills_on", lambda device: True)
        filled = steps_of(ours, **given)
    for mine, other in zip(filled, plain, strict=True):
        assert relative_error(mine, other) < EXACT
    assert lengths[0] > 64 > lengths[1] and lengths[2:] == [-(-n // 32) * 32 for n in lengths[:2]]
    devices = map(torch.device, ("cpu", "meta", "cuda", "mps"))
    assert [text_prompts.fills_on(device) for device in devices] == [False, False, True, True]

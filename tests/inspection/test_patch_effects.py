"""Causal patching: nothing swapped is 0, all words 1, a head the sum that its columns give; and the tables."""

import math
from pathlib import Path

import pytest
import torch

from kolors_core import KolorsPipeline
from kolors_core.inspection.patch_effects import POOLED, patch, table
from kolors_core.inspection.patching import ALL, EVERY, Patcher, head_parts, token_parts
from tests.support.inspected import ATTENTION, small_pipe

PROMPTS = "x y z", "x z z"


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    return small_pipe(small_tokenizer)


@pytest.mark.numerical
def test_effects_of_nothing_and_of_everything(pipe: KolorsPipeline) -> None:
    patcher = Patcher(pipe, PROMPTS, range(2), 2, guidance_scale=3.0)
    assert pipe.tokenizer is not None
    tokens = token_parts(pipe.tokenizer, PROMPTS, [ATTENTION])
    heads = head_parts(pipe.unet, "*cross_attention")
    assert patcher([]).abs().max() < 1e-10
    text = tokens[EVERY][ALL]
    assert torch.allclose(patcher([*text, POOLED]), torch.ones(2, dtype=torch.float64), atol=1e-8)
    print({k: patcher(v) for k, v in tokens[EVERY].items()})
    by_heads = patcher([part for parts in heads.values() for part in parts])
    assert torch.allclose(patcher(text), by_heads, atol=1e-8), "what tokens do they do through heads"
    print(by_heads, {k: patcher(v) for k, v in heads.items()})

"""Attention to the tokens of a prompt: their labels, and the maps of each."""

from pathlib import Path

import numpy as np
import torch

from kolors_core import record_attention
from kolors_core.inspection.token_attention import display_tokens, explain_prompt
from kolors_core.tokenizer import Tokenizer
from tests.support.explained import PROMPT, TINY, explained, tiny


def labels(tokenizer: Tokenizer, prompt: str, length: int = 64) -> list[str]:
    """Those of all tokens of a prompt, which are checked to be each one's once, in their order."""
    whole = tokenizer([prompt], length)
    batch = whole.merge_padding()
    tokens = display_tokens(tokenizer, batch)
    assert [token.label for token in display_tokens(tokenizer, whole)] == [token.label for token in tokens]
    columns = range(batch.ids.shape[1])
    assert [i for token in tokens for i in columns[token.columns]] == list(columns)
    return [token.label for token in tokens]


def test_tokens_are_labelled_and_bytes_that_are_a_character_are_one() -> None:
    tokenizer = Tokenizer(TINY)
    start = ["51 pads", "[gMASK]", "sop"]
    assert labels(tokenizer, "a photo, 🐞龘") == [*start, "a", "photo", ",", "␣", "🐞", "龘"]
    assert labels(tokenizer, "") == ["62 pads", "[gMASK]", "sop"]
    assert labels(tokenizer, "<0xF0> sop", 14)[3:] == ["␣", "<", "0", "x", "F", "0", ">", "s", "op"]
    cut = labels(tokenizer, "龘龘", 7)  # [gMASK] sop ▁ and four of six bytes
    assert cut == ["[gMASK]", "sop", "␣", "龘", "<0xE9>"]


def test_chatglms_tokens_are_labelled(chatglm_tokenizer: Path) -> None:
    found = labels(Tokenizer(chatglm_tokenizer), "一张瓢虫的照片🐞")
    assert found == ["53 pads", "[gMASK]", "sop", "一", "张", "瓢", "虫", "的照片", "🐞"]


def test_the_views_are_the_recorded_maps() -> None:
    """Averaged over layers, and steps, by hand, in the same run made again."""
    drawn = explained()
    named = {"height": 64, "width": 96, "num_inference_steps": 4}
    with record_attention(tiny().unet, "*cross_attention", whole=True) as maps:
        again = tiny()(PROMPT, generator=torch.Generator().manual_seed(0), **named)[0][0]
    assert np.array_equal(np.asarray(again), np.asarray(drawn.image)), "recording changes nothing"
    assert {part for part, _ in drawn.views} == {"all", "down", "mid", "up"}
    assert {span for _, span in drawn.views} == {"all", "1 to 1", "2 to 3", "4 to 4"}
    assert next(iter(drawn.views)) == ("all", "all")
    for maps_of in drawn.views.values():  # nothing is lost, and nothing told twice
        assert torch.allclose(maps_of.sum(0), torch.ones(maps_of.shape[1:]), atol=1e-5)
    labels = [token.label for token in drawn.tokens]
    mid = torch.stack([rows for name, rows in maps.items() if name.startswith("mid")]).mean(0)
    mid = mid[:, 1].mean(1).movedim(-1, 1)  # of 4 steps, the prompt's: [4, S, h, w]
    bug, where = labels.index("🐞"), slice(-4, None)  # four bytes, the last of all
    for name, steps in {"all": [0, 1, 2, 3], "1 to 1": [0], "2 to 3": [1, 2], "4 to 4": [3]}.items():
        wanted = mid[steps].mean(0)
        assert torch.allclose(drawn.views["mid", name][bug], wanted[where].sum(0), atol=1e-6)
        assert torch.allclose(drawn.views["mid", name][:bug], wanted[:-4], atol=1e-6)
    assert "all layers (2 in the down path, 1 in the mid block, 4 in the up path)" in drawn.facts["maps"]
    sizes = {part: tuple(shares.shape[1:]) for (part, _), shares in drawn.views.items()}
    assert sizes == {"all": (4, 6), "down": (4, 6), "mid": (2, 3), "up": (4, 6)}


def test_a_longer_negative_prompt_shifts_no_label() -> None:
    """Of the shorter prompt the UNet reads columns that count nothing, on the left."""
    runs = [
        explain_prompt(tiny(), "cat", 1, height=64, width=64, negative_prompt=negative,
                  generator=torch.Generator().manual_seed(0))
        for negative in ("", "a red and blue photo of many dogs")
    ]  # fmt: skip
    for one, other in zip(*(run.views.values() for run in runs), strict=True):
        assert torch.allclose(one, other, atol=1e-5), "in the first step both see the same noise"

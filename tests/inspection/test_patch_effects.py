"""Causal patching: no part swapped is 0 and all words are 1; heads and tokens by hand; and the tables."""

from pathlib import Path

import pytest
import torch

from kolors_core import KolorsPipeline, capture
from kolors_core.inspection import prompt_template
from kolors_core.inspection.patch_effects import POOLED, patch, table
from kolors_core.inspection.patching import ALL, CHANNELS, EVERY, Part, Patcher, head_parts, swap, token_parts
from kolors_core.inspection.token_attention import display_tokens
from tests.support.explained import tiny
from tests.support.inspected import ATTENTION, QUICK, small_pipe

PROMPTS = "x y z", "x z z"


@pytest.fixture(scope="module")
def pipe(small_tokenizer: Path) -> KolorsPipeline:
    return small_pipe(small_tokenizer)


@pytest.mark.numerical
def test_effects_of_nothing_and_of_everything(pipe: KolorsPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only with the pooled text are all words swapped, by their tokens or by what heads make of them."""
    patcher = Patcher(pipe, PROMPTS, range(2), **QUICK)
    assert pipe.tokenizer is not None
    tokens = token_parts(pipe.tokenizer, PROMPTS, [ATTENTION])
    heads = [part for parts in head_parts(pipe.unet, "*cross_attention").values() for part in parts]
    ones = torch.ones(2, dtype=torch.float64)
    assert patcher([]).abs().max() < 1e-10
    assert torch.allclose(patcher([*tokens[EVERY][ALL], POOLED]), ones, atol=1e-8)
    assert torch.allclose(patcher([*heads, POOLED]), ones, atol=1e-8)
    assert patcher(tokens[EVERY][ALL]).min() > 0.02 and patcher(tokens[EVERY][ALL]).max() < 0.98
    monkeypatch.setattr(prompt_template, "BATCH", 2)
    alone = Patcher(pipe, PROMPTS, range(2), **QUICK)
    assert len(alone.batches) == 2, "a seed at once, of both prompts"
    assert torch.allclose(alone(tokens[EVERY][ALL]), patcher(tokens[EVERY][ALL]), atol=1e-8)
    last = {name: patcher(parts[ALL]) for name, parts in tokens.items()}
    assert last[ATTENTION].abs().max() > 1e-6 and not torch.allclose(last[ATTENTION], last[EVERY])


def test_both_prompts_read_the_first_ones_latents_in_every_step(pipe: KolorsPipeline) -> None:
    patcher = Patcher(pipe, PROMPTS, range(2), **QUICK)
    with capture(pipe.unet, "conv_in", "in") as kept:
        patcher.draw([])
    for latents in kept["conv_in"]:
        base, source = latents.unflatten(0, (-1, 2, 2)).unbind(1)
        assert torch.equal(base, source) and not torch.equal(base[:, 0], base[:, 1])
    assert not torch.equal(kept["conv_in"][0], kept["conv_in"][1])


def test_a_swap_takes_its_part_from_the_second_prompts_rows() -> None:
    """In both halves of the rows, unconditional and conditional: 3 of the first prompt, 3 of the second."""
    x = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(0))
    new = swap(3, Part("", "in", CHANNELS, slice(2, 4)), x, 0)
    wanted = x.clone()
    wanted[0:3, :, 2:4], wanted[6:9, :, 2:4] = x[3:6, :, 2:4], x[9:12, :, 2:4]
    assert torch.equal(new, wanted)
    assert torch.equal(swap(3, Part("", "out", -2, slice(-1, None)), x, 0)[6:9, -1], x[9:12, -1])


def test_heads_are_columns_of_what_to_out_reads_and_tokens_stand_at_the_end(pipe: KolorsPipeline) -> None:
    heads = head_parts(pipe.unet, [ATTENTION])[ATTENTION]
    assert [(part.module, part.what, part.where) for part in heads] == [
        (f"{ATTENTION}.to_out", "in", slice(8 * i, 8 * i + 8)) for i in range(4)
    ]
    tokenizer = tiny().tokenizer
    assert tokenizer is not None
    prompts = "一只狐狸在左边", "一只熊猫在左边"
    tokens = token_parts(tokenizer, prompts, ["mid"])
    labels = [token.label for token in display_tokens(tokenizer, tokenizer([prompts[0]]).merge_padding())]
    columns = tokens["mid"]
    assert list(columns) == [ALL, *(label.replace("狐狸", "狐狸>熊猫") for label in labels)]
    assert [part.module for part in columns["狐狸>熊猫"]] == ["mid.to_k", "mid.to_v"]
    row = torch.arange(300)  # of which there may be more than the prompt's
    chosen = [row[parts[0].where].tolist() for label, parts in columns.items() if label != ALL]
    assert sum(chosen, []) == row.tolist() and all(len(each) == 1 for each in chosen[1:])


def test_the_tables_have_all_heads_and_the_tokens_that_differ(pipe: KolorsPipeline) -> None:
    summary, (heads, tokens), images = patch(pipe, PROMPTS, ATTENTION, images=8, **QUICK | {"steps": 1})
    assert heads.rows == [ATTENTION] and heads.columns == [ALL, "0", "1", "2", "3"]
    assert tokens.rows == [EVERY, ATTENTION] and tokens.columns[0] == ALL
    first = [label for label in tokens.columns if ">" in label][0]
    same = tokens.columns[2 : tokens.columns.index(first)]
    assert same and all(tokens.values[0, tokens.columns.index(label)].abs() < 1e-10 for label in same)
    assert tokens.values[1, tokens.columns.index(same[0])].isnan(), "without effect in all layers"
    assert tokens.values[1, tokens.columns.index(first)].abs() > 1e-6
    assert summary.startswith("Heads are ranked on 4 seeds; patched together on the other 4: ")
    assert [label for label, _ in images][:2] == list(PROMPTS) and images[0][1].size == (32, 32)
    assert images[0][1].tobytes() != images[1][1].tobytes()


def test_intervals_hold_together() -> None:
    effects = {("a", "0"): torch.tensor([0.1, 0.2, 0.3, 0.2]), ("a", "1"): torch.zeros(4)}
    alone, both = table("t", "head", effects), table("t", "head", effects | {("b", "0"): torch.ones(4) / 3})
    assert (
        "of all 1 cells together" in alone.note
        and "of all 2 cells" in both.note
        and both.values[1, 1].isnan()
    )
    assert alone.high[0, 0] - alone.low[0, 0] == pytest.approx(2 * 3.16 * 0.0816 / 2, rel=0.01)
    assert both.high[0, 0] > alone.high[0, 0]


def test_bad_input_is_named(pipe: KolorsPipeline) -> None:
    with pytest.raises(ValueError, match="images must be .*8.*, got 7"):
        patch(pipe, PROMPTS, images=7, **QUICK)
    with pytest.raises(ValueError, match="whose tokens stand at the same places, got . and . tokens"):
        patch(pipe, ("x", "x y z"), **QUICK)
    with pytest.raises(ValueError, match="the prompts draw the same: 'x' and 'x'"):
        patch(pipe, ("x", "x"), **QUICK | {"steps": 1})
    with pytest.raises(ValueError, match="no module is named 'nowhere'"):
        patch(pipe, PROMPTS, "nowhere", **QUICK)

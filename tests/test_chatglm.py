"""The text encoder against the reference: tokens, pad rows included, and the pooled state."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.tokenizer import TokenBatch
from tests.support.parity import assert_parity, first_divergence, pair
from tests.support.small import FLOAT32, relative_error

pytestmark = pytest.mark.numerical


def token_batch(lengths: list[int], width: int, vocabulary: int = 640) -> TokenBatch:
    """Random tokens, left-padded, as the tokenizer makes them."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths])
    ids = torch.randint(1, vocabulary, (len(lengths), width), generator=generator) * mask
    positions = (mask.long().cumsum(1) - 1).clamp(min=0) * mask
    return TokenBatch(ids, mask, positions)


def run_reference(model: nn.Module, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Select tokens [B, L, C] and pooled [B, C] as the reference's pipeline does."""
    states = model(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        output_hidden_states=True,
    ).hidden_states
    return states[-2].transpose(0, 1), states[-1][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [[1], [2, 7, 40], [40, 40], [39, 3]], ids=str)
def test_tokens_and_pooled_equal_the_reference(dtype: torch.dtype, lengths: list[int]) -> None:
    ours, theirs = pair("text_encoder", dtype)
    batch = token_batch(lengths, width=40)
    with torch.no_grad():
        embedding: TextEmbedding = ours(batch)
        tokens, pooled = run_reference(theirs, batch)

    def explain() -> str:
        return first_divergence(
            ours, theirs, "text_encoder", lambda: ours(batch), lambda: run_reference(theirs, batch), FLOAT32
        )

    # FLOAT32 in float64 too: the reference takes the norms' variance and the rotation in float32.
    assert_parity(embedding.tokens, tokens, FLOAT32, explain)
    assert_parity(embedding.pooled, pooled, FLOAT32, explain)
    pads = ~batch.mask
    if pads.any():
        assert_parity(embedding.tokens[pads], tokens[pads], FLOAT32, explain)


def causal_pads(model: ChatGLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def mask(mask: Tensor) -> Tensor:
        return torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()[None, None]

    monkeypatch.setattr("kolors_core.chatglm.attention_mask", mask)


def swap_norms(model: ChatGLM, _: pytest.MonkeyPatch) -> None:
    layer = model.layers[1]
    layer.attention_norm, layer.mlp_norm = layer.mlp_norm, layer.attention_norm


def wrong_eps(model: ChatGLM, _: pytest.MonkeyPatch) -> None:
    model.layers[0].attention_norm.eps = 1e-3


def no_rotation(model: ChatGLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kolors_core.chatglm.apply_rotary", lambda x, cos, sin: x)


@pytest.mark.parametrize("spoil", [causal_pads, swap_norms, wrong_eps, no_rotation])
def test_parity_can_fail(
    spoil: Callable[[ChatGLM, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair("text_encoder", torch.float32)
    batch = token_batch([5, 30], width=40)
    spoil(ours, monkeypatch)
    with torch.no_grad():
        assert relative_error(ours(batch).tokens, run_reference(theirs, batch)[0]) > 10 * FLOAT32


def test_pad_rows_are_alike_and_carry_the_prompt() -> None:
    ours, _ = pair("text_encoder", torch.float64)
    with torch.no_grad():
        tokens = ours(token_batch([5, 9], width=40)).tokens
    pads = tokens[0, :35]
    assert relative_error(pads, pads[:1].expand_as(pads)) < 1e-6
    assert relative_error(tokens[1, 0], tokens[0, 0]) > 1e-3


def test_half_precision_runs_and_stays_close() -> None:
    exact, _ = pair("text_encoder", torch.float32)
    half, _ = pair("text_encoder", torch.bfloat16)
    batch = token_batch([5, 9], width=40)
    with torch.no_grad():
        assert half(batch).tokens.dtype == torch.bfloat16
        assert relative_error(half(batch).tokens.float(), exact(batch).tokens) < 0.05


@pytest.mark.parametrize("lengths", [[1], [2, 7, 20], [40, 3], [39, 39]], ids=str)
def test_collapsed_pads_change_nothing(lengths: list[int]) -> None:
    ours, _ = pair("text_encoder", torch.float64)
    batch = token_batch(lengths, width=40)
    few = batch.merge_padding()
    width = min(40, max(lengths) + 1)
    assert few.counts is not None and few.ids.shape == (len(lengths), width)
    assert few.counts.sum(1).tolist() == [40.0] * len(lengths)
    with torch.no_grad():
        whole, collapsed = ours(batch), ours(few)
        forgetful = ours(TokenBatch(few.ids, few.mask, few.positions))
    # float32 inside: see above
    assert_parity(collapsed.tokens, whole.tokens[:, -width:], FLOAT32)
    assert_parity(collapsed.pooled, whole.pooled, FLOAT32)
    if max(lengths) < 39:
        assert relative_error(forgetful.tokens, whole.tokens[:, -width:]) > 1e-3, "the counts matter"


def test_embeddings_of_different_lengths_make_one_batch() -> None:
    ours, _ = pair("text_encoder", torch.float64)
    parts = [ours(token_batch([length], width=40).merge_padding()) for length in (3, 9)]
    both = TextEmbedding.cat(parts)
    assert both.counts is not None and both.tokens.shape[1] == 10
    assert both.counts[0].tolist() == [0.0] * 6 + [37.0] + [1.0] * 3
    assert torch.equal(both.tokens[0, 6:], parts[0].tokens[0]) and torch.equal(
        both.pooled[1:], parts[1].pooled
    )
    plain = [TextEmbedding(part.tokens[:, -4:], part.pooled) for part in parts]
    assert TextEmbedding.cat(plain).counts is None

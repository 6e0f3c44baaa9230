"""The tokenizer under the reference's name: every call returns what the reference's returns."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer as ReferenceTokenizer

from benchmarks.parity.texts import TEXTS
from kolors_core import KolorsPipeline
from kolors_core.checkpoint import EMBEDDED
from kolors_core.compat.models import ChatGLMModel
from kolors_core.compat.tokenizer import ChatGLMTokenizer
from kolors_core.tokenizer import TokenBatch, Tokenizer

FILE = EMBEDDED / "tokenizer" / "tokenizer.model"
PADDED = {"padding": "max_length", "max_length": 256, "truncation": True, "return_tensors": "pt"}
CALLS: list[dict[str, Any]] = [
    {}, PADDED, {"return_tensors": "np"}, {"padding": "max_length", "max_length": 8},
    {"max_length": 5, "truncation": True}, {"truncation": True}, {"padding": True, "return_tensors": "pt"},
    {"padding": "max_length"}, {"add_special_tokens": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def both() -> tuple[ChatGLMTokenizer, ReferenceTokenizer]:
    return ChatGLMTokenizer.from_pretrained("tiny"), ReferenceTokenizer(str(FILE))


def assert_same(made: Any, expected: Any) -> None:
    assert list(made.keys()) == list(expected.keys())
    for name in expected.keys():  # noqa: SIM118
        one, other = made[name], expected[name]
        assert type(one) is type(other) and getattr(made, name) is one
        if isinstance(other, list):
            assert one == other
        else:
            assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_call_equals_the_references(call: dict[str, Any], both: Any) -> None:
    ours, theirs = both
    # It leaves out the positions of no tokens at all.
    texts = [text for text in TEXTS if "add_special_tokens" not in call or ours.tokenize(text)]
    for text in texts:
        assert_same(ours(text, **call), theirs(text, **call))
    if call != {"return_tensors": "np"}:  # ragged
        assert_same(ours(texts, **call), theirs(texts, **call))


def test_pieces_ids_and_texts_equal_the_references(both: Any) -> None:
    ours, theirs = both
    for text in TEXTS:
        ids, pieces = ours.encode(text), ours.tokenize(text)
        assert ids == theirs.encode(text) and pieces == theirs.tokenize(text)
        assert ours.convert_tokens_to_ids(pieces) == theirs.convert_tokens_to_ids(pieces)
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
        assert ours.decode(torch.tensor(ids)) == theirs.decode(ids)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    rows = ours(TEXTS[:6], padding=True).input_ids
    assert ours.batch_decode(rows, skip_special_tokens=True) == theirs.batch_decode(
        rows, skip_special_tokens=True
    )
    for token in ("[gMASK]", "sop", "<|user|>", "no such piece"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("vocab_size", "pad_token", "pad_token_id", "eos_token", "eos_token_id", "unk_token",
                 "model_max_length", "padding_side"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)


def test_it_is_what_pipelines_call_and_its_result_what_both_models_read(both: Any) -> None:
    tokenizer, plain = both[0], Tokenizer(FILE)
    expected, made = plain(["a cat", ""], 77), tokenizer(["a cat", ""], 77)
    assert isinstance(made, TokenBatch) and torch.equal(made.ids, expected.ids)
    assert torch.equal(made.merge_padding().ids, expected.merge_padding().ids)
    assert torch.equal(tokenizer(["a cat"]).ids, plain(["a cat"]).ids)
    encoder = ChatGLMModel.from_pretrained("tiny")
    batch = tokenizer("a cat", **PADDED).to("cpu")
    with torch.no_grad():
        states, text = encoder(**batch, output_hidden_states=True).hidden_states, encoder(batch)
    assert torch.allclose(states[-2].transpose(0, 1), text.tokens, atol=1e-5)
    images = []
    for one in (plain, tokenizer):
        pipe = KolorsPipeline.from_pretrained("tiny", tokenizer=one)
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe("cat", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
        )
    assert images[0].tobytes() == images[1].tobytes()


def test_it_is_saved_over_itself_and_read_by_the_reference(both: Any, tmp_path: Path) -> None:
    for _ in range(2):
        both[0].save_pretrained(tmp_path / "saved")
    again = ChatGLMTokenizer.from_pretrained(tmp_path, subfolder="saved")
    theirs = ReferenceTokenizer.from_pretrained(tmp_path / "saved")
    assert again.encode("a cat") == theirs.encode("a cat") == both[0].encode("a cat")
    assert again.name_or_path == str(tmp_path)
    (tmp_path / "saved" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        both[0].save_pretrained(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="no such file"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_bad_input_is_named(both: Any) -> None:
    tokenizer = both[0]
    with pytest.raises(ValueError, match="padding must be True, 'longest', .* got 'left'"):
        tokenizer("a", padding="left")
    with pytest.raises(ValueError, match="return_tensors must be 'pt', 'np' or None, got 'tf'"):
        tokenizer("a", return_tensors="tf")
    with pytest.raises(ValueError, match="a tensor of ragged rows|rows of several lengths"):
        tokenizer(["a", "a cat in the house"], return_tensors="pt")
    with pytest.raises(TypeError, match="prompt 1 must be a string"):
        tokenizer(["a", 1])

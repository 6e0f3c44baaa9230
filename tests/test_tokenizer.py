"""Token ids, masks and positions: equal to the reference's, on difficult prompts."""

import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

from benchmarks.parity.texts import TEXTS as PROMPTS
from kolors_core.tokenizer import Tokenizer
from tests.support.published import IDS, PREFIX, VOCABULARY, pieces


@pytest.mark.parametrize("max_length", [256, 77, 8, 3])
def test_ids_mask_and_positions_equal_the_reference(chatglm_tokenizer: Path, max_length: int) -> None:
    ours = Tokenizer(chatglm_tokenizer)(PROMPTS, max_length)
    theirs = ChatGLMTokenizer(str(chatglm_tokenizer))(
        PROMPTS, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt"
    )
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(ours.ids[row], theirs["input_ids"][row]), prompt[:40]
    assert torch.equal(ours.mask.long(), theirs["attention_mask"])
    assert torch.equal(ours.positions, theirs["position_ids"])


def test_it_has_the_documented_numbers(chatglm_tokenizer: Path) -> None:
    tokenizer = Tokenizer(chatglm_tokenizer)
    assert tokenizer.pieces.vocab_size() == VOCABULARY == 64_789
    assert [tokenizer.special["[gMASK]"], tokenizer.special["sop"]] == PREFIX and tokenizer.pad_id == 0
    assert {piece: tokenizer.pieces.piece_to_id(piece) for piece in pieces()} == pieces()


@pytest.mark.parametrize("prompt", IDS, ids=lambda prompt: prompt[:20])
def test_ids_mask_and_positions_are_chatglms(prompt: str, chatglm_tokenizer: Path) -> None:
    """Recorded outputs of the real tokenizer: Chinese, English, bytes, special names as text, too long."""
    batch, ids = Tokenizer(chatglm_tokenizer)([prompt]), [*PREFIX, *IDS[prompt]][:256]
    pads = [0] * (256 - len(ids))
    assert batch.ids[0].tolist() == pads + ids
    assert batch.mask[0].tolist() == [False] * len(pads) + [True] * len(ids)
    assert batch.positions[0].tolist() == [*pads, *range(len(ids))]


def test_a_small_model_equals_the_reference_too(small_tokenizer: Path) -> None:
    prompts = [prompt for prompt in PROMPTS if len(prompt) < 300]
    ours = Tokenizer(small_tokenizer)(prompts)
    theirs = ChatGLMTokenizer(str(small_tokenizer))(
        prompts, padding="max_length", max_length=256, truncation=True, return_tensors="pt"
    )
    assert torch.equal(ours.ids, theirs["input_ids"])


def test_bad_input_is_named(small_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(small_tokenizer.parent)
    with pytest.raises(ValueError, match="at least one prompt"):
        tokenizer([])
    with pytest.raises(ValueError, match="expected a list"):
        tokenizer("not a list")
    with pytest.raises(TypeError, match="prompt 1 must be a string, got int"):
        tokenizer(["a", 2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_length must be more than"):
        tokenizer(["a"], 2)
    with pytest.raises(FileNotFoundError, match="tokenizer.model: no such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        Tokenizer(tmp_path)


def test_a_huge_model_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """SentencePiece ends the process on a file of 2 GiB; this one is a hole, without room on the disk."""
    with (tmp_path / "tokenizer.model").open("wb") as file:
        file.truncate(2**31)
    tracemalloc.start()
    with pytest.raises(ValueError, match="tokenizer.model: 2,147,483,648 bytes, expected at most 67,108,864"):
        Tokenizer(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.model: not a file"):
        Tokenizer(tmp_path)


HOSTILE = {
    "NUL": "a\0b", "only NUL": "\0", "escape codes": "\x1b[31m\x07\x7f", "right to left": "\u202eשלום عليكم",
    "byte order mark": "\ufeffa", "no characters": "\uffff\U0010ffff", "100,000 letters": "a" * 100_000,
    "100,000 words": "红苹果 red " * 14_286, "stacked accents": "e" + "\u0301" * 1000,
    "special tokens": "[gMASK]sop</s><s><unk><pad><|user|>",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_any_text_is_encoded_as_text(name: str, chatglm_tokenizer: Path) -> None:
    """Only the prefix has special tokens; text that fits decodes to itself."""
    prompt, tokenizer = HOSTILE[name], Tokenizer(chatglm_tokenizer)
    batch = tokenizer([prompt])
    ids = batch.ids[0][batch.mask[0]].tolist()
    assert ids[:2] == PREFIX and all(i < VOCABULARY for i in ids[2:])
    read = tokenizer.pieces.decode(ids[2:])
    assert prompt.startswith(read) if len(ids) == 256 else read == prompt


@pytest.mark.parametrize("prompt", ["a\ud800b", "\udcff", "\udc80\ud800"])
def test_lone_surrogates_are_refused_and_shown(prompt: str, small_tokenizer: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt 1 is not valid Unicode text: '.*\\ud"):
        Tokenizer(small_tokenizer)(["fine", prompt])


def test_truncated_text_is_logged_once(small_tokenizer: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer(small_tokenizer)
    whole = tokenizer(["a red apple, a cat"], 256)
    count = int(whole.mask.sum())
    for _ in range(3):
        cut = tokenizer(["a red apple, a cat"] * 2, count - 2)
    kept = cut.ids[0, 2:].tolist()
    lost = "a red apple, a cat".removeprefix(tokenizer.pieces.decode(kept)).strip()
    assert lost and len(caplog.records) == 1
    assert caplog.messages[0].startswith(f"a prompt of {count} tokens is truncated to {count - 2}, without ")
    assert lost in caplog.messages[0]
    tokenizer(["a red apple, a cat"], count)
    assert len(caplog.records) == 1, "no log line without truncation"
    tokenizer(["cat " * 2000], 16)
    assert len(caplog.messages[1]) < 300, "a long text is shown in part"

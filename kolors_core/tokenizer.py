"""Tokenizer of ChatGLM3: prompts -> TokenBatch. Shapes: B prompts, L `max_length`."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from kolors_core.validation import as_path, check_int

logger = logging.getLogger("kolors_core")
# ChatGLM3 numbers its special tokens after the SentencePiece pieces, in this order.
SPECIAL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")


@dataclass(frozen=True)
class TokenBatch:
    """Tokens of B prompts: ids [B, L], mask [B, L] (bool, True on real tokens) and positions [B, L]."""

    ids: Tensor
    mask: Tensor
    positions: Tensor  # 0 on pads, then 0, 1, 2, ...
    counts: Tensor | None = None  # float32 [B, L], each token's multiplicity

    def merge_padding(self) -> "TokenBatch":
        """Keep as many columns as the longest prompt and one pad need, and count the removed pads.

        All pads of a prompt are equal: same id, position 0, attending to all tokens. So attention that counts
        the first kept pad once for each removed one gives exactly the same result.
        """
        length = int(self.mask.sum(1).max())
        kept = slice(max(0, self.mask.shape[1] - length - 1), None)
        mask = self.mask[:, kept]  # [B, length + 1]
        counts = torch.ones(mask.shape)
        counts[:, 0] += self.mask.shape[1] - mask.shape[1]
        return TokenBatch(self.ids[:, kept], mask, self.positions[:, kept], counts)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Move the tokens to another device."""
        counts = None if self.counts is None else self.counts.to(device)
        return TokenBatch(self.ids.to(device), self.mask.to(device), self.positions.to(device), counts)


class Tokenizer:
    """Tokenizer with SentencePiece, a `[gMASK] sop` prefix, and padding on the left.

    Source: `ChatGLMTokenizer` in diffusers' pipelines/kolors/tokenizer.py. A special token's name inside a
    prompt is plain text. FileNotFoundError if `path` (the folder, or `tokenizer.model` in it) does not exist,
    ValueError if it is not a SentencePiece model.
    """

    def __init__(self, path: str | Path) -> None:
        from sentencepiece import SentencePieceProcessor

        file = as_path("the tokenizer", path)
        self.file = file / "tokenizer.model" if file.is_dir() else file
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file}: no such file, expected ChatGLM's SentencePiece model")
        try:
            self.model_bytes = self.file.read_bytes()  # kept for saving: the file may be temporary
            self.pieces = SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError as error:
            raise ValueError(f"{self.file}: not a SentencePiece model: {error}") from None
        num_pieces = self.pieces.vocab_size()
        self.special = {token: num_pieces + i for i, token in enumerate(SPECIAL_TOKENS)}
        self.pad_id: int = self.pieces.unk_id()
        self.size: int = num_pieces + len(SPECIAL_TOKENS)

    def __repr__(self) -> str:
        """Return the numbers of pieces and special tokens, and the file."""
        pieces = f"{self.pieces.vocab_size():,} pieces and {len(self.special)} special tokens"
        return f"{type(self).__name__}({pieces}, from {self.file})"

    def encode_text(self, text: str, words: Mapping[str, Sequence[int]]) -> list[int]:
        """Encode a text with each of `words`, the longest first, as its ids; texts between stay apart."""
        patterns = sorted(map(re.escape, words), key=len, reverse=True)
        parts = re.split(f"({'|'.join(patterns)})", text) if words else [text]
        return [i for part in parts for i in (words[part] if part in words else self.pieces.encode(part))]

    def __call__(
        self, prompts: Sequence[str], max_length: int = 256, words: Mapping[str, Sequence[int]] | None = None
    ) -> TokenBatch:
        """Tokenize prompts, truncated on the right and padded on the left to `max_length`.

        words: of textual inversion, each with its ids. Truncated text is logged once. ValueError for an empty
        list or a `max_length` that leaves no room for text, TypeError for a non-string.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
            raise ValueError(f"expected a list of at least one prompt, got {prompts!r}")
        prefix = [self.special["[gMASK]"], self.special["sop"]]
        if check_int("max_length", max_length) <= len(prefix):
            raise ValueError(f"max_length must be more than the prefix's {len(prefix)}, got {max_length}")
        ids = torch.full((len(prompts), max_length), self.pad_id, dtype=torch.int64)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise TypeError(f"prompt {row} must be a string, got {type(prompt).__name__}")
            try:
                tokens = prefix + self.encode_text(prompt, words or {})
            except (RuntimeError, UnicodeError):
                raise ValueError(f"prompt {row} is not valid Unicode text: {prompt[:40]!a}") from None
            if len(tokens) > max_length:
                cut = [i for i in tokens[max_length:] if i < self.pieces.vocab_size()]
                _warn_truncated(len(tokens), max_length, self.pieces.decode(cut))
                tokens = tokens[:max_length]
            ids[row, -len(tokens) :] = torch.tensor(tokens)
            mask[row, -len(tokens) :] = True
        return TokenBatch(ids, mask, (mask.cumsum(1) - 1).clamp(min=0))


@lru_cache(maxsize=256)  # once for each truncated text
def _warn_truncated(count: int, most: int, cut: str) -> None:
    shown = cut if len(cut) <= 120 else f"{cut[:120]}..."
    logger.warning("a prompt of %d tokens is truncated to %d, without %r", count, most, shown)

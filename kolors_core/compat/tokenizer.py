"""Tokenizer under the reference's name and with its methods, which is also what our pipelines call."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from kolors_core import checkpoint
from kolors_core.compat.neutral import check_neutral
from kolors_core.tokenizer import SPECIAL_TOKENS, TokenBatch, Tokenizer
from kolors_core.validation import as_path, short_repr
from weights_convert.atomic_write import atomic_folder

# Numbered after `SPECIAL_TOKENS`; of the chat model, which Kolors' prompts are not written for.
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
NO_MAX_LENGTH = int(1e30)  # as the reference writes it


@dataclass(frozen=True)
class BatchEncoding(TokenBatch):
    """Tokens of B prompts for our pipelines, and `values` by the reference's names, lists or tensors."""

    values: dict[str, Any] = field(default_factory=dict)

    @property
    def input_ids(self) -> Any:
        """Token ids."""
        return self.values["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 for tokens, 0 for pads."""
        return self.values["attention_mask"]

    @property
    def position_ids(self) -> Any:
        """0 for pads, then 0, 1, 2, ..."""
        return self.values["position_ids"]

    def keys(self) -> list[str]:
        """List the reference's names."""
        return list(self.values)

    def items(self) -> list[tuple[str, Any]]:
        """List the reference's names and values."""
        return list(self.values.items())

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def to(self, device: torch.device | str) -> "BatchEncoding":
        """Move the tokens to another device."""
        moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in self.values.items()}
        return BatchEncoding(**vars(super().to(device)), values=moved)


class ChatGLMTokenizer(Tokenizer):
    """Tokenizer of ChatGLM3 with the reference's methods; a call also returns what our pipelines need."""

    pad_token, unk_token, eos_token, padding_side = "<unk>", "<unk>", "</s>", "left"
    model_max_length = NO_MAX_LENGTH
    name_or_path = ""

    def __init__(self, vocab_file: str | Path) -> None:
        super().__init__(vocab_file)
        first = self.pieces.vocab_size()
        self.named = {token: first + i for i, token in enumerate((*SPECIAL_TOKENS, *ROLE_TOKENS))}
        self.vocab_size = first + len(self.named)
        self.pad_token_id, self.eos_token_id = self.pad_id, int(self.pieces.eos_id())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "", revision: str | None = None,
        cache_dir: str | Path | None = None, local_files_only: bool = False, token: str | bool | None = None,
        force_download: bool = False, **neutral: Any,
    ) -> Self:  # fmt: skip
        """Load a folder or hub repository with `tokenizer.model`, or "tiny".

        subfolder: "tokenizer", of a whole Kolors. neutral: see neutral.py.
        """
        check_neutral(neutral)
        name = pretrained_model_name_or_path
        if name == checkpoint.EMBEDDED_NAME:
            subfolder = subfolder or "tokenizer"
        folder = checkpoint.fetch_component(
            name, "tokenizer", subfolder, None, True, revision=revision, cache_dir=cache_dir,
            local_files_only=local_files_only, token=token, force_download=force_download,
        )  # fmt: skip
        tokenizer = cls(folder / subfolder)
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        return tokenizer

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder that the reference and `from_pretrained` load; it may be a saved tokenizer's own."""
        folder = as_path("save_directory", save_directory)
        with atomic_folder(folder, checkpoint.is_own_folder) as place:
            checkpoint.save_tokenizer(self, place)

    def __call__(
        self, text: str | Sequence[str], max_length: int | None = None,
        words: Mapping[str, Sequence[int]] | None = None, *, padding: bool | str = False,
        truncation: bool = False, return_tensors: str | None = None, add_special_tokens: bool = True,
        return_attention_mask: bool | None = None,
    ) -> BatchEncoding:  # fmt: skip
        """Tokenize prompts, by the reference's names as lists, or as tensors by `return_tensors="pt"`.

        padding: False, True or "longest", or "max_length"; on the left. truncation: to max_length, on the
        right. words: of textual inversion, each with its ids. For our pipelines the result is also a
        `TokenBatch`, truncated and padded to max_length or 256. ValueError for a tensor of ragged rows.
        """
        prompts = [text] if isinstance(text, str) else text
        tokens = super().__call__(prompts, 256 if max_length is None else max_length, words)
        prefix = [self.special["[gMASK]"], self.special["sop"]] if add_special_tokens else []
        rows = [prefix + self.encode_text(prompt, words or {}) for prompt in prompts]
        rows = [row[:max_length] for row in rows] if truncation and max_length is not None else rows
        length = max(map(len, rows)) if padding in (True, "longest") else 0
        if padding == "max_length" and max_length is not None:
            length = max_length
        elif padding not in (False, True, "longest", "do_not_pad", "max_length"):
            expected = "True, 'longest', 'max_length' or False"
            raise ValueError(f"padding must be {expected}, got {short_repr(padding)}")
        pads = [max(0, length - len(row)) for row in rows]
        values: dict[str, Any] = {
            "input_ids": [[self.pad_id] * n + row for n, row in zip(pads, rows, strict=True)],
            "attention_mask": [[0] * n + [1] * len(row) for n, row in zip(pads, rows, strict=True)],
            "position_ids": [[0] * n + [*range(len(row))] for n, row in zip(pads, rows, strict=True)],
        }
        if return_tensors is not None:
            if return_tensors not in ("pt", "np"):
                got = short_repr(return_tensors)
                raise ValueError(f"return_tensors must be 'pt', 'np' or None, got {got}")
            if len({len(row) for row in values["input_ids"]}) > 1:
                raise ValueError("rows of several lengths are no tensor: set padding=True, or 'max_length'")
            values = {name: torch.tensor(rows) for name, rows in values.items()}
            if return_tensors == "np":
                values = {name: tensor.numpy() for name, tensor in values.items()}
        elif isinstance(text, str):
            values = {name: rows[0] for name, rows in values.items()}
        if return_attention_mask is False and padding is False:  # the reference pads all three
            values = {"input_ids": values["input_ids"]}
        return BatchEncoding(**vars(tokens), values=values)

    def __len__(self) -> int:
        return len(self.get_vocab())

    def encode(self, text: str, **options: Any) -> Any:
        """Return the ids of one text, with the prefix; options: as of calling the tokenizer."""
        return self(text, **options).input_ids

    def tokenize(self, text: str) -> list[str]:
        """Split a text into pieces, without the prefix."""
        return self.pieces.encode(text, out_type=str)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Join ids to a text; the prefix's names are in it, as by the reference with either option."""
        return self.pieces.decode_pieces(self.convert_ids_to_tokens(token_ids))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False) -> list[str]:
        """Join each row's ids to a text."""
        return [self.decode(row) for row in sequences]

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Convert a piece or a special token's name, or a list of them, to ids; unknown ones to 0."""
        if isinstance(tokens, str):
            return self.named[tokens] if tokens in self.named else self.pieces.piece_to_id(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Convert an id or a list of them to pieces and special tokens' names; pads are empty."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        if not isinstance(ids, int):
            return [self.convert_ids_to_tokens(one) for one in ids]
        if ids >= self.pieces.vocab_size():
            return next(name for name, number in self.named.items() if number == ids)
        is_empty = ids in (self.pieces.bos_id(), self.eos_token_id, self.pad_id)
        return "" if is_empty else self.pieces.id_to_piece(ids)

    def get_vocab(self) -> dict[str, int]:
        """Map every piece and special token to its id."""
        return {self.convert_ids_to_tokens(i): i for i in range(self.vocab_size)}

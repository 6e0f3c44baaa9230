"""Prompt cache: embeddings of encoded prompts, in memory and, if a folder is set, on disk.

The key of an embedding is its tokens and the encoder: every tensor's name, shape, dtype and a sample of its
values, these tokens' embeddings and adapters' settings. A moved encoder finds it again, a changed one not.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import torch

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.module import settings
from kolors_core.tokenizer import TokenBatch
from weights_convert.safetensors_files import Source, save_tensors

SAMPLES = 64  # values of each tensor


class Key(NamedTuple):
    """Key of an embedding: `name` in a folder, and also `memory_key` in memory.

    is_persistable: whether the name identifies the embedding; not for an encoder with forward hooks or
    another forward. A pre-hook is taken for one that only copies weights (offload.py).
    """

    name: str
    memory_key: tuple[Any, ...]
    is_persistable: bool

    @classmethod
    def of(cls, encoder: ChatGLM, tokens: TokenBatch) -> Self:
        """Make the key of these tokens' embedding by this encoder."""
        hooks = [hook for module in encoder.modules() for hook in module._forward_hooks.values()]
        pre_hooks = [hook for module in encoder.modules() for hook in module._forward_pre_hooks.values()]
        versions = tuple(parameter._version for parameter in encoder.parameters())
        is_plain = type(encoder).forward is ChatGLM.forward and "forward" not in vars(encoder)
        memory_key = type(encoder), versions, tuple(map(id, [*hooks, *pre_hooks]))
        return cls(fingerprint(encoder, tokens), memory_key, is_plain and not hooks)


class PromptCache:
    """Cache of the embeddings used last, each on the device that computed it; several threads may use it."""

    def __init__(self, kept: Iterable[tuple[Key, TextEmbedding]] = ()) -> None:
        self.kept, self._lock = OrderedDict(kept), Lock()

    def __reduce__(self) -> tuple[type["PromptCache"], tuple[list[tuple[Key, TextEmbedding]]]]:
        return PromptCache, (list(self.kept.items()),)  # without the lock, which cannot be pickled

    def clear(self) -> None:
        """Remove all embeddings from memory."""
        self.kept.clear()

    def get(self, key: Key, folder: str | Path | None) -> TextEmbedding | None:
        """Return the embedding of this key, or None. ValueError for a damaged file."""
        file = _file(key, folder)
        if key in self.kept or file is None or not file.exists():
            return self.kept.get(key)
        source = Source([file])
        if not {"tokens", "pooled"} <= set(source) <= {"tokens", "pooled", "counts"}:
            raise ValueError(f"{file}: expected tensors tokens, pooled and counts, got {sorted(source)[:5]}")
        return TextEmbedding(**dict(source))

    def put(self, key: Key, text: TextEmbedding, maximum: int, folder: str | Path | None) -> None:
        """Store an embedding; in memory the last `maximum` used are kept."""
        with self._lock:
            self.kept[key] = text
            self.kept.move_to_end(key)
            while len(self.kept) > maximum:
                self.kept.popitem(last=False)
        if (file := _file(key, folder)) is not None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({name: tensor for name, tensor in vars(text).items() if tensor is not None}, file)


def _file(key: Key, folder: str | Path | None) -> Path | None:
    return Path(folder) / f"{key.name}.safetensors" if folder is not None and key.is_persistable else None


def fingerprint(encoder: ChatGLM, tokens: TokenBatch) -> str:
    """Hash what determines the embedding of these tokens, to 64 hexadecimal digits."""
    state = encoder.state_dict()
    description = [encoder.config, settings(encoder), *((n, t.shape, t.dtype) for n, t in state.items())]
    parts = [tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)] for tensor in state.values()]
    ids = tokens.ids.to(encoder.embedding.weight.device).unique()
    parts.append(encoder.embedding.forward(ids))  # without hooks
    values = torch.cat([part.detach().flatten().cpu().double() for part in parts])  # MPS has no float64
    content = repr(description).encode() + values.numpy().tobytes()
    for tensor in (tokens.ids, tokens.mask, tokens.positions, tokens.counts):
        content += repr(None if tensor is None else tensor.tolist()).encode()
    return hashlib.sha256(content).hexdigest()

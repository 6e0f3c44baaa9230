"""Prompt cache: embeddings of encoded prompts, in memory and, if a folder is set, on disk.

The key of an embedding is its tokens and the encoder: every tensor's name, shape, dtype and a sample of its
values, these tokens' embeddings and adapters' settings. A moved encoder finds it again, a changed one not.
"""

import hashlib
import logging
import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError

from kolors_core.changed_models import is_ours
from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.devices import all_finite
from kolors_core.module import sample_weights, settings
from kolors_core.performance.offload import OnloadHook
from kolors_core.tokenizer import TokenBatch
from kolors_core.validation import short_repr
from weights_convert.safetensors_files import Source, save_tensors
from weights_convert.untrusted_files import one_line

logger = logging.getLogger("kolors_core")


class Key(NamedTuple):
    """Key of an embedding: `name` in a folder, and also `memory_key` in memory.

    is_persistable: whether the name identifies the embedding; not for an encoder with forward hooks or
    another class or forward. Pre-hooks do not count there, nor anywhere those that copy weights (offload.py).
    """

    name: str
    memory_key: tuple[Any, ...]
    is_persistable: bool

    @classmethod
    def of(cls, encoder: ChatGLM, tokens: TokenBatch) -> Self:
        """Make the key of these tokens' embedding by this encoder."""
        hooks = [hook for module in encoder.modules() for hook in module._forward_hooks.values()]
        pre_hooks = [
            hook for module in encoder.modules() for hook in module._forward_pre_hooks.values()
            if not isinstance(hook, OnloadHook)  # new in every run
        ]  # fmt: skip
        versions = tuple(parameter._version for parameter in encoder.parameters())
        is_plain = is_ours(type(encoder)) and "forward" not in vars(encoder)
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

    def get(
        self, key: Key, folder: str | Path | None, encoder: ChatGLM, tokens: TokenBatch
    ) -> TextEmbedding | None:
        """Return the embedding of these tokens by this encoder, whose key it is, or None.

        A file that does not fit, or is damaged, is removed, and a log line says so.
        """
        file = _file(key, folder)
        if key in self.kept or file is None or not os.path.lexists(file):
            return self.kept.get(key)
        try:
            return _read(file, encoder, tokens)
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s: the prompt is encoded again", one_line(error))
            with suppress(OSError):
                file.unlink()
            return None

    def put(self, key: Key, text: TextEmbedding, maximum: int, folder: str | Path | None) -> None:
        """Store an embedding; in memory the last `maximum` used are kept. A full disk is logged only."""
        with self._lock:
            self.kept[key] = text
            self.kept.move_to_end(key)
            while len(self.kept) > maximum:
                self.kept.popitem(last=False)
        if (file := _file(key, folder)) is None or os.path.lexists(file):
            return
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({name: tensor for name, tensor in vars(text).items() if tensor is not None}, file)
        except OSError as error:
            logger.warning("the prompt's embedding is not kept: %s", one_line(error))


def _file(key: Key, folder: str | Path | None) -> Path | None:
    return Path(folder) / f"{key.name}.safetensors" if folder is not None and key.is_persistable else None


def _read(file: Path, encoder: ChatGLM, tokens: TokenBatch) -> TextEmbedding:
    """Read the embedding of these tokens; ValueError naming the file if this encoder cannot have made it."""
    source, dtype, width = Source([file]), encoder.embedding.weight.dtype, encoder.config.hidden_size
    expected = {"tokens": ((*tokens.ids.shape, width), dtype), "pooled": ((len(tokens.ids), width), dtype)}
    if tokens.counts is not None:
        expected["counts"] = tuple(tokens.counts.shape), tokens.counts.dtype
    found = {name: (source.shape(name), source.dtype(name)) for name in source}
    if found != expected:
        raise ValueError(f"{file}: expected {expected}, got {short_repr(found)}")
    text = TextEmbedding(**dict(source))
    if not (all_finite(text.tokens) and all_finite(text.pooled)):
        raise ValueError(f"{file}: its values are not finite")
    if tokens.counts is not None and not torch.equal(source["counts"], tokens.counts.cpu()):
        raise ValueError(f"{file}: its counts are not those of the prompt's tokens")
    return text


def fingerprint(encoder: ChatGLM, tokens: TokenBatch) -> str:
    """Hash what determines the embedding of these tokens, to 64 hexadecimal digits."""
    state = encoder.state_dict()
    description = [encoder.config, settings(encoder), *((name, t.dtype) for name, t in state.items())]
    embedded = []
    if isinstance(encoder, ChatGLM):
        ids = tokens.ids.unique().to(encoder.embedding.weight.device)
        embedded = [encoder.embedding.forward(ids)]  # without hooks
    content = repr(description).encode() + sample_weights(state, embedded)
    for tensor in (tokens.ids, tokens.mask, tokens.positions, tokens.counts):
        content += repr(None if tensor is None else tensor.tolist()).encode()
    return hashlib.sha256(content).hexdigest()

"""Embeddings of prompts that were encoded before, kept in memory and, if asked, in a folder.

An embedding is known by its tokens and by the encoder: every tensor's name, shape, dtype and a sample of its
values, the embeddings of these very tokens, and how adapters are weighed. So it is found again after the
encoder was moved, and not after it was trained, quantised or adapted.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.module import settings
from kolors_core.tokenizer import TokenBatch
from weights_convert.safetensors_files import Source, save_tensors

SAMPLES = 64  # values of each tensor


class Key(NamedTuple):
    """What an embedding is known by: in a folder `name`, in memory `here` beside it.

    can_last: not of an encoder that is hooked or has another forward, which no name tells; a hook before a
    module is taken for one that only brings its weights (offload.py).
    """

    name: str
    here: tuple[Any, ...]
    can_last: bool

    @classmethod
    def of(cls, encoder: ChatGLM, tokens: TokenBatch) -> Self:
        """The key of these tokens' embedding by this encoder."""
        hooks = [
            id(hook)
            for module in encoder.modules()
            for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        ]
        writes = tuple(parameter._version for parameter in encoder.parameters())
        is_watched = any(module._forward_hooks for module in encoder.modules())
        can_last = type(encoder) is ChatGLM and "forward" not in vars(encoder) and not is_watched
        return cls(fingerprint(encoder, tokens), (type(encoder), writes, tuple(hooks)), can_last)


class PromptCache:
    """The last few embeddings, on whatever device they were made."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Key, TextEmbedding] = OrderedDict()

    def clear(self) -> None:
        """Forget all that is in memory."""
        self.kept.clear()

    def find(self, key: Key, folder: str | Path | None) -> TextEmbedding | None:
        """The embedding of this key, or None. ValueError for a damaged file."""
        if key in self.kept or folder is None or not key.can_last:
            return self.kept.get(key)
        file = Path(folder) / f"{key.name}.safetensors"
        if not file.exists():
            return None
        source = Source([file])
        if not {"tokens", "pooled"} <= set(source) <= {"tokens", "pooled", "counts"}:
            raise ValueError(f"{file}: no prompt embedding, wanted tensors tokens, pooled and counts")
        return TextEmbedding(source["tokens"], source["pooled"], source.get("counts"))

    def keep(self, key: Key, text: TextEmbedding, most: int, folder: str | Path | None) -> None:
        """Keep an embedding; in memory the last `most` used are kept."""
        self.kept[key] = text
        self.kept.move_to_end(key)
        while len(self.kept) > most:
            self.kept.popitem(last=False)
        if folder is None or not key.can_last:
            return
        file = Path(folder) / f"{key.name}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            tensors = {"tokens": text.tokens, "pooled": text.pooled, "counts": text.counts}
            save_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def fingerprint(encoder: ChatGLM, tokens: TokenBatch) -> str:
    """What decides the embedding of these tokens, as 64 hexadecimal digits."""
    state = encoder.state_dict()
    told = [encoder.config, settings(encoder)]
    told += [(name, tensor.shape, tensor.dtype) for name, tensor in state.items()]
    parts = [tensor.reshape(-1)[:: max(1, tensor.numel() // SAMPLES)] for tensor in state.values()]
    ids = tokens.ids.to(encoder.embedding.weight.device).unique()
    parts.append(encoder.embedding.forward(ids))  # past hooks: nobody is told of it
    values = torch.cat([part.detach().flatten().cpu().double() for part in parts])  # MPS has no float64
    digest = hashlib.sha256(repr(told).encode())
    digest.update(values.numpy().tobytes())
    for tensor in (tokens.ids, tokens.mask, tokens.positions, tokens.counts):
        digest.update(repr(None if tensor is None else tensor.tolist()).encode())
    return digest.hexdigest()

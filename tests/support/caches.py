"""Caches of latents beside the dataset in memory: one made alike, and whether two batches are the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Batch, Batches, LatentDataset, read_folder
from tests.support.cache_worker import (
    SIZES,
    models,
)
from tests.support.train_worker import CONFIG


def memory(kind: type[LatentDataset], pictures: Path, tokenizer: Path, **more: Any) -> LatentDataset:
    (vae, text), examples = models(), read_folder(pictures)
    batches = Batches(examples, SIZES, CONFIG.batch_size, CONFIG.seed)
    return kind(examples, batches, vae, Tokenizer(tokenizer), CONFIG, text, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != ".locks"}


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, Mapping) else vars(value) if hasattr(value, "__dict__") else {}
    return [tensor for name in sorted(parts) for tensor in tensors_of(parts[name])]


def same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(tensors_of(one), tensors_of(other), strict=True))
    return len(pairs) >= 7 and all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in pairs)

"""Processes that write a cache, or are killed while they do; and one rank's batches of a cache."""

import os
import signal
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kolors_core.chatglm import ChatGLM
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.cache import Tensors, write_cache
from kolors_core.training.cached_data import CachedDataset
from kolors_core.training.prefetch import Prefetched
from kolors_core.training.sources import Record, folder_records
from kolors_core.vae import VAE
from tests.support.small import SMALL, randomise
from tests.support.train_worker import CONFIG
from weights_convert.job_locks import JobLocks
from weights_convert.safetensors_files import save_tensors

SIZES = [(64, 64), (32, 64)]
CPU = torch.device("cpu")


@cache
def models() -> tuple[VAE, ChatGLM]:
    """Small ones, those of train_worker.py."""
    vae, text = VAE(SMALL.vae), ChatGLM(SMALL.text_encoder)
    for seed, model in enumerate((vae, text), 1):
        randomise(model, seed)
    return vae, text


def write(
    folder: Path, records: Iterable[Record], tokenizer: Path, *, tensors: Tensors | None = None,
    has_text: bool = True, max_tokens: int = CONFIG.max_tokens, skip_damaged: bool = False,
) -> int:  # fmt: skip
    """Write a cache of two records a shard; return how many images were encoded."""
    (vae, text), seen = models(), list[int]()
    counting = vae.encoder.register_forward_hook(lambda *_: seen.append(1))
    encoder: Any = text if has_text else None
    settings: Any = {"max_tokens": max_tokens, "tensors": tensors, "skip_damaged": skip_damaged}
    settings |= {"records_per_shard": 2, "progress": False}
    try:
        write_cache(folder, records, SIZES, vae, Tokenizer(tokenizer), encoder, **settings)
    finally:
        counting.remove()
    return len(seen)


def write_or_die(pictures: Path, tokenizer: Path, out: Path) -> int:
    """Write a cache; the first process is killed with the lock of a shard in its hand."""
    is_killed = os.environ["RANK"] == "0"
    encoded = write(out / "cache", folder_records(pictures), tokenizer, tensors=die if is_killed else None)
    (out / "encoded.txt").write_text(str(encoded))
    return 0


def die(*_: object) -> dict[str, torch.Tensor]:
    """End this process as the system does, while it encodes."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hold_first_shard(folder: Path, ready: Path) -> None:
    """Have the lock of the first shard for a while, and end without writing it."""
    with JobLocks(folder / ".locks").lock(1):
        ready.touch()
        while len(list(folder.glob("*.safetensors"))) < 2:
            time.sleep(0.01)
        time.sleep(0.2)


def batches_of_a_rank(rank: int, cache: Path, out: Path) -> None:
    """Write the rows of one rank of two of some batches, made by workers, in two parts each."""
    data = Prefetched(CachedDataset(cache, CONFIG))
    for step in range(3):
        for start in (2 * rank, 2 * rank + 1):
            batch = data.batch(step, slice(start, start + 1), CPU)
            tensors = {"latents": batch.latents, "noise": batch.noise, "pooled": batch.text.pooled}
            save_tensors(tensors, out / f"{step}-{start}.safetensors")

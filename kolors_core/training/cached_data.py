"""Batches of a cache on a disk: what `LatentDataset` makes of the same images, bit for bit, in little memory.

Memory has 16 bytes of each image; latents and embeddings are mapped, and read for the rows of a batch. As of
data.py, a batch is a function of seed and step: on any number of processes and of `Prefetched`'s workers.
Shapes: B images of the whole batch, b of one rank's rows, H and W pixels of a bucket.
"""

from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.image import Size
from kolors_core.tokenizer import TokenBatch, Tokenizer
from kolors_core.training.cache import INDEX_FILE, OWN, SHARD_FILE, digest_tokenizer
from kolors_core.training.data import Batch, IndexBatches, check_rows, draw_noise, random_masked_latents
from kolors_core.training.run_record import digest_model
from kolors_core.training.shards import DamagedShard, OpenShards, Shard
from kolors_core.training.trainer import BatchSource, TrainingConfig
from kolors_core.vae import VAE
from kolors_core.validation import as_path
from weights_convert.untrusted_files import read_json_object

MAX_INDEX_BYTES = 2**26
MOST_OPEN = 1024  # shards that stay mapped
OF_BATCHES = ("control", "extra")  # a cache's own tensors that are fields of a batch


class CachedDataset:
    """Dataset of a cache that `write_cache` wrote; the source and the models are not needed.

    timesteps: how many the schedule has. tokenizer, words: as of `write_cache`, needed, and checked, where
    the text encoder is trained and the cache has no embeddings. Raises FileNotFoundError or ValueError for a
    cache that is not whole or was made with other settings. A shard that is found to be damaged when it is
    read is renamed, so that `write_cache` makes it again, and a ValueError says so.
    """

    def __init__(
        self, folder: str | Path, config: TrainingConfig, timesteps: int = 1100, caption_dropout: float = 0.1,
        *, tokenizer: Tokenizer | None = None, words: Mapping[str, Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.config, self.timesteps = as_path("folder", folder), config, timesteps
        self.tokenizer, self.words = tokenizer, words
        self.made_by, self.files = self._read_index()
        self.shards = OpenShards(self.folder, MOST_OPEN)
        self.has_text = self.made_by["frozen text encoder"] is not None
        self._check_settings()
        sizes, counts, kinds = list[Tensor](), list[Tensor](), set[tuple[str, ...]]()
        for file in self.files:
            shard = self._open(file)
            sizes.append(shard.sizes)
            counts.append(shard.caption_counts())
            kinds |= {tuple(shard.names)} if shard.names else set()
        if len(kinds) > 1:
            raise ValueError(f"{self.folder}: some records have tensors that others lack: {sorted(kinds)}")
        self.first = torch.tensor([0, *map(len, sizes)]).cumsum(0)  # record of each shard
        members = _members(torch.cat(sizes))
        if not members:
            raise ValueError(f"{self.folder}: no images to make batches of")
        self.batches = IndexBatches(
            members, _as_array(torch.cat(counts)), config.batch_size, config.seed, caption_dropout
        )

    def _read_index(self) -> tuple[dict[str, Any], list[str]]:
        file = self.folder / INDEX_FILE
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file: `write_cache` writes it when the cache is whole")
        index = read_json_object(file, MAX_INDEX_BYTES)
        made_by, files = index.get("made_by"), index.get("shards")
        is_list = isinstance(files, list) and all(
            isinstance(name, str) and SHARD_FILE.fullmatch(name) for name in files
        )
        if not is_list or not files or not isinstance(made_by, dict) or "max_tokens" not in made_by:
            raise ValueError(f"{file}: not an index of a cache")
        return made_by, files

    def _check_settings(self) -> None:
        if (own := self.made_by["max_tokens"]) != self.config.max_tokens:
            raise ValueError(f"max_tokens must be the cache's, {own}, got {self.config.max_tokens}")
        if not self.has_text:
            if self.tokenizer is None:
                raise ValueError(f"{self.folder}: a tokenizer is needed: the cache has no embeddings")
            if digest_tokenizer(self.tokenizer, self.words) != self.made_by["tokenizer"]:
                raise ValueError(f"{self.folder}: was made with another tokenizer, or other words")

    def _open(self, file: str) -> Shard:
        """Map a shard of the index; ValueError for one that is not there or not whole."""
        try:
            return self.shards[file]
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.folder / file}: no such file: `write_cache` makes it") from None
        except DamagedShard as error:
            raise self._renamed(file, error) from None

    def _renamed(self, file: str, error: DamagedShard) -> ValueError:
        """Rename a damaged shard, so that it is made again, and return the error to raise."""
        with suppress(OSError):
            (self.folder / file).rename(self.folder / f"{file}.damaged")
        return ValueError(f"{error}; it was renamed, and `write_cache` makes it again")

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build the `rows` of a step's batch, as of `LatentDataset`; ValueError for a damaged file."""
        _, picks = self.batches.picks(step)
        check_rows(rows, len(picks))
        tensors, texts = list[dict[str, Tensor]](), list[TextEmbedding | str]()
        for i, number in picks[rows]:
            file, row = self._place(i)
            shard = self._open(file)
            try:
                text = 0 if number is None else shard.text_numbers(row)[number]
                tensors.append(shard.record(row))
                texts.append(shard.embedding(text) if self.has_text else shard.text(text))
            except DamagedShard as error:
                raise self._renamed(file, error) from None
        own = {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}
        mean, std = own["latents"].unbind(1)  # [b, 4, H/8, W/8]
        shape = len(picks), *mean.shape[1:]
        draw, noise, timesteps = (x[rows] for x in draw_noise(self.config, self.timesteps, step, shape))
        more = {name: _as_float(own[name]) for name in own if name not in OWN}
        fields = {name: more.pop(name, None) for name in OF_BATCHES}
        batch = Batch(
            mean + std * draw, self._text(texts), own["size_ids"], timesteps, noise, more=more, **fields
        )
        return batch.to(device)

    def _place(self, i: int) -> tuple[str, int]:
        """Return the file and the row of a record."""
        shard = int(torch.searchsorted(self.first, i, right=True)) - 1
        return self.files[shard], i - int(self.first[shard])

    def _text(self, texts: Sequence[Any]) -> TextEmbedding | TokenBatch:
        if self.has_text:
            return TextEmbedding.cat(texts)
        assert self.tokenizer is not None
        return self.tokenizer(texts, self.config.max_tokens, self.words).merge_padding()

    def record(self) -> dict[str, Any]:
        """Record what batches depend on, see `BatchSource`: images and captions by the digests of shards."""
        seed, dropout = self.batches.seed, self.batches.dropout
        return {
            "shards": [f"sha256:{name.partition('-')[2].partition('.')[0]}" for name in self.files],
            "data": f"{type(self).__name__}, {seed}, {dropout}, {self.timesteps}",
            **{name: value for name, value in self.made_by.items() if name not in ("format", "max_tokens")},
        }


def _as_array(numbers: Tensor) -> "array[int]":
    """Convert int64 [n] to numbers of Python that take 8 bytes each."""
    return array("q", numbers.numpy().tobytes())


def _members(sizes: Tensor) -> dict[Size, Sequence[int]]:
    """List the records of each bucket, of sizes int64 [n, 2]; those of size 0 are left out."""
    found, numbers = sizes.unique(dim=0, return_inverse=True)
    order = numbers.argsort(stable=True)
    parts = order.split(numbers.bincount(minlength=len(found)).tolist())
    return {(h, w): _as_array(part) for (h, w), part in zip(found.tolist(), parts, strict=True) if h}


def _as_float(tensor: Tensor) -> Tensor:
    """Return bytes as numbers in [0, 1], other tensors as they are."""
    return tensor / 255 if tensor.dtype == torch.uint8 else tensor


class RandomMasks:
    """Source of inpainting batches: those of another one with `extra`, as `MaskedLatentDataset` makes it.

    source: its batches have pixels [b, 3, H, W] in [0, 1] in `more`, such as of a cache written with
    `tensors=store_pixels`. Masked images are encoded in every step on the VAE's device, so this stands around
    `Prefetched`, not in it.
    """

    def __init__(self, source: BatchSource, vae: VAE, config: TrainingConfig) -> None:
        self.source, self.vae, self.config = source, vae, config

    def batch(self, step: int, rows: slice, device: torch.device) -> Batch:
        """Build a batch with `extra` [b, 5, H/8, W/8], and without the pixels."""
        batch = self.source.batch(step, rows, torch.device("cpu"))
        if "pixels" not in batch.more or batch.extra is not None:
            raise ValueError("expected batches with pixels and without extra: tensors=store_pixels")
        pixels = (batch.more["pixels"] * 255).round() / 127.5 - 1
        own = self.config.seed, step, rows, self.config.batch_size
        extra = random_masked_latents(self.vae, pixels, *own)
        more = {name: tensor for name, tensor in batch.more.items() if name != "pixels"}
        return replace(replace(batch, more=more).to(device), extra=extra.to(device))

    def record(self) -> Mapping[str, Any]:
        """Record the source, and the VAE that encodes masked images."""
        return {**self.source.record(), "masks": f"{type(self).__name__}, {digest_model(self.vae)}"}

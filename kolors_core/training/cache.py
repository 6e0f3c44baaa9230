"""Cache of what batches are made of: a source's images and captions, encoded once, in shards on a disk.

A shard (shards.py) has the next records of the source, encoded one at a time, so its values depend on each
record alone. Any processes may write one cache: each locks a shard, and a killed one loses what it had not
written. A shard is kept while it was made by the same models and settings from the same records: these are
known by their stamps (sources.py), and read again where a stamp differs. Otherwise it is made again, with a
log line, from what older shards have of its records. `index.json` lists the shards of a whole cache and is
written last: until then the cache of before can be read, unless models or settings are others.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kolors_core.chatglm import ChatGLM, TextEmbedding
from kolors_core.conditioning import size_ids
from kolors_core.image import Size
from kolors_core.tokenizer import Tokenizer
from kolors_core.training.data import Example, load_pixels, nearest_bucket
from kolors_core.training.run_record import differences, digest, digest_model
from kolors_core.training.shards import (
    DamagedShard,
    Entry,
    OpenShards,
    Shard,
    as_number,
    pack,
    save_shard,
    shard_digest,
)
from kolors_core.training.sources import Record
from kolors_core.vae import VAE
from kolors_core.validation import as_path, check_int, short_repr
from weights_convert.atomic_write import write_bytes
from weights_convert.job_locks import JobLocks

if TYPE_CHECKING:
    from PIL.Image import Image

Tensors = Callable[[Record, Tensor], Mapping[str, Tensor]]
FORMAT = 1  # of shards; another one makes them again
INDEX_FILE = "index.json"
MOST_IN_SHARD = 2**16  # records
OWN = ("latents", "size_ids")  # names of tensors of every record
SHARD_FILE = re.compile(r"(\d{6,})-([0-9a-f]{16})\.safetensors")
OLD_FILE = re.compile(rf"{SHARD_FILE.pattern}(\.damaged)?")
logger = logging.getLogger("kolors_core")


def write_cache(
    folder: str | Path, records: Iterable[Record], sizes: Sequence[Size], vae: VAE, tokenizer: Tokenizer,
    text_encoder: ChatGLM | None = None, *, max_tokens: int = 256,
    words: Mapping[str, Sequence[int]] | None = None, tensors: Tensors | None = None,
    records_per_shard: int = 256, skip_damaged: bool = False, progress: bool = True,
) -> None:  # fmt: skip
    """Encode a source's records into a cache, or what is missing there; `CachedDataset` reads it.

    sizes: of the buckets. text_encoder: frozen; None if it is trained, and batches have tokens. words: see
    `LatentDataset`. tensors: a function of a record and its pixels [3, H, W] in [-1, 1] that returns more
    tensors of the record, of one shape in a bucket: "control" and "extra" become those of a batch, others
    are in `Batch.more`. It is known by its source text, or, if it is an object, by its class and its
    `state_key()` (kolors_core/module.py). skip_damaged: leave out images that cannot be decoded, with a log
    line, in place of a ValueError naming the first. Called again, it encodes what is new or changed.
    """
    if not sizes:
        raise ValueError("expected at least one size of a bucket, got none")
    check_int("records_per_shard", records_per_shard, most=MOST_IN_SHARD)
    folder = as_path("folder", folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(sizes, vae, tokenizer, text_encoder, max_tokens, words, tensors, skip_damaged)
    with closing(JobLocks(folder / ".locks")) as locks:
        _Writing(folder, encoder, locks, records_per_shard, progress).run(records)


class Encoder:
    """Encoder of records; `made_by` has all that their tensors depend on besides the records themselves."""

    def __init__(
        self, sizes: Sequence[Size], vae: VAE, tokenizer: Tokenizer, text_encoder: ChatGLM | None,
        max_tokens: int, words: Mapping[str, Sequence[int]] | None, tensors: Tensors | None,
        skip_damaged: bool,
    ) -> None:  # fmt: skip
        self.sizes, self.vae, self.tokenizer, self.text_encoder = sizes, vae, tokenizer, text_encoder
        self.max_tokens, self.words, self.tensors, self.skip = max_tokens, words, tensors, skip_damaged
        self.empty: TextEmbedding | None = None  # of the empty caption, which every shard has
        self.made_by: dict[str, Any] = {
            "format": FORMAT,
            "vae": digest_model(vae),
            "tokenizer": digest_tokenizer(tokenizer, words),
            "frozen text encoder": None if text_encoder is None else digest_model(text_encoder),
            "max_tokens": max_tokens,
            "sizes": [list(size) for size in sizes],
            "tensors": None if tensors is None else digest_function(tensors),
        }

    def read(self, record: Record) -> "tuple[bytes | Image | None, int]":
        """Read a record's image, None for a damaged one that is left out, and the number of its contents."""
        try:
            content = record.image.read()
            return content, as_number(record.contents(content))
        except ValueError as error:
            self._leave_out(error)
            return None, as_number(record.stamp())

    def _leave_out(self, error: ValueError) -> None:
        if not self.skip:
            raise error
        logger.warning("left out: %s", error)

    @torch.no_grad()
    def encode(self, record: Record, content: "bytes | Image | None") -> Entry | None:
        """Encode a record whose image is read; None for a damaged image that is left out."""
        if content is None:
            return None
        try:
            image = record.image.open(content)
        except ValueError as error:
            return self._leave_out(error)
        example = Example(image, record.captions, image.height, image.width)
        size = nearest_bucket(example, self.sizes)
        pixels, crop = load_pixels(example, size)  # [3, H, W]
        encoded = self.vae.encode_images(pixels[None].to(self.vae.post_quant_conv.weight))
        latents = torch.cat([encoded.mean, encoded.std]).float().cpu()  # [2, 4, H/8, W/8]
        if not latents.isfinite().all():
            raise ValueError(f"{record.image.name}: its latents are not finite: a VAE in float16 overflows")
        ids = size_ids((image.height, image.width), crop, size)[0]
        found = {} if self.tensors is None else dict(self.tensors(record, pixels))
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor) or name in OWN or "." in name:
                expected = f"tensors by names without a dot, other than {' and '.join(OWN)}"
                got = f"{short_repr(name)}, a {type(tensor).__name__}"
                raise ValueError(f"{record.image.name}: expected {expected}, got {got}")
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
        return Entry(size, {"latents": latents, "size_ids": ids, **own}, record.captions)

    @torch.no_grad()
    def embed(self, caption: str) -> TextEmbedding:
        """Encode a caption alone: [1, L, C]."""
        assert self.text_encoder is not None
        if caption == "" and self.empty is not None:
            return self.empty
        tokens = self.tokenizer([caption], self.max_tokens, self.words).merge_padding()
        device = next(self.text_encoder.parameters()).device
        embedding = self.text_encoder(tokens.to(device)).to("cpu")
        self.empty = embedding if caption == "" else self.empty
        return embedding


def digest_tokenizer(tokenizer: Tokenizer, words: Mapping[str, Sequence[int]] | None) -> str:
    """Hash a tokenizer and the words of textual inversion, as `LatentDataset` does."""
    return digest(tokenizer.model_bytes, repr(sorted((words or {}).items())).encode())


def digest_function(function: Callable[..., Any]) -> str:
    """Hash the source text of a function, or the class and `state_key()` of another callable object."""
    import inspect

    if isinstance(function, nn.Module):
        return digest_model(function)
    code = function if inspect.isroutine(function) else type(function)
    name = f"{code.__module__}.{code.__qualname__}"
    key = getattr(function, "state_key", tuple)()
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):  # typed into a shell
        text = repr(getattr(getattr(code, "__code__", None), "co_code", None))
    return digest(repr((name, key, text)).encode())


class _Writing:
    """Writing of a cache by one process."""

    def __init__(
        self, folder: Path, encoder: Encoder, locks: JobLocks, per_shard: int, progress: bool
    ) -> None:
        self.folder, self.encoder, self.locks = folder, encoder, locks
        self.per_shard, self.progress = per_shard, progress
        self.made_by = json.dumps(encoder.made_by, sort_keys=True)
        self.shards = OpenShards(folder, most=8)
        self.names = dict[int, str]()  # files of the shards that are up to date, by number
        self.old = [name for name in os.listdir(folder) if SHARD_FILE.fullmatch(name)]
        self.known: tuple[Tensor, Tensor, list[str]] | None = None  # see `_known`
        self.reported, self.records, self.encoded, self.reused = set[str](), 0, 0, 0

    def run(self, records: Iterable[Record]) -> None:
        """Write all shards, and the index when those of other processes are there too."""
        from tqdm.auto import tqdm

        while True:
            self.records = 0
            with tqdm(desc="encoding", unit="image", disable=not self.progress) as bar:
                waiting = self._pass(records, bar.update)
            if all([self._wait(number, stamps) for number, stamps in waiting.items()]):
                break
            if iter(records) is records:
                raise OSError(f"{self.folder}: another process ended before its shards: run this again")
        if not self.names:
            raise ValueError(f"{self.folder}: the source has no records")
        self._finish()

    def _pass(self, records: Iterable[Record], show: Callable[[int], Any]) -> dict[int, list[int]]:
        """Read the source once and write shards; return the stamps of those that others are writing."""
        waiting, source = dict[int, list[int]](), iter(records)
        for number in count():
            if not (chunk := list(islice(source, self.per_shard))):
                return waiting
            stamps = [as_number(record.stamp()) for record in chunk]
            if not self._is_there(number, stamps, old := self._candidates(number, self.old), chunk):
                with self.locks.lock(number + 1) as is_mine:
                    new = [name for name in self._candidates(number) if name not in old]
                    if not is_mine:
                        waiting[number] = stamps
                    elif not self._is_there(number, stamps, new):  # by a process that had the lock before
                        self._write(number, chunk, stamps)
            self.records += len(chunk)
            show(len(chunk))
        raise AssertionError

    def _wait(self, number: int, stamps: list[int]) -> bool:
        """Wait for another process to write a shard; return whether it did."""
        with self.locks.lock(number + 1, is_waiting=True):
            return self._is_there(number, stamps, self._candidates(number))

    def _candidates(self, number: int, names: Iterable[str] | None = None) -> list[str]:
        """List the files of a shard of this number, of these names or else of those there are now."""
        start = f"{number:06d}-"
        names = os.listdir(self.folder) if names is None else names
        return [name for name in names if name.startswith(start) and SHARD_FILE.fullmatch(name)]

    def _is_there(
        self, number: int, stamps: list[int], candidates: list[str], chunk: Sequence[Record] | None = None
    ) -> bool:
        """Return whether a candidate is a shard of these records; the reason if not is logged once."""
        for name in candidates:
            try:
                shard = self.shards[name]
            except DamagedShard as error:
                self._report(f"{error}, and encoded again")
                continue
            except FileNotFoundError:  # removed by another process that replaced it
                continue
            if shard.made_by != self.made_by:
                different = "; ".join(differences(shard.made_by, self.encoder.made_by))
                self._report(f"{self.folder}: shards of other models or settings are made again: {different}")
            elif self._is_of(shard, stamps, chunk):
                self.names[number] = name
                return True
            elif chunk is not None:
                self._report(f"{self.folder}: images or captions are others, or in another order")
        return False

    def _is_of(self, shard: Shard, stamps: list[int], chunk: Sequence[Record] | None) -> bool:
        """Return whether a shard is of records with these stamps, or else of these contents."""
        if shard.index["stamps"].tolist() == stamps:
            return True
        if chunk is None or len(chunk) != len(shard.sizes):
            return False
        for record, content in zip(chunk, shard.index["contents"].tolist(), strict=True):
            if self.encoder.read(record)[1] != content:
                return False
        tensors = dict(shard.source) | {"stamps": torch.tensor(stamps)}
        save_shard(tensors, shard.file, self.made_by)
        self.shards.forget(shard.file.name)
        return True

    def _report(self, reason: str) -> None:
        if reason not in self.reported:
            self.reported.add(reason)
            logger.warning("%s", reason)

    def _write(self, number: int, chunk: Sequence[Record], stamps: list[int]) -> None:
        """Encode the records of a shard, or take them from older shards, and write it."""
        entries, contents, texts = list[Entry | None](), list[int](), dict[str, TextEmbedding]()
        for record in chunk:
            content, number_of_content = self.encoder.read(record)
            contents.append(number_of_content)
            found = self._find(number_of_content, record, texts)
            self.reused += found is not None
            self.encoded += found is None
            entries.append(self.encoder.encode(record, content) if found is None else found)
        if self.encoder.text_encoder is not None:
            used = {caption for entry in entries if entry is not None for caption in entry.captions}
            for caption in ("", *sorted(used - texts.keys())):
                texts[caption] = self.encoder.embed(caption)
        tensors = pack(entries, stamps, contents, texts)
        name = f"{number:06d}-{shard_digest(tensors['contents'], self.made_by)}.safetensors"
        replaced = [other for other in self._candidates(number) if not self._is_useful(other)]
        self.shards.forget(name)
        save_shard(tensors, self.folder / name, self.made_by)
        self.names[number] = name
        self._remove(other for other in replaced if other != name)

    def _is_useful(self, name: str) -> bool:
        """Return whether a shard is whole and made as this process makes them."""
        with suppress(DamagedShard, FileNotFoundError):
            return self.shards[name].made_by == self.made_by
        return False

    def _find(self, content: int, record: Record, texts: dict[str, TextEmbedding]) -> Entry | None:
        """Read a record and the embeddings of its captions from an older shard; None if none has it whole."""
        numbers, places, names = self.known = self.known or self._known()
        at = int(torch.searchsorted(numbers, content))
        if at == len(numbers) or int(numbers[at]) != content:
            return None
        shard_number, row = divmod(int(places[at]), MOST_IN_SHARD)
        with suppress(DamagedShard, FileNotFoundError):
            shard = self.shards[names[shard_number]]
            height, width = shard.sizes[row].tolist()
            if not height or int(shard.index["contents"][row]) != content:
                return None
            tensors = {name: tensor.clone() for name, tensor in shard.record(row).items()}
            for caption, text in zip(record.captions, shard.text_numbers(row), strict=True):
                if shard.has_text and caption not in texts:
                    texts[caption] = shard.embedding(text)
            return Entry((height, width), tensors, record.captions)
        return None

    def _known(self) -> tuple[Tensor, Tensor, list[str]]:
        """Return the sorted contents of older shards of the same models, and where each is: 16 bytes each."""
        names, contents, places = [name for name in self.old if self._is_useful(name)], [], []
        for number, name in enumerate(names):
            contents.append(own := self.shards[name].index["contents"])
            places.append(number * MOST_IN_SHARD + torch.arange(len(own)))
        if not names:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), names
        values, order = torch.cat(contents).sort()
        return values, torch.cat(places)[order], names

    def _finish(self) -> None:
        """Write the index, and remove the shards that are not in it."""
        shards = [self.names[number] for number in sorted(self.names)]
        index = {"made_by": self.encoder.made_by, "records": self.records, "shards": shards}
        content = json.dumps(index, indent=0, sort_keys=True).encode()
        file = self.folder / INDEX_FILE
        if not file.is_file() or file.read_bytes() != content:
            write_bytes(content, file)
        names = [name for name in os.listdir(self.folder) if OLD_FILE.fullmatch(name)]
        self._remove(name for name in names if name not in shards)
        if self.encoded or self.reused:
            taken = f", {self.reused} taken from older shards" if self.reused else ""
            logger.warning("%s: %d records, %d encoded%s", self.folder, self.records, self.encoded, taken)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with suppress(FileNotFoundError):  # another process was faster
                (self.folder / name).unlink()

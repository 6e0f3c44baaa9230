"""Shards of a cache: safetensors files of latents, text embeddings and all else that batches are made of.

    latents.64x96       float32 [m, 2, 4, H/8, W/8], mean and standard deviation of m records of that bucket
    size_ids.64x96      float32 [m, 6]; so are a cache's own tensors: mask.64x96 [m, ...]
    sizes               int64 [n, 2], the bucket of each of the shard's n records; 0, 0: left out
    stamps, contents    int64 [n], digests of the records, see sources.py
    checks              int64 [n], checksums of the records' tensors
    captions            int64 [n + 1], where each record's captions begin in caption_texts
    caption_texts       int64, the numbers of these captions among the shard's t different ones
    texts, text_bytes   int64 [t + 1] and uint8, those in UTF-8, the empty one first, and where each begins
    tokens, counts, pooled, text_places, text_checks   their embeddings, if text is encoded, and as above

A file is mapped, and records are read by row. The format has no checksums: these find what a disk loses, in
the index when a shard is opened, and in a record when it is read.
"""

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kolors_core.chatglm import TextEmbedding
from kolors_core.image import Size
from kolors_core.training.run_record import DIGEST, digest
from weights_convert.safetensors_files import Source, save_tensors

INDEX = ("sizes", "stamps", "contents", "checks", "captions", "caption_texts", "texts", "text_bytes")
TEXT_INDEX = ("text_places", "text_checks")  # in the index of shards with embeddings
ERRORS = "surrogatepass"  # half of a pair, which JSON can write and UTF-8 cannot
EMBEDDING = ("tokens", "counts", "pooled")


class DamagedShard(ValueError):
    """Error of a shard that is not what was written."""


@dataclass(frozen=True)
class Entry:
    """Encoded record: its bucket, its tensors without an axis of records, and its captions."""

    size: Size
    tensors: Mapping[str, Tensor]
    captions: tuple[str, ...]


def pack(
    entries: Sequence[Entry | None], stamps: Sequence[int], contents: Sequence[int],
    embeddings: Mapping[str, TextEmbedding],
) -> dict[str, Tensor]:  # fmt: skip
    """Build a shard's tensors from its records, None for those left out, and the embeddings of all captions.

    embeddings: empty if text is not encoded. ValueError for records of one bucket with different tensors.
    """
    rows = dict[str, list[Tensor]]()
    for entry in entries:
        for name, tensor in entry.tensors.items() if entry else ():
            rows.setdefault(f"{name}.{entry.size[0]}x{entry.size[1]}" if entry else "", []).append(tensor)
    tensors = {name: _stacked(name, each) for name, each in rows.items()}
    captions = [entry.captions if entry else () for entry in entries]
    texts = list(dict.fromkeys(["", *(caption for each in captions for caption in each)]))
    numbers = {text: i for i, text in enumerate(texts)}
    encoded = [text.encode(errors=ERRORS) for text in texts]
    tensors |= {
        "sizes": torch.tensor([entry.size if entry else (0, 0) for entry in entries]),
        "stamps": torch.tensor(stamps),
        "contents": torch.tensor(contents),
        "checks": torch.tensor([checksum(entry.tensors) if entry else 0 for entry in entries]),
        "captions": _places([len(each) for each in captions]),
        "caption_texts": torch.tensor(
            [numbers[caption] for each in captions for caption in each], dtype=torch.int64
        ),
        "texts": _places([len(text) for text in encoded]),
        "text_bytes": torch.frombuffer(bytearray(b"".join(encoded) or b"\0"), dtype=torch.uint8),
    }
    if embeddings:
        tensors |= _pack_embeddings([embeddings[text] for text in texts])
    return tensors


def _pack_embeddings(embeddings: Sequence[TextEmbedding]) -> dict[str, Tensor]:
    own = [_embedding_tensors(embedding) for embedding in embeddings]
    return {
        **{name: torch.cat([each[name] for each in own]) for name in own[0]},
        "text_places": _places([len(each["tokens"]) for each in own]),
        "text_checks": torch.tensor([checksum(each) for each in own]),
    }


def _embedding_tensors(embedding: TextEmbedding) -> dict[str, Tensor]:
    """Return the tensors of one caption's embedding [1, L, C]: [L, C], [L] and [1, C]."""
    counts = {} if embedding.counts is None else {"counts": embedding.counts[0].cpu()}
    return {"tokens": embedding.tokens[0].cpu(), **counts, "pooled": embedding.pooled.cpu()}


def _stacked(name: str, rows: Sequence[Tensor]) -> Tensor:
    if len(kinds := {(tuple(row.shape), row.dtype) for row in rows}) > 1:
        one, other = sorted(kinds, key=str)[:2]
        raise ValueError(f"{name}: records have different tensors, {one} and {other}")
    return torch.stack(list(rows))


def _places(lengths: Sequence[int]) -> Tensor:
    """Return where each of parts of these lengths begins, and the end: int64 [n + 1]."""
    return torch.tensor([0, *lengths]).cumsum(0)


def as_number(text: str) -> int:
    """Convert a digest to int64."""
    return int.from_bytes(bytes.fromhex(text.removeprefix(DIGEST)), "little", signed=True)


def checksum(tensors: Mapping[str, Tensor]) -> int:
    """Compute the CRC-32 of tensors' bytes, in the order of their names; on the CPU."""
    found = 0
    for _, tensor in sorted(tensors.items()):
        if tensor.numel():
            found = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, found)
    return found


def shard_digest(contents: Tensor, made_by: str) -> str:
    """Return a digest of the contents of a shard's records and of what it was made by."""
    return digest(contents, made_by.encode()).removeprefix(DIGEST)


def save_shard(tensors: Mapping[str, Tensor], file: Path, made_by: str) -> None:
    """Write a shard atomically. made_by: all that its tensors depend on besides the records, as JSON."""
    index = checksum({name: tensors[name] for name in (*INDEX, *TEXT_INDEX) if name in tensors})
    save_tensors(tensors, file, {"made_by": made_by, "index": str(index)})


class Shard:
    """Shard that is mapped. DamagedShard, or FileNotFoundError, for a file that cannot be used."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.source = Source([file])
            metadata = self.source.metadata(file) or {}
            self.made_by, saved = metadata["made_by"], metadata["index"]
            index = {name: self.source[name] for name in (*INDEX, *TEXT_INDEX) if name in self.source}
            if str(checksum(index)) != saved or not index.keys() >= set(INDEX):
                raise ValueError("its index does not have its checksum")
            if (found := shard_digest(index["contents"], self.made_by)) not in file.name:
                raise ValueError(f"its name has another digest than {found}")
        except (KeyError, ValueError) as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise DamagedShard(f"{file}: not a whole shard: {reason.removeprefix(f'{file}: ')}") from None
        self.index, self.sizes = index, index["sizes"]
        self.rows = torch.zeros(len(self.sizes), dtype=torch.int64)  # of each record, among those of its size
        for size in self.buckets():
            own = (self.sizes == torch.tensor(size)).all(1)
            self.rows[own] = torch.arange(int(own.sum()))
        self._mapped = dict[str, Tensor]()
        self.names = sorted({name.rpartition(".")[0] for name in self.source if "." in name})
        self.has_text = "tokens" in self.source

    def buckets(self) -> list[Size]:
        """List the buckets of the records that are not left out."""
        return [(h, w) for h, w in self.sizes.unique(dim=0).tolist() if h]

    def record(self, i: int) -> dict[str, Tensor]:
        """Read a record's tensors, which are mapped; DamagedShard if they do not have their checksum."""
        height, width = self.sizes[i].tolist()
        row = int(self.rows[i])
        found = {name: self._tensor(f"{name}.{height}x{width}")[row] for name in self.names}
        self._check(checksum(found), self.index["checks"][i], f"record {i}")
        return found

    def caption_counts(self) -> Tensor:
        """Count the captions of each record: int64 [n]."""
        return self.index["captions"].diff()

    def text_numbers(self, i: int) -> list[int]:
        """Return the numbers of a record's captions; that of the empty caption is 0."""
        begin, end = self.index["captions"][i : i + 2].tolist()
        return self.index["caption_texts"][begin:end].tolist()

    def text(self, number: int) -> str:
        """Return a caption."""
        begin, end = self.index["texts"][number : number + 2].tolist()
        return self.index["text_bytes"][begin:end].numpy().tobytes().decode(errors=ERRORS)

    def embedding(self, number: int) -> TextEmbedding:
        """Read a caption's embedding [1, L, C], mapped; DamagedShard if it does not have its checksum."""
        begin, end = self.index["text_places"][number : number + 2].tolist()
        mapped = {name: self._tensor(name) for name in EMBEDDING if name in self.source}
        found = {
            name: tensor[number : number + 1] if name == "pooled" else tensor[begin:end]
            for name, tensor in mapped.items()
        }
        self._check(checksum(found), self.index["text_checks"][number], f"caption {number}")
        counts = found["counts"][None] if "counts" in found else None
        return TextEmbedding(found["tokens"][None], found["pooled"], counts)

    def _tensor(self, name: str) -> Tensor:
        if name not in self._mapped:
            self._mapped[name] = self.source.mapped(name)
        return self._mapped[name]

    def _check(self, got: int, expected: Tensor, what: str) -> None:
        if got != int(expected):
            raise DamagedShard(f"{self.file}: {what} does not have its checksum")


class OpenShards:
    """Shards of a folder by the names of their files, of which the last used `most` stay mapped."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most, self.shards = folder, most, OrderedDict[str, Shard]()

    def __getitem__(self, name: str) -> Shard:
        if name not in self.shards:
            self.shards[name] = Shard(self.folder / name)
            if len(self.shards) > self.most:
                self.shards.popitem(last=False)
        self.shards.move_to_end(name)
        return self.shards[name]

    def forget(self, name: str) -> None:
        """Map a file anew when it is used again."""
        self.shards.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"shards": OrderedDict()}  # another process maps its own

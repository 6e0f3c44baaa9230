"""Checkpoint as a lazy map from tensor name to tensor, read from memory-mapped safetensors files only.

Files are found in a listing, not by one fixed name: `diffusion_pytorch_model.safetensors`,
`diffusion_pytorch_model.fp16.safetensors`, `model.fp16-00001-of-00007.safetensors` and
`model-00001-of-00007.fp16.safetensors` are all read by `weight_files`.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weights_convert.atomic_write import atomic_file, write_bytes
from weights_convert.untrusted_files import DTYPES, metadata_of, open_safetensors, read_json_object

# Name of each component's weight file in a public folder, before variant and shard.
WEIGHT_FILE_STEMS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model", "text_encoder": "model", "image_encoder": "model",
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_INDEX_BYTES = 2**24
ALIGNMENT = 64  # bytes, of torch's allocations on a CPU
FORMAT = {"format": "pt"}  # metadata that transformers requires
HEADER_START = b'{"__metadata__":'  # of a file with metadata, after the eight bytes of the header's length
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s*([KMGT]B)", re.IGNORECASE | re.ASCII)
_WEIGHT_FILE = re.compile(
    r"(?P<stem>[\w-]+?)(\.(?P<before>\w+))?(-(?P<part>\d{5})-of-(?P<parts>\d{5}))?(\.(?P<after>\w+))?\.safetensors"
)


def pickle_message(pickle: str | Path) -> str:
    """Return the message for a pickle."""
    return (
        "a pickle can run code and is never opened. Convert it where you trust it: "
        f"python -m weights_convert --pickle {pickle} NEW.safetensors"
    )


def weight_files(listing: Iterable[str], variant: str | None, where: str) -> list[str]:
    """Select the safetensors files of one component from the file names of its folder, shards in order.

    variant: the name between dots, such as "fp16"; None selects the plain files, or the only variant.
    Raises FileNotFoundError, naming the files found, if there is none, a shard is missing, or only pickles
    exist.
    """
    listing = sorted(listing)
    found = dict[str | None, list[re.Match[str]]]()
    for match in filter(None, map(_WEIGHT_FILE.fullmatch, listing)):
        found.setdefault(match["before"] or match["after"], []).append(match)
    if not found:
        pickles = [name for name in listing if name.endswith(PICKLES)]
        hint = f"only pickles ({pickles[0]}): {pickle_message(pickles[0])}" if pickles else "none"
        raise FileNotFoundError(f"{where}: expected .safetensors weights, found {hint}")
    if variant is None and None not in found and len(found) == 1:
        variant = next(iter(found))
    if variant not in found:
        have = ", ".join(repr(name) if name else "no variant" for name in sorted(found, key=str))
        raise FileNotFoundError(f"{where}: expected weights of variant {variant!r}, found {have}")
    chosen = found[variant]
    names, parts = [match[0] for match in chosen], chosen[0]["parts"]
    if len({(match["stem"], match["parts"]) for match in chosen}) > 1 or (parts is None and len(names) > 1):
        raise FileNotFoundError(f"{where}: several checkpoints side by side: {', '.join(names)}")
    if parts is not None:
        absent = set(range(1, int(parts) + 1)) - {int(match["part"]) for match in chosen}
        if absent:
            raise FileNotFoundError(f"{where}: shard {min(absent)} of {int(parts)} is missing")
    return names


def is_weight_file(name: str) -> bool:
    """Return whether `save_shards` writes files of this name for a component, an index or weights."""
    match = _WEIGHT_FILE.fullmatch(re.sub(r"\.safetensors\.index((\.\w+)?)\.json", r"\1.safetensors", name))
    return match is not None and match["stem"] in WEIGHT_FILE_STEMS.values()


def walk_files(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each folder in a folder and its file names, following links. ValueError for one met twice."""
    seen = set[Path]()
    for folder, _, files in os.walk(source, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            raise ValueError(f"{folder}: a link to {real}, which is in {source} already")
        seen.add(real)
        yield Path(folder), files


def read_shard_index(index: Path) -> dict[str, str]:
    """Read the `weight_map` of an index of shards: tensor name -> file name, all in the index's own folder.

    Raises ValueError for a file that is not an index, and for a shard elsewhere by its name. A link in the
    folder is followed, as it is without an index.
    """
    content = read_json_object(index, MAX_INDEX_BYTES)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: not an index of shards: weight_map is not a map from tensors to files")
    for name, file in files.items():
        if file in ("", ".", "..") or not file.isprintable() or set(file) & set("/\\"):
            got = f"weight_map[{name[:100]!r}] is {file[:100]!r}"
            raise ValueError(f"{index}: {got}, expected a file beside the index")
    return files


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if it is of 8-bit floats, with which nothing computes; else itself."""
    return tensor.float() if tensor.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else tensor


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor from which a CPU computes the bits that it would from torch's own: itself or a copy.

    In a mapped file the alignment depends on the header's length. Matrix kernels of float32 and float64 sum
    in another order at another alignment; those of half precision pack or widen their inputs and do not.
    Any kernel may sum in another order for other strides.
    """
    if tensor.device.type != "cpu":
        return tensor
    tensor = tensor.contiguous()
    needs_no_copy = tensor.itemsize < 4 or tensor.data_ptr() % ALIGNMENT == 0
    return tensor if needs_no_copy else tensor.clone()


class Source(Mapping[str, Tensor]):
    """Source of tensors by name: safetensors files, from which each tensor is read on access.

    `source[name]` is ready to compute with (see `aligned`, `widened`), `source.mapped(name)` is the file's
    own memory.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._handles, self._file_of = dict[Path, Any](), dict[str, Path]()
        for file in self.files:
            handle = self._handles[file] = open_safetensors(file)
            for name in handle.keys():  # noqa: SIM118 (a handle is not a mapping)
                if name in self._file_of:
                    raise ValueError(f"{file}: tensor {name} is in {self._file_of[name].name} already")
                self._file_of[name] = file

    def __getitem__(self, name: str) -> Tensor:
        return aligned(widened(self.mapped(name)))

    def mapped(self, name: str) -> Tensor:
        """Return one tensor of the mapped file, at any alignment."""
        return self._handles[self._file_of[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # no tensor is read for it

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def release(self, name: str) -> None:
        """Release the pages read so far of this tensor's file, which count as this process's memory while
        mapped. Tensors still in use keep theirs.
        """
        file = self._file_of[name]
        self._handles[file] = safe_open(file, framework="pt")

    @property
    def where(self) -> str:
        """The file, or the folder of several, for messages."""
        return str(self.files[0].parent if len(self.files) > 1 else self.files[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape from the header, without reading the tensor."""
        return tuple(self._handles[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype from the header, without reading the tensor."""
        return DTYPES[self._handles[self._file_of[name]].get_slice(name).get_dtype()]

    def nbytes(self, name: str) -> int:
        """Return the bytes of one tensor in the file."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def names_in(self, file: Path) -> list[str]:
        """List the tensors of one of the files."""
        return [name for name, holder in self._file_of.items() if holder == file]

    def metadata(self, file: Path) -> dict[str, str] | None:
        """Return a file's text metadata, in its order."""
        return metadata_of(file)


class Tensors(dict[str, Tensor]):
    """Tensors of a checkpoint in memory, read like a `Source`. ValueError for values that are not tensors."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__(tensors)
        self.where = where
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise ValueError(f"{where}: expected names as keys, got {name!r}")
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{where}: {name} is {type(tensor).__name__}, expected a tensor")

    def __getitem__(self, name: str) -> Tensor:
        return aligned(widened(self.mapped(name)))

    def mapped(self, name: str) -> Tensor:
        """Return one tensor as given, at any alignment."""
        return super().__getitem__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor."""
        return tuple(self.mapped(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of one tensor."""
        return self.mapped(name).dtype


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; replace an existing one. ValueError for shards."""
    check_whole(tensors)
    separate, pointers = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        separate[name] = tensor.detach().contiguous()
        if separate[name].data_ptr() in pointers:  # the format does not allow one tensor under two names
            separate[name] = separate[name].clone()
        pointers.add(separate[name].data_ptr())
    write_tensors(separate, file, FORMAT | dict(metadata or {}))


def check_whole(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming a tensor of which each process has a shard (torch's DTensor)."""
    if name := next((name for name, tensor in tensors.items() if hasattr(tensor, "full_tensor")), None):
        how = "continue the run in one process without shards, which reads its state whole, and save there"
        raise ValueError(f"{name} is sharded over processes: {how}")


def save_shards(
    tensors: Mapping[str, Tensor], folder: Path, stem: str, variant: str | None = None,
    max_shard_size: int | str | None = None,
) -> None:  # fmt: skip
    """Write tensors to a folder as one safetensors file or, if they are larger, as shards with an index.

    stem, variant: as in `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`. max_shard_size: bytes, or
    as `parse_size` reads it; None for one file. A tensor larger than that has a shard of its own.
    """
    stem = f"{stem}.{variant}" if variant else stem
    shards = _split(tensors, None if max_shard_size is None else parse_size(max_shard_size))
    if len(shards) <= 1:
        return save_tensors(tensors, folder / f"{stem}.safetensors")
    files = dict[str, str]()
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors({name: tensors[name] for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    name = ".".join([*stem.split(".")[:1], "safetensors.index", *stem.split(".")[1:], "json"])
    write_bytes((json.dumps(index, indent=2, sort_keys=True) + "\n").encode(), folder / name)


def _split(tensors: Mapping[str, Tensor], most: int | None) -> list[list[str]]:
    """Split names, in their order, into shards of at most `most` bytes."""
    shards, size = list[list[str]](), 0
    for name, tensor in tensors.items():
        if not shards or (most is not None and size + tensor.nbytes > most):
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def parse_size(size: int | str) -> int:
    """Convert a size such as "5GB", or a number of bytes, to bytes; ValueError for anything else."""
    total = size
    if isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        total = int(float(match[1]) * SIZE_UNITS[match[2].upper()])
    if isinstance(total, bool) or not isinstance(total, int) or total < 1:
        expected = "a size such as '5GB' (KB, MB, GB or TB) or a number of bytes"
        raise ValueError(f"max_shard_size must be {expected}, got {repr(size)[:100]}")
    return total


def write_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file with exactly this metadata, in its order; no two tensors may share memory.

    Equal tensors and metadata give equal bytes; the library alone writes metadata in a random order.
    """
    with atomic_file(file) as scratch:
        save_file(tensors, scratch, metadata=metadata)
        if metadata and len(metadata) > 1:
            _order_metadata(scratch, metadata)


def _order_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Overwrite the metadata in a file's header with the same metadata in this order."""
    before, after = (
        json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        for fields in (metadata_of(file), metadata)
    )
    with file.open("r+b") as stream:
        header = stream.read(8 + len(HEADER_START) + len(before))
        if header[8:] != HEADER_START + before:  # else other bytes would be overwritten
            raise RuntimeError(f"{file.name}: expected metadata at the start of what safetensors writes")
        stream.seek(-len(before), os.SEEK_CUR)
        stream.write(after)

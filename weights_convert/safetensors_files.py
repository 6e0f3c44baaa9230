"""One checkpoint as a lazy map from tensor name to tensor, read from memory-mapped safetensors files only.

Files are found in a listing, never guessed by one fixed name: `diffusion_pytorch_model.safetensors`,
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

from weights_convert.atomic_write import atomic_file
from weights_convert.untrusted_files import DTYPES, metadata_of, open_safetensors, read_json_object

# What the weight file of each component is called in a public folder, before variant and shard.
WEIGHT_FILE_STEMS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model", "text_encoder": "model", "image_encoder": "model",
}  # fmt: skip
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_INDEX_BYTES = 2**24  # bytes
ALIGNMENT = 64  # bytes, of what torch allocates on a CPU
FORMAT = {"format": "pt"}  # the metadata without which transformers takes a file for another program's
HEADER_START = b'{"__metadata__":'  # of a file with metadata, after the eight bytes of the header's length
_WEIGHT_FILE = re.compile(
    r"(?P<stem>[\w-]+?)(\.(?P<before>\w+))?(-(?P<part>\d{5})-of-(?P<parts>\d{5}))?(\.(?P<after>\w+))?\.safetensors"
)


def pickle_message(pickle: str | Path) -> str:
    """What to say of a pickle."""
    return (
        "a pickle can run code and is never opened. Convert it where you trust it: "
        f"python -m weights_convert --pickle {pickle} NEW.safetensors"
    )


def weight_files(listing: Iterable[str], variant: str | None, where: str) -> list[str]:
    """The safetensors files of one component among the file names of its folder, shards in order.

    variant: the name between dots, such as "fp16"; None takes the plain files, or the only variant there is.
    Raises FileNotFoundError, naming what the folder has, if there is none, a shard is missing, or only
    pickles exist.
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


def walk_files(source: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each folder in a folder and its file names, links followed. ValueError for a folder met twice."""
    seen = set[Path]()
    for folder, _, files in os.walk(source, followlinks=True):
        if (real := Path(folder).resolve()) in seen:
            raise ValueError(f"{folder}: a link to {real}, which is in {source} already")
        seen.add(real)
        yield Path(folder), files


def read_shard_index(index: Path) -> dict[str, str]:
    """The `weight_map` of an index of shards: tensor name -> file name, all in the index's own folder.

    Raises ValueError for what is no index, and for a file elsewhere, be it by its name or by a link; links
    of a Hugging Face cache, from snapshots/ to blobs/, are followed.
    """
    content = read_json_object(index, MAX_INDEX_BYTES)
    files = content.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: not an index of shards: weight_map is not a map from tensors to files")
    home = index.parent.resolve()
    places = {home, *(folder.parent / "blobs" for folder in home.parents if folder.name == "snapshots")}
    for name, file in files.items():
        if file in ("", ".", "..") or not file.isprintable() or set(file) & set("/\\"):
            told = f"weight_map[{name[:100]!r}] is {file[:100]!r}"
            raise ValueError(f"{index}: {told}, expected a file beside the index")
    for file in sorted(set(files.values())):
        if (place := (home / file).resolve().parent) not in places:
            raise ValueError(f"{index}: {file} is a link to {place}, expected a file beside the index")
    return files


def aligned(tensor: Tensor) -> Tensor:
    """Return a tensor as torch itself would allocate it: itself, or on a CPU a copy if it lies otherwise.

    A mapped file puts its tensors where its header happens to end. Matrix kernels add in another order at
    another alignment or in other strides, so the same weights would compute other bits.
    """
    if tensor.device.type != "cpu":
        return tensor
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class Source(Mapping[str, Tensor]):
    """Tensors of safetensors files by name, each read from the mapped file when asked for.

    `source[name]` is ready to compute with (see `aligned`), `source.mapped(name)` is the file's own memory.
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
        return aligned(self.mapped(name))

    def mapped(self, name: str) -> Tensor:
        """Return one tensor as it lies in the mapped file, at any alignment."""
        return self._handles[self._file_of[name]].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # no tensor is read for it

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def release(self, name: str) -> None:
        """Let go of what was read so far of this tensor's file: as long as it is mapped, its pages count as
        this process's memory. Tensors that are still held keep theirs.
        """
        file = self._file_of[name]
        self._handles[file] = safe_open(file, framework="pt")

    @property
    def where(self) -> str:
        """The file, or the folder of several, for messages."""
        return str(self.files[0].parent if len(self.files) > 1 else self.files[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape from the header, without reading the tensor."""
        return tuple(self._handles[self._file_of[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype from the header, without reading the tensor."""
        code = self._handles[self._file_of[name]].get_slice(name).get_dtype()
        if code not in DTYPES:
            file = self._file_of[name]
            raise ValueError(f"{file}: tensor {name} has dtype {code}, which torch cannot hold")
        return DTYPES[code]

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor in the file."""
        return prod(self.shape(name)) * self.dtype(name).itemsize

    def names_in(self, file: Path) -> list[str]:
        """The tensors of one of the files."""
        return [name for name, holder in self._file_of.items() if holder == file]

    def metadata(self, file: Path) -> dict[str, str] | None:
        """The file's own text metadata, in its order."""
        return metadata_of(file)


class Tensors(dict[str, Tensor]):
    """A checkpoint that is in memory already, read like a `Source`. ValueError for what is no tensor."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__(tensors)
        self.where = where
        for name, tensor in tensors.items():
            if not isinstance(name, str):
                raise ValueError(f"{where}: expected names as keys, got {name!r}")
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{where}: {name} is {type(tensor).__name__}, expected a tensor")

    def __getitem__(self, name: str) -> Tensor:
        return aligned(self.mapped(name))

    def mapped(self, name: str) -> Tensor:
        """Return one tensor as it was given, at any alignment."""
        return super().__getitem__(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self.mapped(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor."""
        return self.mapped(name).dtype


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, whole or not at all; one that is there is replaced."""
    whole, places = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        whole[name] = tensor.detach().contiguous()
        if whole[name].data_ptr() in places:  # one tensor under two names: the format wants two
            whole[name] = whole[name].clone()
        places.add(whole[name].data_ptr())
    write_tensors(whole, file, FORMAT | dict(metadata or {}))


def write_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None) -> None:
    """Write a safetensors file with just this metadata, in its order; no two tensors may share memory.

    Equal tensors and metadata give equal bytes. The library alone draws the order of the metadata anew each
    time; all else of its file is kept.
    """
    with atomic_file(file) as scratch:
        save_file(tensors, scratch, metadata=metadata)
        if metadata and len(metadata) > 1:
            _order_metadata(scratch, metadata)


def _order_metadata(file: Path, metadata: dict[str, str]) -> None:
    """Write the metadata of a file anew in this order, over those in its header, which are as long."""
    before, after = (
        json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
        for fields in (metadata_of(file), metadata)
    )
    with file.open("r+b") as stream:
        header = stream.read(8 + len(HEADER_START) + len(before))
        if header[8:] != HEADER_START + before:  # or the bytes of something else would be written over
            raise RuntimeError(f"{file.name}: expected metadata at the start of what safetensors writes")
        stream.seek(-len(before), os.SEEK_CUR)
        stream.write(after)
